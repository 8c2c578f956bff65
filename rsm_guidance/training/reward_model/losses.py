"""Preferences within groups of K samples of one prompt, as loss and as accuracy.

Bradley and Terry: P(i is preferred to j) = sigmoid(s_i - s_j) for scores s.  Which of two is preferred say the targets,
if they differ by more than `MIN_PREFERENCE`.
"""

from torch import Tensor
from torch.nn import functional as F

MIN_PREFERENCE = 0.05
"""Difference of targets, on their scale of about [0, 1], up to which two samples are no pair."""


def preferred_margins(scores: Tensor, targets: Tensor) -> Tensor:
    """Score of the preferred sample minus that of the other, for every pair of every group.

    Args:
        scores: [G, K].
        targets: [G, K], higher is better.

    Returns:
        [number of pairs].
    """
    pairs = (targets[:, :, None] - targets[:, None, :]) > MIN_PREFERENCE
    return (scores[:, :, None] - scores[:, None, :])[pairs]


def bradley_terry_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """-log sigmoid(s_i - s_j), mean over all pairs; 0 if there are none.  Scores and targets [G, K]."""
    margins = preferred_margins(scores, targets)
    return F.softplus(-margins).mean() if len(margins) else scores.sum() * 0


def pairs_won(scores: Tensor, targets: Tensor) -> tuple[float, int]:
    """Number of pairs whose preferred sample scores higher, ties counting half, and number of pairs."""
    margins = preferred_margins(scores, targets)
    return float((margins > 0).sum() + 0.5 * (margins == 0).sum()), len(margins)

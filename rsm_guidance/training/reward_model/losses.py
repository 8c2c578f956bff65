"""Preference losses: of pairs, by name (`LOSSES`), and of groups of K samples of one prompt.

A loss of pairs is a pure function (first, second, label, **constants) -> [B]: what the model says of both members, and
what is known of the pair.  Swapping the members and the label changes nothing.  With d = s_1 - s_2 for the scores, w the
probability that the first is preferred, and sigma the pair's noise level:

| name | loss of a pair whose first member is preferred | ties |
|---|---|---|
| `bradley-terry` | -log sigmoid(d) | none |
| `margin` | -log sigmoid(d - m) | none |
| `soft` | KL(w, 1 - w || sigmoid(d), sigmoid(-d)) | w = 1/2 |
| `win-tie` | -log sigmoid(d - m) | -log sigmoid(d - m) - log sigmoid(-d - m) |
| `thurstone` | -w log p - (1 - w) log(1 - p), p = Phi(d / sqrt(v_1 + v_2)) | w = 1/2 |
| `fidelity` | 1 - sqrt(w p) - sqrt((1 - w) (1 - p)), the same p | w = 1/2 |
| `ordinal` | cross-entropy of both members' ratings | as any pair |
| `oprm` | -log P(rating 1 > rating 2) | -log P(rating 1 = rating 2) |
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.reward_models.outputs import RewardOutput

MIN_PREFERENCE = 0.05
"""Difference of targets, on their scale of about [0, 1], up to which two samples are no pair."""


# --- pairs ---


@dataclass(frozen=True)
class PairLabel:
    """What is known of B pairs.

    Attributes:
        win: [B], probability in [0, 1] that the first member is preferred.
        tie: [B], bool: judged equal.  Losses that know ties treat these apart; the others leave them out or take w = 1/2.
        sigma: [B], noise level of both members, in [0, 1].
        ratings: [B, 2], ratings of the members; NaN where there is none.
    """

    win: Tensor
    tie: Tensor
    sigma: Tensor
    ratings: Tensor | None = None

    def to(self, device: torch.device) -> "PairLabel":
        """On a device."""
        ratings = None if self.ratings is None else self.ratings.to(device)
        return PairLabel(self.win.to(device), self.tie.to(device), self.sigma.to(device), ratings)


def bradley_terry(first: RewardOutput, second: RewardOutput, label: PairLabel) -> Tensor:
    """-log sigmoid(d) of the member that w > 1/2 prefers; 0 for ties and w = 1/2."""
    return margin(first, second, label, margin=0.0)


def margin(first: RewardOutput, second: RewardOutput, label: PairLabel, margin: float = 1.0) -> Tensor:
    """-log sigmoid(d - m) of the member that w > 1/2 prefers; 0 for ties and w = 1/2."""
    side = torch.where(label.tie, torch.zeros_like(label.win), (label.win - 0.5).sign())
    return side.abs() * F.softplus(margin - side * (first.mean - second.mean))


def soft(first: RewardOutput, second: RewardOutput, label: PairLabel) -> Tensor:
    """KL of the label from sigmoid(d): least, and 0, where sigmoid(d) = w.  Ties count as w = 1/2.

    The cross-entropy of PickScore and its kin less the label's entropy, so that a tie that is met costs nothing.
    """
    gap, win = first.mean - second.mean, _with_ties(label)
    return win * F.softplus(-gap) + (1 - win) * F.softplus(gap) + torch.xlogy(win, win) + torch.xlogy(1 - win, 1 - win)


def win_tie(first: RewardOutput, second: RewardOutput, label: PairLabel, margin: float = 3.0) -> Tensor:
    """SoliReward (arXiv 2512.22170): wins need a margin, ties lie within it; a met tie costs 2 log(1 + exp(m)).

    The paper's ties are of two good samples; where ties are many, their term outweighs the wins'.
    """
    gap = first.mean - second.mean
    up, down = F.softplus(margin - gap), F.softplus(margin + gap)
    return torch.where(label.tie, up + down, label.win * up + (1 - label.win) * down)


def thurstone(
    first: RewardOutput, second: RewardOutput, label: PairLabel, noise: float = 2.0, floor: float = 0.05
) -> Tensor:
    """Negative log-likelihood under p = Phi(d / sqrt(v_1 + v_2)).

    Args:
        noise, floor: v = noise sigma^2 + floor for each member (DiNa-LRM, arXiv 2602.11146).  Where the model gives
            variances they are added to it; so that the model's alone count, set both to 0.
    """
    log_p, log_q = _probit(first, second, label, noise, floor)
    win = _with_ties(label)
    return -(win * log_p + (1 - win) * log_q)


def fidelity(
    first: RewardOutput, second: RewardOutput, label: PairLabel, noise: float = 2.0, floor: float = 0.05
) -> Tensor:
    """1 - sqrt(w p) - sqrt((1 - w) (1 - p)), with p and constants as in `thurstone`; in [0, 1]."""
    log_p, log_q = _probit(first, second, label, noise, floor)
    win = _with_ties(label)
    return 1 - win.sqrt() * (log_p / 2).exp() - (1 - win).sqrt() * (log_q / 2).exp()


def ordinal(first: RewardOutput, second: RewardOutput, label: PairLabel) -> Tensor:
    """Cross-entropy of the members' ratings, mean over those that have one; 0 where neither has.

    A rating between two classes is spread on both, so that its expectation is the rating.
    """
    if label.ratings is None:
        raise UsageError("the loss 'ordinal' needs ratings of the samples, which this data does not have")
    terms = []
    for output, rating in zip((first, second), label.ratings.unbind(1), strict=True):
        log_probs, values = _distribution(output, "ordinal")
        target = rating_distribution(rating.nan_to_num(float(values[0])), values)
        terms.append(-(target.to(log_probs) * log_probs).sum(-1) * rating.isfinite())
    count = label.ratings.isfinite().sum(1).clamp(min=1)
    return (terms[0] + terms[1]) / count


def oprm(first: RewardOutput, second: RewardOutput, label: PairLabel) -> Tensor:
    """-log of the probability of the order (arXiv 2602.12660); that of equal ratings for ties is ours."""
    above, equal, below = log_order(_distribution(first, "oprm")[0], _distribution(second, "oprm")[0])
    return -torch.where(label.tie, equal, label.win * above + (1 - label.win) * below)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "bradley-terry": bradley_terry,
    "margin": margin,
    "soft": soft,
    "win-tie": win_tie,
    "thurstone": thurstone,
    "fidelity": fidelity,
    "ordinal": ordinal,
    "oprm": oprm,
}

DECIDED_ONLY = frozenset({"bradley-terry", "margin"})
"""Losses to which a tie says nothing."""

NEEDS_ORDINAL = frozenset({"ordinal", "oprm"})
"""Losses that read a distribution over ratings."""


def informs(name: str, label: PairLabel) -> Tensor:
    """Which pairs [B] a loss learns from; the others have no part in its mean."""
    if name == "ordinal":
        return torch.zeros_like(label.tie) if label.ratings is None else label.ratings.isfinite().any(1)
    return ~label.tie & (label.win != 0.5) if name in DECIDED_ONLY else torch.ones_like(label.tie)


def weighted_mean(losses: Tensor, weights: Tensor) -> Tensor:
    """sum(weights * losses) / sum(weights), all [B]; 0, with a gradient of 0, where all weights are 0."""
    return (losses * weights).sum() / (float(weights.sum()) or 1.0)


def rating_distribution(ratings: Tensor, values: Tensor) -> Tensor:
    """Probabilities [B, K] on the two values around each rating [B], with the rating as their mean.

    Args:
        ratings: [B]; outside the values they count as the nearest.
        values: [K], rising.
    """
    inside = ratings.to(values).clamp(values[0], values[-1])
    upper = torch.searchsorted(values, inside.contiguous()).clamp(1, len(values) - 1)
    low, high = values[upper - 1], values[upper]
    share = ((inside - low) / (high - low))[:, None]
    k = len(values)
    return (1 - share) * F.one_hot(upper - 1, k) + share * F.one_hot(upper, k)


def log_order(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """log P(a > b), log P(a = b) and log P(a < b), each [B], for independent classes with log-probabilities [B, K]."""
    joint = first[:, :, None] + second[:, None, :]
    k = joint.shape[-1]
    above = torch.ones(k, k, dtype=torch.bool, device=joint.device).tril(-1)
    parts = (above, torch.eye(k, dtype=torch.bool, device=joint.device), above.T)
    log_p = [joint[:, part].logsumexp(-1) for part in parts]
    return log_p[0], log_p[1], log_p[2]


def _with_ties(label: PairLabel) -> Tensor:
    return torch.where(label.tie, torch.full_like(label.win, 0.5), label.win)


def _probit(
    first: RewardOutput, second: RewardOutput, label: PairLabel, noise: float, floor: float
) -> tuple[Tensor, Tensor]:
    """log p and log(1 - p)."""
    if noise < 0 or floor < 0:
        raise UsageError(f"variances are not negative; got noise {noise} and floor {floor}")
    variance = 2 * (noise * label.sigma**2 + floor)
    for output in (first, second):
        if output.variance is not None:
            variance = variance + output.variance
    if not bool((variance > 0).all()):
        raise UsageError("the variance of a pair is 0: set a floor, or train a model whose output is gaussian")
    z = (first.mean - second.mean) / variance.sqrt()
    return torch.special.log_ndtr(z), torch.special.log_ndtr(-z)


def _distribution(output: RewardOutput, name: str) -> tuple[Tensor, Tensor]:
    if output.log_probs is None or output.ratings is None:
        raise UsageError(f"the loss {name!r} needs a reward model with output: ordinal")
    return output.log_probs, output.ratings


# --- groups ---


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

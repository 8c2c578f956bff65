"""Losses of pairs: what a head says of two images of one prompt, against the probability that the first is preferred.

Each takes outputs [B, N] of both, probabilities [B] (1: the first won, 0: the second, 0.5: a tie or nothing known), and the noise
level sigma [B] of the pair, and gives losses [B].  d is the difference of scores, first less second.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from rsm_guidance.reward_models.outputs import OutputKind, ordered, variance_of

_EPS = 1e-8  # without it the gradient of the fidelity is infinite at agreement
_TIED = 1e-3


def bradley_terry(d: Tensor, probability: Tensor) -> Tensor:
    """Cross-entropy of sigmoid(d) against the probability, less the latter's entropy: never negative.  Soft labels are welcome."""
    return F.binary_cross_entropy_with_logits(d, probability, reduction="none") - entropy(probability)


def margin(d: Tensor, probability: Tensor, by: float) -> Tensor:
    """-log sigmoid(d - m) for the winner (Bradley and Terry with a margin), weighted by the probability of either order."""
    return probability * F.softplus(by - d) + (1 - probability) * F.softplus(by + d)


def win_tie(d: Tensor, probability: Tensor, by: float) -> Tensor:
    """SoliReward (arXiv 2512.22170): the margin where one won; -log sigmoid(d - m) - log sigmoid(-d - m) at a tie.

    The latter is least at d = 0, where it is 2 log(1 + e^m).
    """
    tied = (probability - 0.5).abs() < _TIED
    return torch.where(tied, F.softplus(by - d) + F.softplus(by + d), margin(d, probability, by))


def thurstone_nll(d: Tensor, variance: Tensor, probability: Tensor) -> Tensor:
    """Cross-entropy of Phi(d / sqrt(variance)) against the probability, less the latter's entropy."""
    z = d / variance.sqrt()
    said = probability * torch.special.log_ndtr(z) + (1 - probability) * torch.special.log_ndtr(-z)
    return -said - entropy(probability)


def fidelity(d: Tensor, variance: Tensor, probability: Tensor) -> Tensor:
    """1 - sqrt(p p*) - sqrt((1 - p)(1 - p*)) for p = Phi(d / sqrt(variance)) (DiNa-LRM, DeQA-Score); in [0, 1] but for 1e-4."""
    p = 0.5 * (1 + torch.erf(d / (2 * variance).sqrt()))
    return 1 - (p * probability + _EPS).sqrt() - ((1 - p) * (1 - probability) + _EPS).sqrt()


def noise_variance(sigma: Tensor) -> Tensor:
    """Variance of one score at a noise level: 2 sigma^2 + 0.05 (DiNa-LRM, arXiv 2602.11146)."""
    return 2 * sigma.square() + 0.05


def ordinal_order(first: Tensor, second: Tensor, probability: Tensor) -> Tensor:
    """OPRM (arXiv 2602.12660): -log P(higher grade), and -log P(same grade) at a tie, which the paper leaves out."""
    above, same = ordered(first, second)
    below = ordered(second, first)[0]
    logs = [p.clamp_min(torch.finfo(p.dtype).tiny).log() for p in (above, below, same)]
    tied = (probability - 0.5).abs() < _TIED
    return -torch.where(tied, logs[2], probability * logs[0] + (1 - probability) * logs[1])


def ordinal_cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy [B] of grades [B, N] against targets [B] in [0, 1], each shared by its two nearest grades.

    So the mean of the target's probabilities is the target itself.
    """
    place = target.clamp(0, 1) * (outputs.shape[-1] - 1)
    lower = place.floor().long().clamp_max(outputs.shape[-1] - 2)
    share = place - lower
    logs = outputs.log_softmax(-1)
    near, next_ = logs.gather(-1, lower[..., None]), logs.gather(-1, lower[..., None] + 1)
    return -((1 - share) * near[..., 0] + share * next_[..., 0])


def entropy(probability: Tensor) -> Tensor:
    """Of a coin, in nats."""
    return -(torch.xlogy(probability, probability) + torch.xlogy(1 - probability, 1 - probability))


@dataclass(frozen=True)
class PairLoss:
    """One of the losses by its name.

    Attributes:
        call: outputs [B, N] of both, probabilities [B], sigma [B], margin to losses [B].
        output: what the head has to say for it.
        about: in a line.
    """

    call: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
    output: OutputKind
    about: str


def _spread(a: Tensor, b: Tensor) -> Tensor:
    return variance_of(a, "gaussian") + variance_of(b, "gaussian")


def _d(a: Tensor, b: Tensor) -> Tensor:
    return a[..., 0] - b[..., 0]


LOSSES: dict[str, PairLoss] = {
    "bradley-terry": PairLoss(
        lambda a, b, p, sigma, by: bradley_terry(_d(a, b), p), "scalar", "cross-entropy of sigmoid(d)"
    ),
    "margin": PairLoss(lambda a, b, p, sigma, by: margin(_d(a, b), p, by), "scalar", "-log sigmoid(d - m)"),
    "win-tie": PairLoss(
        lambda a, b, p, sigma, by: win_tie(_d(a, b), p, by), "scalar", "margin, and ties pulled together"
    ),
    "thurstone-nll": PairLoss(
        lambda a, b, p, sigma, by: thurstone_nll(_d(a, b), 2 * noise_variance(sigma), p),
        "scalar",
        "cross-entropy of Phi(d / s), s by the noise level",
    ),
    "thurstone-fidelity": PairLoss(
        lambda a, b, p, sigma, by: fidelity(_d(a, b), 2 * noise_variance(sigma), p),
        "scalar",
        "fidelity of Phi(d / s), s by the noise level",
    ),
    "gaussian-nll": PairLoss(
        lambda a, b, p, sigma, by: thurstone_nll(_d(a, b), _spread(a, b), p),
        "gaussian",
        "cross-entropy of Phi(d / s), s from the head",
    ),
    "gaussian-fidelity": PairLoss(
        lambda a, b, p, sigma, by: fidelity(_d(a, b), _spread(a, b), p),
        "gaussian",
        "fidelity of Phi(d / s), s from the head",
    ),
    "oprm": PairLoss(
        lambda a, b, p, sigma, by: ordinal_order(a, b, p), "ordinal", "-log of the probability of the order of grades"
    ),
}

"""What a reward head's numbers mean: a score, a score with its variance, or a distribution over ratings."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

_LEAST_VARIANCE = 1e-4


@dataclass(frozen=True)
class RewardOutput:
    """A reward model's opinion of B samples.

    Attributes:
        mean: [B], the score.
        variance: [B], of the score; None where the model gives none.
        log_probs: [B, K], over the ratings of an ordinal output; None otherwise.
        ratings: [K], their values; None otherwise.
    """

    mean: Tensor
    variance: Tensor | None = None
    log_probs: Tensor | None = None
    ratings: Tensor | None = None

    def pick(self, index: Tensor | slice) -> "RewardOutput":
        """The opinion of some of the samples."""
        variance = None if self.variance is None else self.variance[index]
        log_probs = None if self.log_probs is None else self.log_probs[index]
        return RewardOutput(self.mean[index], variance, log_probs, self.ratings)


def scalar(raw: Tensor, ratings: tuple[float, ...] = ()) -> RewardOutput:
    """Scores from raw [B, 1] or [B]."""
    return RewardOutput(raw.squeeze(-1) if raw.ndim == 2 else raw)


def gaussian(raw: Tensor, ratings: tuple[float, ...] = ()) -> RewardOutput:
    """Mean and variance from raw [B, 2]; variance = softplus + 1e-4, which is ours."""
    return RewardOutput(raw[:, 0], F.softplus(raw[:, 1]) + _LEAST_VARIANCE)


def ordinal(raw: Tensor, ratings: tuple[float, ...]) -> RewardOutput:
    """Distribution over K ratings from logits [B, K]; the score is its expectation."""
    values = torch.tensor(ratings, dtype=raw.dtype, device=raw.device)
    log_probs = raw.log_softmax(-1)
    probs = log_probs.exp()
    mean = (probs * values).sum(-1)
    variance = (probs * (values - mean[:, None]) ** 2).sum(-1)
    return RewardOutput(mean, variance, log_probs, values)


OUTPUTS: dict[str, Callable[[Tensor, tuple[float, ...]], RewardOutput]] = {
    "scalar": scalar,
    "gaussian": gaussian,
    "ordinal": ordinal,
}


def joined(parts: list[RewardOutput]) -> RewardOutput:
    """The opinions of several batches as those of one."""
    first = parts[0]
    variances = [p.variance for p in parts if p.variance is not None]
    log_probs = [p.log_probs for p in parts if p.log_probs is not None]
    return RewardOutput(
        torch.cat([p.mean for p in parts]),
        torch.cat(variances) if variances else None,
        torch.cat(log_probs) if log_probs else None,
        first.ratings,
    )


def mixture(parts: list[RewardOutput]) -> RewardOutput:
    """Several opinions of the same samples as one: their equal mixture."""
    if len(parts) == 1:
        return parts[0]
    means = torch.stack([p.mean for p in parts])
    mean, variance, log_probs = means.mean(0), None, None
    variances = [p.variance for p in parts if p.variance is not None]
    if variances:
        variance = torch.stack(variances).mean(0) + means.var(0, correction=0)
    opinions = [p.log_probs for p in parts if p.log_probs is not None]
    if opinions:
        log_probs = torch.stack(opinions).logsumexp(0) - math.log(len(opinions))
    return RewardOutput(mean, variance, log_probs, parts[0].ratings)


def normalised(output: RewardOutput, mean: float, std: float) -> RewardOutput:
    """The opinion on the scale (score - mean) / std."""
    if (mean, std) == (0.0, 1.0):
        return output
    return RewardOutput(
        (output.mean - mean) / std,
        None if output.variance is None else output.variance / std**2,
        output.log_probs,
        None if output.ratings is None else (output.ratings - mean) / std,
    )

"""Reverse matching: policy gradients on the steps that were drawn.

With the old policy's mean mu_old, standard deviation S and noise e of a recorded step, the log-ratio of the step under new
means mu is, exactly,

    log p / p_old = <s, e> - 1/2 |s|^2,   s = (mu - mu_old) / S   (RSM, 2604.17415)

so that a step needs (x, e, prediction) and no likelihood, and is exactly 0 where the predictions are equal.  Published clip
ranges (1e-5 to 1e-3) are for its mean over dimensions, which is the default here; `rollouts.Step.log_ratio` is the sum.
"""

from typing import Literal

from torch import Tensor

from rsm_guidance.core.transitions import Gaussian, exact
from rsm_guidance.training.alignment.time_weights import PLAIN, StepScale

Reduction = Literal["mean", "sum"]


def over_dimensions(x: Tensor, reduction: Reduction) -> Tensor:
    """The mean or sum [R] of x [R, ...]."""
    flat = x.flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)


def log_ratio(shift: Tensor, noise: Tensor, scale: StepScale = PLAIN, reduction: Reduction = "mean") -> Tensor:
    """-M * inner [R], for shifts s [R, ...] and noises e [R, ...]: the log-ratio itself under the plain scale."""
    moved = scale.shift * shift
    terms = moved * noise if scale.linear else moved * (noise - moved / 2)
    return scale.inner * over_dimensions(terms, reduction)


def step_log_ratio(
    new: Gaussian, old: Gaussian, reached: Tensor, scale: StepScale = PLAIN, reduction: Reduction = "mean"
) -> Tensor:
    """`log_ratio` [R] of the latents reached [R, ...] between two laws of equal deviation.

    The noise is read off the latents as they were stored, after their cast: that is the point whose density is compared.
    """
    if old.std == 0 or old.std != new.std:
        raise ValueError(
            f"a log-ratio is between two laws of the same noise; got deviations {new.std} and {old.std}. "
            "Replay the step with the transition and levels that it was recorded with"
        )
    return log_ratio((new.mean - old.mean) / old.std, (exact(reached) - old.mean) / old.std, scale, reduction)

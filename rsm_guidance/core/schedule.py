"""Noise schedules and conversions between what diffusion and flow models predict.

Notation: x_i = alpha_i x0 + sigma_i eps with eps ~ N(0, I).  Level i runs from 0 (noisiest) to N (clean), so
sigma decreases with i.  Flow models have alpha = 1 - sigma, variance-preserving ones alpha^2 + sigma^2 = 1,
variance-exploding ones alpha = 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rsm_guidance.core.rows import per_row

PredictionType = Literal["epsilon", "sample", "v_prediction", "flow", "score"]


@dataclass(frozen=True)
class NoiseSchedule:
    """The levels of one sampling run.

    Attributes:
        alpha: float64 [N + 1], signal coefficients, alpha[N] > 0.
        sigma: float64 [N + 1], noise coefficients, strictly decreasing, sigma[N] >= 0.
        timesteps: float64 [N + 1], what the model is told about each level; the last one belongs to the clean level.
    """

    alpha: Tensor
    sigma: Tensor
    timesteps: Tensor

    def __post_init__(self) -> None:
        for name in ("alpha", "sigma", "timesteps"):
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name), dtype=torch.float64).cpu())
        if not (self.alpha.ndim == 1 and self.alpha.shape == self.sigma.shape == self.timesteps.shape):
            raise ValueError(
                f"alpha, sigma and timesteps must be vectors of one length; got shapes {list(self.alpha.shape)}, "
                f"{list(self.sigma.shape)}, {list(self.timesteps.shape)}"
            )
        if len(self.alpha) < 2 or not bool((self.sigma.diff() < 0).all()) or self.sigma[-1] < 0:
            raise ValueError(f"sigma must fall strictly from noise to data over at least two levels; got {self.sigma}")
        if not bool((self.alpha[1:] > 0).all()) or self.alpha[0] < 0:
            raise ValueError(f"alpha must be positive below the noisiest level; got {self.alpha}")

    @property
    def steps(self) -> int:
        """Number of transitions N; levels are 0..N."""
        return len(self.sigma) - 1

    @property
    def is_flow(self) -> bool:
        """Whether alpha = 1 - sigma at every level (rectified flow)."""
        return bool(torch.allclose(self.alpha + self.sigma, torch.ones_like(self.alpha), atol=1e-6))

    def coefficients(self, level: int) -> tuple[float, float]:
        """(alpha, sigma) at a level in 0..N."""
        if not 0 <= level <= self.steps:
            raise ValueError(
                f"level {level} does not exist; this schedule has levels 0 (noise) to {self.steps} (clean)"
            )
        return float(self.alpha[level]), float(self.sigma[level])

    def add_noise(self, x0: Tensor, eps: Tensor, level: int) -> Tensor:
        """x_i = alpha_i x0 + sigma_i eps; shapes equal."""
        alpha, sigma = self.coefficients(level)
        return alpha * x0 + sigma * eps

    def noise_back(self, x: Tensor, noise: Tensor, level: int, target: int) -> Tensor:
        """x [R, ...] of `level` taken back to the noisier level `target` by the forward process; noise is standard normal."""
        alpha, sigma = self.coefficients(level)
        alpha_back, sigma_back = self.coefficients(target)
        kept = alpha_back / alpha
        return kept * x + math.sqrt(max(sigma_back**2 - (kept * sigma) ** 2, 0.0)) * noise.to(x)

    @staticmethod
    def flow(steps: int, shift: float = 1.0) -> "NoiseSchedule":
        """Rectified flow from sigma = 1 to 0, with the SD3 timestep shift (Esser et al. 2024, eq. 23)."""
        sigma = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        sigma = shift * sigma / (shift * sigma + (1 - sigma))  # exactly 1 and 0 at the ends
        return NoiseSchedule(1 - sigma, sigma, sigma * 1000)

    @staticmethod
    def variance_preserving(steps: int, start: float = 0.05) -> "NoiseSchedule":
        """Cosine schedule alpha = cos, sigma = sin, the noisiest level at alpha = sin(start * pi / 2)."""
        angle = torch.linspace(1 - start, 0, steps + 1, dtype=torch.float64) * torch.pi / 2
        return NoiseSchedule(torch.cos(angle), torch.sin(angle), angle / angle[0] * 999)


@dataclass(frozen=True)
class Prediction:
    """What a denoiser says about x [B, ...] at one level; all tensors of x's shape.

    Attributes:
        x: the noisy latents that were judged.
        x0: the posterior mean of the clean latents (Tweedie).
        eps: the matching noise, x = alpha x0 + sigma eps.
        velocity: eps - x0 where the model predicted it (flow models); None otherwise.
    """

    x: Tensor
    x0: Tensor
    eps: Tensor
    velocity: Tensor | None = None

    def pick(self, index: Tensor) -> "Prediction":
        """The prediction for some rows, in any order and number."""
        velocity = None if self.velocity is None else self.velocity[index]
        return Prediction(self.x[index], self.x0[index], self.eps[index], velocity)

    @staticmethod
    def joined(parts: Sequence["Prediction"]) -> "Prediction":
        """One prediction for the rows of several; the only one as it is."""
        if len(parts) == 1:
            return parts[0]
        velocities = [p.velocity for p in parts if p.velocity is not None]
        return Prediction(
            torch.cat([p.x for p in parts]),
            torch.cat([p.x0 for p in parts]),
            torch.cat([p.eps for p in parts]),
            torch.cat(velocities) if velocities else None,
        )


def to_prediction(x: Tensor, output: Tensor, alpha: float, sigma: float, kind: PredictionType) -> Prediction:
    """Read a model output as x0 and eps.

    Args:
        x: noisy latents [B, ...] at (alpha, sigma).
        output: model output, x's shape.
        kind: "epsilon", "sample" (x0), "v_prediction" (alpha eps - sigma x0; Salimans & Ho 2022), "flow" (eps - x0) or
            "score" (-eps / sigma).

    Raises:
        ValueError: for an unknown kind, or where the conversion divides by zero (x0 from epsilon at alpha = 0, eps
            from x0 at sigma = 0).
    """
    if x.shape != output.shape:
        raise ValueError(f"the model output has shape {list(output.shape)}, the latents {list(x.shape)}")
    if kind == "flow":
        total = alpha + sigma
        if abs(total - 1) < 1e-9:
            return Prediction(x, x - sigma * output, x + alpha * output, output)
        return Prediction(x, (x - sigma * output) / total, (x + alpha * output) / total, output)
    if kind == "v_prediction":
        norm = alpha**2 + sigma**2
        return Prediction(x, (alpha * x - sigma * output) / norm, (sigma * x + alpha * output) / norm)
    if kind == "sample":
        if sigma == 0:
            raise ValueError("eps cannot be recovered from x0 at sigma = 0; the clean level needs no prediction")
        return Prediction(x, output, (x - alpha * output) / sigma)
    if kind in ("epsilon", "score"):
        if alpha == 0:
            raise ValueError(f"x0 cannot be recovered from {kind} at alpha = 0; use a flow or sample prediction there")
        eps = output if kind == "epsilon" else -sigma * output
        return Prediction(x, (x - sigma * eps) / alpha, eps)
    raise ValueError(f"unknown prediction type {kind!r}; choose epsilon, sample, v_prediction, flow or score")


def times_rows(x: Tensor, factor: Tensor) -> Tensor:
    """x [R, ...] times a float64 factor [R] per row, rounded as x times a Python number is."""
    wide = x.float() if x.dtype.itemsize < 4 else x
    return (wide * per_row(factor.to(wide.dtype), wide)).to(x.dtype)


def to_prediction_rows(x: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor, kind: PredictionType) -> Prediction:
    """`to_prediction` for rows at levels of their own: alpha and sigma are float64 [R] on the CPU."""
    if x.shape != output.shape:
        raise ValueError(f"the model output has shape {list(output.shape)}, the latents {list(x.shape)}")

    def over(y: Tensor, divisor: Tensor) -> Tensor:
        wide = y.float() if y.dtype.itemsize < 4 else y
        return (wide / per_row(divisor.to(wide.dtype), wide)).to(y.dtype)

    if kind == "flow":
        total = alpha + sigma
        total = torch.where((total - 1).abs() < 1e-9, 1.0, total)
        x0, eps = x - times_rows(output, sigma), x + times_rows(output, alpha)
        return Prediction(x, over(x0, total), over(eps, total), output)
    if kind == "v_prediction":
        norm = alpha**2 + sigma**2
        x0 = times_rows(x, alpha) - times_rows(output, sigma)
        return Prediction(x, over(x0, norm), over(times_rows(x, sigma) + times_rows(output, alpha), norm))
    if kind == "sample":
        if bool((sigma == 0).any()):
            raise ValueError("eps cannot be recovered from x0 at sigma = 0; the clean level needs no prediction")
        return Prediction(x, output, over(x - times_rows(output, alpha), sigma))
    if kind in ("epsilon", "score"):
        if bool((alpha == 0).any()):
            raise ValueError(f"x0 cannot be recovered from {kind} at alpha = 0; use a flow or sample prediction there")
        eps = output if kind == "epsilon" else -times_rows(output, sigma)
        return Prediction(x, over(x - times_rows(eps, sigma), alpha), eps)
    raise ValueError(f"unknown prediction type {kind!r}; choose epsilon, sample, v_prediction, flow or score")


def from_prediction(prediction: Prediction, alpha: float, sigma: float, kind: PredictionType) -> Tensor:
    """The model output of a given kind that says what `prediction` says; inverse of `to_prediction`."""
    p = prediction
    outputs = {
        "epsilon": lambda: p.eps,
        "sample": lambda: p.x0,
        "v_prediction": lambda: alpha * p.eps - sigma * p.x0,
        "flow": lambda: p.eps - p.x0,
        "score": lambda: -p.eps / sigma,
    }
    if kind not in outputs:
        raise ValueError(f"unknown prediction type {kind!r}; choose one of {', '.join(outputs)}")
    if kind == "score" and sigma == 0:
        raise ValueError("the score is infinite at sigma = 0; the clean level needs no prediction")
    return outputs[kind]()

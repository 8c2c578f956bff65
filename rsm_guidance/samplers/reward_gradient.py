"""Reward-gradient guidance: every step is pushed along the gradient of the value; no particles.

With g = grad V(x_t), of a model that judges noisy latents (no decode) or of a reward of the denoiser's estimate with or
without the denoiser's Jacobian (DPS / Universal Guidance against MPGD, see `gradients`), the next state is

- `mean`: x' = mu + s z + strength u g / rms(g);
- `noise`: x' = mu + s (sqrt(1 - strength^2) z + strength g / rms(g)), the mean untouched (NTRK, arXiv 2606.18066).

The scale is automatic: rms(g) is the root mean square over a latent, and u the transition's own standard deviation s, or
sigma_t - sigma_t' where the step is deterministic, so that `strength` counts in steps of the sampler, whatever the reward's
units.  (This normalisation is ours; FreeDoM and MPGD normalise by the size of classifier-free guidance.)  `recurrence`
repeats a level, noised back by the forward process (FreeDoM's time travel, Universal Guidance).  A biased maximiser: it
follows no target distribution.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import Gaussian, Transition
from rsm_guidance.samplers.base import (
    Interrupted,
    Problem,
    SamplerOutput,
    check_deadline,
    finished,
    interruptible,
    new_trace,
)
from rsm_guidance.samplers.gradients import value_and_gradient


@dataclass(frozen=True)
class RewardGradient:
    """Guidance by the gradient of the value.

    Attributes:
        strength: size of the push, in standard deviations of a step per dimension; in [0, 1] for `noise`.
        push: what is pushed, the "mean" or the "noise" of the step.
        window: noise levels (low, high) as fractions of the noisiest sigma in which the gradient is followed.
        recurrence: times that each level of the window is repeated, >= 1.
        jacobian: differentiate through the denoiser, where the value reads its estimate.
        transition: how to step.
    """

    name: ClassVar[str] = "reward-gradient"
    strength: float = 0.2
    push: Literal["mean", "noise"] = "mean"
    window: tuple[float, float] = (0.0, 1.0)
    recurrence: int = 1
    jacobian: bool = True
    transition: Transition = Transition("cps", 0.9)

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf or (self.push == "noise" and self.strength > 1):
            raise ValueError(
                f"strength must be finite and at least 0, with push='noise' at most 1; got {self.strength}"
            )
        if self.push not in ("mean", "noise"):
            raise ValueError(f"push must be 'mean' or 'noise'; got {self.push!r}")
        if not 0 <= self.window[0] < self.window[1] <= 1:
            raise ValueError(f"window must be (low, high) with 0 <= low < high <= 1; got {self.window}")
        if self.recurrence < 1:
            raise ValueError(f"recurrence must be at least 1; got {self.recurrence}")
        if self.transition.kind == "scheduler" or (self.push == "noise" and self.transition.kind == "ode"):
            raise ValueError(
                f"the transition {self.transition.kind!r} cannot be pushed so; choose ddim, cps or flow_sde"
            )

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image: `recurrence` denoiser evaluations and value evaluations with a backward pass at each level of the
        window, one denoiser evaluation elsewhere.

        When the budget no longer reaches for more, the run goes on unguided.
        """
        if problem.value is None:
            raise ValueError(
                "the sampler 'reward-gradient' follows the gradient of a value: pass a differentiable reward or value model"
            )
        problem.require_budget()
        schedule, trace = problem.denoiser.schedule, new_trace(self, problem)
        x, rows = problem.initial(0), problem.rows
        estimate: Tensor | None = None
        try:
            with interruptible(problem):
                for level in range(schedule.steps):
                    repeats = self.recurrence if self._guides(schedule, level) else 1
                    for repeat in range(repeats):
                        check_deadline(problem)
                        scores = None
                        if self._guides(schedule, level) and self._affordable(problem, level):
                            prediction, scores, gradient = value_and_gradient(problem, x, level, rows, self.jacobian)
                        else:
                            prediction, gradient = problem.denoiser.predict(x, level, rows), torch.zeros_like(x)
                        estimate = prediction.x0
                        gaussian = self.transition(prediction, schedule, level, level + 1)
                        x = self._push(problem, gaussian, gradient, level, repeat)
                        if repeat + 1 < repeats:
                            x = self._back(problem, x, level, repeat)
                    if scores is not None:
                        trace["levels"].append(
                            {"level": level, "scores": scores[:, None].tolist(), "chosen": [0] * len(x)}
                        )
                    problem.report(level, prediction.x0, None if scores is None else scores[:, None])
        except Interrupted:
            if estimate is None:
                raise
            return finished(problem, estimate, trace)
        return finished(problem, x, trace)

    def _guides(self, schedule: NoiseSchedule, level: int) -> bool:
        low, high = self.window
        inside = low <= float(schedule.sigma[level] / schedule.sigma[0]) <= high
        informed = float(schedule.alpha[level]) > 0  # pure noise says nothing of the image: its gradient is rounding
        return self.strength > 0 and inside and informed and level + 1 < schedule.steps

    def _affordable(self, problem: Problem, level: int) -> bool:
        denoiser, value = problem.denoiser, problem.value
        assert value is not None
        extra = 0.0 if value.reads_prediction else value.evaluations_per_row
        rest = (denoiser.steps - level) * denoiser.evaluations_per_row + problem.final_cost + extra
        calls = value.reward_calls_per_row + problem.final_calls
        return problem.affords(rest * problem.count, calls * problem.count)

    def _push(self, problem: Problem, gaussian: Gaussian, gradient: Tensor, level: int, repeat: int) -> Tensor:
        schedule = problem.denoiser.schedule
        size = gradient.flatten(1).double().square().mean(1).sqrt().clamp(min=1e-300)
        direction = (gradient / size.view(-1, *[1] * (gradient.ndim - 1))).to(gradient)
        if self.push == "noise" and gaussian.std > 0:
            plain = problem.step(gaussian, level, [0], child=repeat)
            noise = (plain - gaussian.mean) / gaussian.std
            tilted = math.sqrt(1 - self.strength**2) * noise + self.strength * direction
            still = (gradient == 0).flatten(1).all(1).view(-1, *[1] * (gradient.ndim - 1))
            return torch.where(still, plain, gaussian.mean + gaussian.std * tilted)
        unit = gaussian.std or float(schedule.sigma[level] - schedule.sigma[level + 1])
        return problem.step(gaussian, level, [0], child=repeat) + self.strength * unit * direction

    def _back(self, problem: Problem, x: Tensor, level: int, repeat: int) -> Tensor:
        """Noise a state of level + 1 back to `level`, by the forward process."""
        schedule = problem.denoiser.schedule
        alpha, sigma = schedule.coefficients(level)
        alpha_next, sigma_next = schedule.coefficients(level + 1)
        kept = alpha / alpha_next
        std = math.sqrt(max(sigma**2 - (kept * sigma_next) ** 2, 0.0))
        noise = [problem.streams.normal(r, x.shape[1:], "back", level, repeat) for r in range(problem.count)]
        return kept * x + std * torch.stack(noise).to(x)

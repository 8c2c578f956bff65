"""Reward-gradient guidance: every step is pushed along the gradient of the value; no particles.

g = grad V(x_t), of a model that judges noisy latents (no decode) or of a reward of the denoiser's estimate with or without
the denoiser's Jacobian (DPS, Universal Guidance; MPGD), see `gradients`; the estimate may be smoothed (LGD) or looked ahead,
see `values`.  Classifier-free guidance comes first, inside the prediction.  With the base step x' = mu + s z:

- `mean`: x' = mu + s z + strength u d, with u = s, or sigma_t - sigma_t' where the step is deterministic (ours);
- `drift`: x' = mu + s z + strength g / |g|, the norm over the whole latent (Euphonium, arXiv 2602.04928);
- `noise`: x' = mu + s (sqrt(1 - strength^2) z + strength d), the mean untouched (NTRK, arXiv 2606.18066);
- `velocity`: the prediction is tilted, eps' = eps - strength d, and with it x0' and the velocity; for flow models with the
  plain gradient this is v' = v - strength sigma / alpha g (Flow-NRG, VideoAlign, arXiv 2501.13918).

d is g / rms(g), the root mean square over a latent, so that the scale is automatic: `strength` counts in steps of the
sampler, whatever the reward's units (ours; FreeDoM and MPGD match the size of classifier-free guidance).  `scale="plain"`
takes d = sigma g for `velocity`, which with strength 1 / lambda and the exact V is exact guidance to p(x0) exp(r / lambda) / Z,
and d = s g for the others (strength 1 / lambda: the proposal of twisted SMC), at most `largest` per dimension.
`recurrence` repeats a level, noised back by the forward process (FreeDoM's time travel, Universal Guidance).
With automatic scale a biased maximiser: it follows no target distribution.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.rows import rows_where, scaled
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.samplers.base import (
    Interrupted,
    Problem,
    SamplerOutput,
    check_deadline,
    finished,
    finished_best,
    interruptible,
    new_trace,
)
from rsm_guidance.samplers.gradients import gradient_cost, value_and_gradient


@dataclass(frozen=True)
class RewardGradient:
    """Guidance by the gradient of the value.

    Attributes:
        strength: size of the push; with automatic scale in standard deviations of a step per dimension; in [0, 1] for
            `noise`.
        push: what is pushed, the "mean", the "drift", the "noise" or the "velocity".
        scale: "auto" or "plain".
        largest: bound on the root mean square of a plain d.
        window: noise levels (low, high) as fractions of the noisiest sigma in which the gradient is followed.
        recurrence: times that each level of the window is repeated, >= 1.
        trajectories: independent guided runs per image, of which the final judge picks one.
        jacobian: differentiate through the denoiser, where the value reads its estimate.
        checkpoint: recompute activations on the way back instead of keeping them: less memory, a forward pass more.
        transition: how to step.
    """

    name: ClassVar[str] = "reward-gradient"
    scales: ClassVar[str | None] = "trajectories"
    strength: float = 0.2
    push: Literal["mean", "drift", "noise", "velocity"] = "mean"
    scale: Literal["auto", "plain"] = "auto"
    largest: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    recurrence: int = 1
    trajectories: int = 1
    jacobian: bool = True
    checkpoint: bool = False
    transition: Transition = Transition("cps", 0.9)

    def __post_init__(self) -> None:
        if not 0 <= self.strength < math.inf or (self.push == "noise" and self.strength > 1):
            raise ValueError(
                f"strength must be finite and at least 0, with push='noise' at most 1; got {self.strength}"
            )
        for name, known in (("push", ("mean", "drift", "noise", "velocity")), ("scale", ("auto", "plain"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.scale == "plain" and self.push in ("drift", "noise"):
            raise ValueError(
                f"push={self.push!r} is normalised by definition; use scale='auto', or push another quantity"
            )
        if not 0 < self.largest:
            raise ValueError(f"largest must be positive; got {self.largest}")
        if not 0 <= self.window[0] < self.window[1] <= 1:
            raise ValueError(f"window must be (low, high) with 0 <= low < high <= 1; got {self.window}")
        for name in ("recurrence", "trajectories"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.transition.kind in ("scheduler", "glass") or (self.push == "noise" and self.transition.kind == "ode"):
            raise ValueError(
                f"the transition {self.transition.kind!r} cannot be pushed so; choose ddim, cps or flow_sde"
            )

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image and run: at each level of the window `recurrence` denoiser and value evaluations with a backward
        pass, one denoiser evaluation elsewhere.

        A budget lowers the number of runs.  When it no longer reaches for a gradient, the run goes on unguided.  A row
        whose gradient is not finite takes its step unguided, and half the strength from then on.
        """
        if self.strength > 0 and problem.value is None:
            raise ValueError(
                "the sampler 'reward-gradient' follows the gradient of a value: pass a differentiable reward or value model"
            )
        if self.trajectories > 1:
            problem.require_judge(self.name)
        problem.require_budget()
        problem.denoiser.checkpointing = self.checkpoint
        schedule, trace = problem.denoiser.schedule, new_trace(self, problem)
        slots = list(range(self._runs(problem)))
        rows = problem.rows.repeat(len(slots))  # latents are run-major, [R * B, ...]
        x = torch.cat([problem.initial(c) for c in slots]) if len(slots) > 1 else problem.initial(0)
        strength = torch.full((len(x),), self.strength, dtype=torch.float64)
        estimate: Tensor | None = None
        try:
            with interruptible(problem):
                for level in range(schedule.steps):
                    check_deadline(problem)
                    guides = self._guides(schedule, level)
                    scores: Tensor | None = None
                    for repeat in range(self.recurrence):
                        if guides and self._affordable(problem, level, len(slots)):
                            prediction, scores, gradient = value_and_gradient(problem, x, level, rows, self.jacobian)
                            lost = gradient.flatten(1).isnan().any(1)
                            strength = torch.where(lost, strength / 2, strength)
                            gradient = rows_where(lost, torch.zeros_like(x), gradient)
                        else:
                            prediction, gradient = problem.denoiser.predict(x, level, rows), torch.zeros_like(x)
                        estimate = prediction.x0
                        x = self._push(problem, prediction, gradient, strength, level, repeat, slots)
                        if (
                            not guides
                            or repeat + 1 == self.recurrence
                            or not self._affordable(problem, level, len(slots))
                        ):
                            break
                        x = self._back(problem, x, level, repeat, slots)
                    if scores is not None:
                        by_row = scores.view(len(slots), problem.count).T
                        entry = {"level": level, "scores": by_row.tolist(), "chosen": [0] * problem.count}
                        trace["levels"].append(entry | {"strength": strength.view(len(slots), -1).T.tolist()})
                    problem.report(level, prediction.x0, None if scores is None else by_row)
                rewards = problem.final_rewards(x, rows) if len(slots) > 1 else None
        except Interrupted:
            if estimate is None:
                raise
            return finished(problem, estimate[: problem.count], trace)
        return finished_best(problem, x, rewards, trace)

    def _guides(self, schedule: NoiseSchedule, level: int) -> bool:
        low, high = self.window
        inside = low <= float(schedule.sigma[level] / schedule.sigma[0]) <= high
        informed = float(schedule.alpha[level]) > 0  # pure noise says nothing of the image: its gradient is rounding
        return self.strength > 0 and inside and informed and level + 1 < schedule.steps

    def _runs(self, problem: Problem) -> int:
        if self.trajectories == 1 or problem.value is None:
            return self.trajectories
        schedule, each = problem.denoiser.schedule, problem.denoiser.evaluations_per_row
        levels = sum(self._guides(schedule, level) for level in range(schedule.steps))
        own = gradient_cost(problem, self.jacobian) - problem.value_cost
        guided, repeated = levels * self.recurrence, levels * (self.recurrence - 1)
        return problem.affordable(self.trajectories, guided, guided * own + repeated * each)

    def _affordable(self, problem: Problem, level: int, runs: int) -> bool:
        denoiser, value = problem.denoiser, problem.value
        assert value is not None
        rest = (denoiser.steps - level) * denoiser.evaluations_per_row + problem.final_cost
        rest += gradient_cost(problem, self.jacobian)
        calls = value.reward_calls_per_row + problem.final_calls
        return problem.affords(rest * problem.count * runs, calls * problem.count * runs)

    def _push(
        self,
        problem: Problem,
        prediction: Prediction,
        gradient: Tensor,
        strength: Tensor,
        level: int,
        repeat: int,
        slots: list[int],
    ) -> Tensor:
        """The next latents [R * B, ...]; rows without a gradient take the unguided step, bit for bit."""
        schedule = problem.denoiser.schedule
        gaussian = self.transition(prediction, schedule, level, level + 1)
        plain = problem.step(gaussian, level, slots, child=repeat)
        moved = (gradient != 0).flatten(1).any(1)
        if not bool(moved.any()):
            return plain
        size = gradient.flatten(1).double().square().mean(1).sqrt().clamp(min=1e-300)
        unit = gaussian.std or float(schedule.sigma[level] - schedule.sigma[level + 1])
        if self.scale == "plain":
            raw = size * (schedule.coefficients(level)[1] if self.push == "velocity" else unit)
            length = strength * raw * (self.largest / (strength * raw)).clamp(max=1.0)
        elif self.push == "drift":
            length = strength / gradient[0].numel() ** 0.5
        else:
            length = strength
        direction = scaled(gradient, length / size)
        if self.push == "velocity":
            tilted = self._tilted(prediction, direction, schedule, level)
            guided = problem.step(self.transition(tilted, schedule, level, level + 1), level, slots, child=repeat)
        elif self.push == "noise" and gaussian.std > 0:
            noise = (plain - gaussian.mean) / gaussian.std
            guided = gaussian.mean + gaussian.std * (scaled(noise, (1 - strength**2).sqrt()) + direction)
        else:
            guided = plain + (1.0 if self.push == "drift" else unit) * direction
        return rows_where(moved, guided, plain)

    def _tilted(self, p: Prediction, direction: Tensor, schedule: NoiseSchedule, level: int) -> Prediction:
        """The prediction under the tilted law: eps - d, and what follows from it for x0 and the velocity."""
        alpha, sigma = schedule.coefficients(level)
        eps, x0 = p.eps - direction, p.x0 + sigma / alpha * direction
        return Prediction(p.x, x0, eps, None if p.velocity is None else eps - x0)

    def _back(self, problem: Problem, x: Tensor, level: int, repeat: int, slots: list[int]) -> Tensor:
        """Noise a state of level + 1 back to `level`, by the forward process."""
        names = [("back", level, repeat) if slot == 0 else ("back", level, repeat, slot) for slot in slots]
        noise = [problem.streams.normal(r, x.shape[1:], *n) for n in names for r in range(problem.count)]
        return problem.denoiser.schedule.noise_back(x, torch.stack(noise), level + 1, level)

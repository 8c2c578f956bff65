"""Reward-gradient guidance: every step is pushed along the gradient of the value; no particles.

g = grad V(x_t), of a model that judges noisy latents (no decode) or of a reward of the denoiser's estimate with or without
the denoiser's Jacobian (DPS, Universal Guidance; MPGD), see `gradients`; the estimate may be smoothed (LGD) or looked ahead,
see `values`.  Classifier-free guidance comes first, inside the prediction.  With the base step x' = mu + s z:

- `mean`: x' = mu + s z + strength u d, with u = s, or sigma_t - sigma_t' where the step is deterministic (ours);
- `drift`: x' = mu + s z + strength g / |g|, the norm over the whole latent (Euphonium, arXiv 2602.04928);
- `noise`: x' = mu + s (sqrt(1 - strength^2) z + strength d), the mean untouched (NTRK, arXiv 2606.18066);
- `velocity`: the prediction is tilted, eps' = eps - strength d, and with it x0' and the velocity; for flow models with the
  plain gradient this is v' = v - strength t / (1 - t) g at t = sigma (Flow-NRG, VideoAlign, arXiv 2501.13918, which takes
  strength 100 and no bound).

d is g / rms(g), the root mean square over a latent, so that the scale is automatic: `strength` counts in steps of the
sampler, whatever the reward's units (ours; FreeDoM and MPGD match the size of classifier-free guidance).  `scale="plain"`
takes d = sigma g for `velocity`, which with strength 1 / lambda and the exact V is exact guidance to p(x0) exp(r / lambda) / Z,
and d = s g for the others (strength 1 / lambda: the proposal of twisted SMC), at most `largest` per dimension.

A plug-in estimate V = r(E[x0 | x_t]) is steeper than the exact V, and following it over-optimises (arXiv 2606.02884).
`damping` c divides the strength by 1 + c strength Var(x0 | x_t), the variance taken along the gradient (`gradients`; the paper
takes that of Gaussian data).  It is exact for Gaussian data and a reward of curvature c, such as c / 2 times the paper's
-|x - m|^2 (c = 2); elsewhere a heuristic.  (The estimate of the variance is ours.)

`recurrence` repeats a level, noised back by the forward process (FreeDoM's time travel, Universal Guidance).
With automatic scale a biased maximiser: it follows no target distribution.  That is why it steps by `cps` unless told otherwise;
guidance to the tilted law needs a transition that keeps marginals.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.random import Purpose
from rsm_guidance.core.rows import rows_where, scaled
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import CPS, GaussianTransition, exact, require_gaussian
from rsm_guidance.samplers import kernel
from rsm_guidance.samplers.gradients import value_and_gradient
from rsm_guidance.samplers.kernel import Info, Kernel, State, first_of, table
from rsm_guidance.samplers.task import Task

_PUSHES = ("mean", "drift", "noise", "velocity")


@dataclass(frozen=True)
class RewardGradient(Kernel):
    """Guidance by the gradient of the value.

    Attributes:
        strength: size of the push; with automatic scale in standard deviations of a step per dimension; in [0, 1] for
            `noise`.
        push: what is pushed, the "mean", the "drift", the "noise" or the "velocity".
        scale: "auto" or "plain".
        largest: bound on the root mean square of a plain d; None for no bound.
        damping: curvature c >= 0 of the reward, against over-optimisation by plug-in estimates; plain scale only.
        window: noise levels (low, high) as fractions of the noisiest sigma in which the gradient is followed.
        recurrence: times that each level of the window is repeated, >= 1.
        trajectories: independent guided runs per image, of which the final judge picks one.
        jacobian: differentiate through the denoiser, where the value reads its estimate.
        checkpoint: recompute activations on the way back instead of keeping them: less memory, a forward pass more.
        transition: how to step.
    """

    name: ClassVar[str] = "reward-gradient"
    budget_field: ClassVar[str | None] = "trajectories"
    strength: float = 0.2
    push: Literal["mean", "drift", "noise", "velocity"] = "mean"
    scale: Literal["auto", "plain"] = "auto"
    largest: float | None = 1.0
    damping: float = 0.0
    window: tuple[float, float] = (0.0, 1.0)
    recurrence: int = 1
    trajectories: int = 1
    jacobian: bool = True
    checkpoint: bool = False
    transition: GaussianTransition = CPS(0.9)

    def __post_init__(self) -> None:
        kernel.finite(self, "strength", "damping")
        if self.push == "noise" and self.strength > 1:
            raise ValueError(f"strength must be at most 1 with push='noise'; got {self.strength}")
        kernel.one_of(self, push=_PUSHES, scale=("auto", "plain"))
        if self.scale == "plain" and self.push in ("drift", "noise"):
            raise ValueError(
                f"push={self.push!r} is normalised by definition; use scale='auto', or push another quantity"
            )
        if self.damping and self.scale != "plain":
            raise ValueError("damping counts in the reward's units, which scale='auto' drops; use scale='plain'")
        if self.largest is not None and not 0 < self.largest < math.inf:
            raise ValueError(f"largest must be positive and finite, or None for no bound; got {self.largest}")
        kernel.check_window(self.window)
        kernel.at_least(self, 1, "recurrence", "trajectories")
        require_gaussian(self.transition, "it cannot be pushed so", noisy=self.push == "noise")

    def check(self, task: Task) -> None:
        if self.strength > 0 and task.value is None:
            raise ValueError(
                "the sampler 'reward-gradient' follows the gradient of a value: pass a differentiable reward or value model"
            )
        if self.trajectories > 1:
            kernel.require(self, task)

    def init(self, task: Task) -> State:
        """Cost per image and run: at each level of the window `recurrence` denoiser and value evaluations with a backward
        pass, one denoiser evaluation elsewhere.

        A `State` holds one candidate for each of the runs.  A candidate whose gradient is not finite takes its step unguided,
        and half the strength from then on.
        """
        task.denoiser.checkpointing = self.checkpoint
        strength = torch.full((task.count, self.trajectories), self.strength, dtype=torch.float64)
        x = task.initial(*range(self.trajectories))
        return State(x, self.trajectories, carried={"strength": strength})

    def step(self, task: Task, state: State, jump: tuple[int, int]) -> tuple[State, Info]:
        level, k = jump[0], state.k
        if not self._guides(task.schedule, level):
            return self.unguided(task, state, jump)
        x, strength, rows = state.x, state.carried["strength"].flatten(), task.rows_of(k)
        for repeat in range(self.recurrence):
            if repeat:
                x = self._back(task, x, level, repeat - 1, k)
            prediction, scores, gradient, variance = value_and_gradient(task, x, level, rows, self.jacobian)
            lost = gradient.flatten(1).isnan().any(1).cpu()
            strength = torch.where(lost, strength / 2, strength)
            gradient = rows_where(lost, torch.zeros_like(x), gradient)
            noise = task.noise(rows, x.shape[1:], level, [*range(k)] * task.count, repeat)
            x = self.pushed(task.schedule, prediction, gradient, self._damped(strength, variance), jump, noise)
        by_row, left = table(scores, k), table(strength, k)
        state = State(x, k, prediction.x0, carried={"strength": left})
        record = {"chosen": [0] * task.count, "strength": left}
        return state, Info(level, first_of(prediction.x0, k), by_row, level, record)

    def _guides(self, schedule: NoiseSchedule, level: int) -> bool:
        informed = float(schedule.alpha[level]) > 0  # pure noise says nothing of the image: its gradient is rounding
        inside = kernel.in_window(self.window, schedule, level)
        last = level + 1 == schedule.steps and self.push != "velocity"  # has no noise, by which a push is measured
        return self.strength > 0 and inside and informed and not last

    def _damped(self, strength: Tensor, variance: Tensor | None) -> Tensor:
        """The strengths [R] under the variances [R] of the estimates."""
        if not self.damping:
            return strength
        if variance is None:
            raise ValueError(
                "damping makes up for estimates of the clean latents; this value judges noisy latents or looks further: leave "
                "damping at 0, or pass value='tweedie'"
            )
        return strength / (1 + self.damping * strength * variance)

    def pushed(
        self,
        schedule: NoiseSchedule,
        prediction: Prediction,
        gradient: Tensor,
        strength: Tensor,
        jump: tuple[int, int],
        noise: Tensor,
    ) -> Tensor:
        """The next latents [R, ...]; those without a gradient take the unguided step, bit for bit.

        Args:
            schedule: the levels.
            prediction: of the latents [R, ...].
            gradient: of the value [R, ...].
            strength: of every latent [R].
            jump: the levels (from, to).
            noise: of the step [R, ...].
        """
        level = jump[0]
        gaussian = self.transition(prediction, schedule, *jump)
        plain = gaussian.sample(noise)
        moved = (gradient != 0).flatten(1).any(1)
        if not bool(moved.any()):
            return plain
        size = gradient.flatten(1).double().square().mean(1).sqrt().clamp(min=1e-300)
        unit = gaussian.std or float(schedule.sigma[level] - schedule.sigma[level + 1])
        strength = strength.to(size.device)
        if self.scale == "plain":
            raw = size * (schedule.coefficients(level)[1] if self.push == "velocity" else unit)
            length = strength * raw if self.largest is None else (strength * raw).clamp(max=self.largest)
        elif self.push == "drift":
            length = strength / gradient[0].numel() ** 0.5
        else:
            length = strength
        direction = scaled(exact(gradient), length / size)
        if self.push == "velocity":
            tilted = self._tilted(prediction, direction.to(gradient), schedule, level)
            guided = self.transition(tilted, schedule, *jump).sample(noise)
        elif self.push == "noise" and gaussian.std > 0:
            noise = noise.to(direction)
            guided = gaussian.mean + gaussian.std * (scaled(noise, (1 - strength**2).sqrt()) + direction)
        else:
            guided = exact(plain) + (1.0 if self.push == "drift" else unit) * direction
        return rows_where(moved, guided.to(plain), plain)

    def _tilted(self, p: Prediction, direction: Tensor, schedule: NoiseSchedule, level: int) -> Prediction:
        """The prediction under the tilted law: eps - d, and what follows from it for x0 and the velocity."""
        alpha, sigma = schedule.coefficients(level)
        eps, x0 = p.eps - direction, p.x0 + sigma / alpha * direction
        return Prediction(p.x, x0, eps, None if p.velocity is None else eps - x0)

    def _back(self, task: Task, x: Tensor, level: int, repeat: int, k: int) -> Tensor:
        """Noise latents [B * K, ...] of level + 1 back to `level`, by the forward process."""
        names = [(Purpose.BACK, level, repeat, c) for c in range(k)] * task.count
        noise = task.named_noise(task.rows_of(k), x.shape[1:], names)
        return task.schedule.noise_back(x, noise, level + 1, level)

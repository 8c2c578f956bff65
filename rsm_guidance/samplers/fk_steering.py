"""Feynman-Kac steering: particles weighted by what becomes of them (arXiv 2501.06848).

K particles follow the base model's transition p(x' | x).  At some levels each gets the log-potential log G_t, made of
its values V_t = V(x_t), and prompts whose effective sample size has fallen are resampled.  With phi_t = gamma_t V_t / lambda:

- `difference`: log G_t = phi_t - phi_{t-1};
- `max`: log G_t = max over s <= t of phi_s;    `sum`: log G_t = sum over s <= t of phi_s.

The last potential is r(x0) / lambda minus all earlier ones, so that the product is exp(r(x0) / lambda) for every choice, and the
weighted particles target p(x0) exp(r(x0) / lambda) / Z exactly as K grows, whatever the values are; good values only lower
the variance.  gamma_t in [0, 1] tempers the early, unreliable values; `adaptive` raises it per prompt as far as the
effective sample size allows (bisection), which biases Z by its dependence on the particles, at order 1/K.

Systematic resampling by these masses at every level (threshold 1) is VASR (arXiv 2604.06779): its mass w_t exp(r_t), with
weights carried relative to it, is the `difference` potential in other words.

Unlike the published code, weights are carried when no resampling is due, are never clamped, and count at the last step.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.resampling import SCHEMES, Scheme
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.core.weights import effective_sample_size
from rsm_guidance.samplers.base import (
    Interrupted,
    Problem,
    SamplerOutput,
    check_deadline,
    finished,
    interruptible,
    new_trace,
)
from rsm_guidance.samplers.particles import Particles, conclude

_BISECTIONS = 40


@dataclass(frozen=True)
class FKSteering:
    """Feynman-Kac steering.

    Attributes:
        particles: K >= 1 per prompt; particle 0 starts where the unguided run starts.
        temperature: lambda > 0 of the target p(x0) exp(r(x0) / lambda).
        potential: how values become weights.
        tempering: "none" (gamma = 1), "polynomial" (gamma = progress ^ `power`) or "adaptive".
        power: exponent of polynomial tempering, > 0.
        threshold: resample below this share of K of effective particles, in (0, 1]; 1 resamples whenever weights differ.
        resampling: scheme.
        interval: weigh every so many levels.
        window: noise levels (low, high) as fractions of the noisiest sigma in which particles are weighed.
        transition: how to step; a stochastic one, or duplicates stay duplicates.
        returned: "best" returns the particle of highest reward, "sample" draws one by weight, a sample of the target.
    """

    name: ClassVar[str] = "fk-steering"
    scales: ClassVar[str | None] = "particles"
    particles: int = 4
    temperature: float = 1.0
    potential: Literal["difference", "max", "sum"] = "difference"
    tempering: Literal["none", "polynomial", "adaptive"] = "polynomial"
    power: float = 1.0
    threshold: float = 0.5
    resampling: Scheme = "systematic"
    interval: int = 2
    window: tuple[float, float] = (0.0, 1.0)
    transition: Transition = Transition("cps", 0.9)
    returned: Literal["best", "sample"] = "best"

    def __post_init__(self) -> None:
        for name in ("particles", "interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("temperature", "power"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is a share of the particles, in (0, 1]; got {self.threshold}")
        if not 0 <= self.window[0] < self.window[1] <= 1:
            raise ValueError(f"window must be (low, high) with 0 <= low < high <= 1; got {self.window}")
        for name, known in (
            ("potential", ("difference", "max", "sum")),
            ("tempering", ("none", "polynomial", "adaptive")),
            ("resampling", tuple(SCHEMES)),
            ("returned", ("best", "sample")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if not self.transition.stochastic and self.particles > 1:
            raise ValueError(
                "particles need a stochastic transition (ddim, cps, flow_sde, glass): copies would stay copies"
            )

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image: K times an unguided sample, and K value evaluations at each weighed level (free of denoiser
        evaluations where the value reads the prediction, which the next step needs anyway).

        A budget lowers K.  At the deadline or on Ctrl-C the estimate of the heaviest particle is returned.
        """
        if self.particles > 1:
            problem.require_judge(self.name)
        problem.require_budget()
        schedule = problem.denoiser.schedule
        levels = self._weighed(schedule)
        trace = new_trace(self, problem)
        k = problem.affordable(self.particles, len(levels))
        starts = [problem.initial(c) for c in range(k)]
        group = Particles(problem, k, starts[0] if k == 1 else torch.cat(starts))
        slots = list(range(k))
        zero = torch.zeros(problem.count, k, dtype=torch.float64)
        group.carried = {"potentials": zero, "running": zero - torch.inf if self.potential == "max" else zero}
        gamma = torch.zeros(problem.count, dtype=torch.float64)
        estimate: Tensor | None = None
        known: Prediction | None = None
        try:
            with interruptible(problem):
                for level, target in self.transition.jumps(schedule):
                    check_deadline(problem)
                    prediction, group.latents = problem.advance(
                        group.latents, group.rows, (level, target), self.transition, slots, known
                    )
                    estimate, scores, known = prediction.x0, None, None
                    if target in levels and k > 1:
                        values, known = problem.scored(group.latents, target, group.rows)
                        scores = group.table(values)
                        gamma = self._temper(group, scores, gamma, target / schedule.steps)
                        self._weigh(group, gamma[:, None] * scores / self.temperature)
                        moved = group.resample(target, self.resampling, self.threshold, trace)
                        if moved is not None:
                            estimate, known = estimate[moved], None if known is None else known.pick(moved)
                        trace["levels"][-1]["scores"] = scores.tolist()
                    problem.report(level, estimate, scores)
                rewards = problem.final_rewards(group.latents, group.rows)
        except Interrupted:
            if estimate is None:
                raise
            heaviest = group.log_weights.argmax(1)
            group.latents = estimate
            return finished(problem, group.pick(heaviest[:, None]), trace)
        if rewards is None:
            return finished(problem, group.latents, trace)
        table = group.table(rewards)
        group.reweight(table / self.temperature - group.carried["potentials"])
        return conclude(group, table, self.returned, trace)

    def _weighed(self, schedule: NoiseSchedule) -> list[int]:
        """The levels at which particles are weighed: every `interval`-th stop before the end, inside the window."""
        low, high = self.window
        stops = [level for level, _ in self.transition.jumps(schedule)[:0:-1]][self.interval - 1 :: self.interval]
        return [i for i in stops if low <= float(schedule.sigma[i] / schedule.sigma[0]) <= high]

    def _temper(self, group: Particles, scores: Tensor, gamma: Tensor, progress: float) -> Tensor:
        """gamma [B] of this level."""
        if self.tempering == "none":
            return torch.ones_like(gamma)
        if self.tempering == "polynomial":
            return torch.full_like(gamma, progress**self.power)
        low, high = gamma.clone(), torch.ones_like(gamma)
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            trial = group.log_weights + self._increment(group, middle[:, None] * scores / self.temperature)
            enough = effective_sample_size(trial) >= self.threshold * group.count
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        trial = group.log_weights + self._increment(group, scores / self.temperature)
        return torch.where(effective_sample_size(trial) >= self.threshold * group.count, 1.0, low)

    def _increment(self, group: Particles, phi: Tensor) -> Tensor:
        """log G_t [B, K] of the values phi."""
        if self.potential == "difference":
            return phi - group.carried["potentials"]
        if self.potential == "max":
            return torch.maximum(group.carried["running"], phi)
        return group.carried["running"] + phi

    def _weigh(self, group: Particles, phi: Tensor) -> None:
        increment = self._increment(group, phi)
        group.reweight(increment)
        if self.potential != "difference":
            group.carried["running"] = increment
        group.carried["potentials"] = group.carried["potentials"] + increment

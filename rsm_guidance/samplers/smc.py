"""Twisted sequential Monte Carlo: particles whose proposals follow the gradient of the value.

TDS (arXiv 2306.17775) and DAS (arXiv 2501.05803).  With the base transition p(x' | x) = N(mu, s^2), the twist
phi_t(x) = gamma_t V(x_t) / lambda and q(x' | x) = N(mu + s^2 grad phi_t(x), s^2), a particle's weight is multiplied by

    p(x' | x) / q(x' | x)  exp(phi_{t+1}(x') - phi_t(x)),

and in the end by exp(r(x0) / lambda - phi).  The product targets p(x0) exp(r(x0) / lambda) / Z exactly as K grows, for any
twist; a good one keeps the weights even.  gamma_t = progress ^ `power` tempers early values: where these are crude (Tweedie's
estimate) power 1 keeps the normaliser honest at few particles, power 0 follows them from the start.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.resampling import SCHEMES, Scheme
from rsm_guidance.core.rows import scaled
from rsm_guidance.core.schedule import Prediction
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
from rsm_guidance.samplers.gradients import gradient_cost, value_and_gradient
from rsm_guidance.samplers.particles import Particles, conclude
from rsm_guidance.samplers.rollout import Unguided


@dataclass(frozen=True)
class TwistedSMC:
    """Sequential Monte Carlo with gradient proposals.

    Attributes:
        particles: K >= 1 per prompt; particle 0 starts where the unguided run starts.
        temperature: lambda > 0 of the target p(x0) exp(r(x0) / lambda).
        power: gamma_t = progress ^ power; 0 leaves values as they are.
        threshold: resample below this share of K of effective particles, in (0, 1].
        resampling: scheme.
        transition: how to step; a stochastic one.
        largest_shift: proposals move by at most so many standard deviations per dimension (root mean square); weights
            take the clipped proposal into account.
        jacobian: differentiate through the denoiser, where the value reads its estimate.
        checkpoint: recompute activations on the way back instead of keeping them: less memory, a forward pass more.
        returned: "best" returns the particle of highest reward, "sample" draws one by weight, a sample of the target.
    """

    name: ClassVar[str] = "smc"
    scales: ClassVar[str | None] = "particles"
    particles: int = 4
    temperature: float = 1.0
    power: float = 0.0
    threshold: float = 0.5
    resampling: Scheme = "systematic"
    transition: Transition = Transition("ddim", 1.0)
    largest_shift: float = 0.5
    jacobian: bool = True
    checkpoint: bool = False
    returned: Literal["best", "sample"] = "best"

    def __post_init__(self) -> None:
        if self.particles < 1:
            raise ValueError(f"particles must be at least 1; got {self.particles}")
        for name in ("temperature", "largest_shift"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)}")
        if not 0 <= self.power < float("inf"):
            raise ValueError(f"power must be finite and at least 0; got {self.power}")
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is a share of the particles, in (0, 1]; got {self.threshold}")
        if self.resampling not in SCHEMES or self.returned not in ("best", "sample"):
            raise ValueError(f"unknown resampling scheme or kind of return; got {self.resampling!r}, {self.returned!r}")
        if not self.transition.stochastic:
            raise ValueError("particles need a stochastic transition (ddim, cps, flow_sde): copies would stay copies")

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image: K times an unguided sample, and at each level K value evaluations with a backward pass.

        A budget lowers K, and where it does not reach for one particle the run is unguided.  At the deadline or on Ctrl-C the estimate of the heaviest particle is returned.
        """
        if problem.value is None:
            raise ValueError(
                "the sampler 'smc' follows the gradient of a value: pass a differentiable reward or value model"
            )
        problem.require_budget()
        problem.denoiser.checkpointing = self.checkpoint
        trace = new_trace(self, problem)
        k = problem.most(self.particles, lambda k: self.cost(problem, k), least=0)
        if k == 0:
            return self.unguided(problem, trace)

        def start(note: Callable[[Tensor], None]) -> Particles:
            starts = [problem.initial(c) for c in range(k)]
            group = Particles(problem, k, starts[0] if k == 1 else torch.cat(starts))
            group.carried = {"twist": torch.zeros(problem.count, k, dtype=torch.float64)}
            return group

        return self.steer(problem, start, trace)

    def cost(self, problem: Problem, k: int, gradient: bool = True) -> tuple[float, int]:
        """Denoiser evaluations and reward calls of one image with k particles."""
        denoiser, value = problem.denoiser, problem.value
        assert value is not None
        judge = gradient_cost(problem, self.jacobian) if gradient else problem.value_cost
        evaluations = k * (denoiser.steps * (denoiser.evaluations_per_row + judge) + problem.final_cost)
        return evaluations, k * (denoiser.steps * value.reward_calls_per_row + problem.final_calls)

    def unguided(self, problem: Problem, trace: dict[str, Any]) -> SamplerOutput:
        """The run where the budget does not reach for one particle."""
        output = Unguided(self.transition).sample(problem)
        output.trace["sampler"] = trace["sampler"]
        return output

    def steer(
        self,
        problem: Problem,
        start: Callable[[Callable[[Tensor], None]], Particles],
        trace: dict[str, Any],
        gradient: bool = True,
    ) -> SamplerOutput:
        """Carry particles from pure noise to the end; without `gradient` they propose as the base model does.

        The group that `start` makes carries the twist [B, K] that its weights contain; it may note an estimate of the clean
        latents [B, ...] on the way, should it be cut off.
        """
        schedule = problem.denoiser.schedule
        estimate: Tensor | None = None
        group: Particles | None = None

        def note(x0: Tensor) -> None:
            nonlocal estimate
            estimate = x0[: problem.count]

        try:
            with interruptible(problem):
                group = start(note)
                for level in range(schedule.steps):
                    check_deadline(problem)
                    prediction, values, slope = self._judged(problem, group, level, gradient)
                    scores = group.table(values)
                    scale = (level / schedule.steps) ** self.power / self.temperature
                    self._twist(group, scale * scores)
                    moved = group.resample(level, self.resampling, self.threshold, trace)
                    trace["levels"][-1]["scores"] = scores.tolist()
                    if moved is not None:
                        prediction, slope = prediction.pick(moved), slope[moved]
                    estimate = prediction.x0
                    gaussian = self.transition(prediction, schedule, level, level + 1)
                    self._propose(problem, group, gaussian, scale * slope, level)
                    problem.report(level, estimate, scores)
                rewards = problem.final_rewards(group.latents, group.rows)
        except Interrupted:
            if estimate is None:
                raise
            if group is None:
                return finished(problem, estimate, trace)
            group.latents = estimate
            return finished(problem, group.pick(group.log_weights.argmax(1)[:, None]), trace)
        assert rewards is not None
        table = group.table(rewards)
        self._twist(group, table / self.temperature)
        return conclude(group, table, self.returned, trace)

    def _judged(
        self, problem: Problem, group: Particles, level: int, gradient: bool
    ) -> tuple[Prediction, Tensor, Tensor]:
        """Prediction, values [K * B] and their gradients at the particles; zero where there is none."""
        x = group.latents
        if gradient:
            prediction, values, slope = value_and_gradient(problem, x, level, group.rows, self.jacobian)
            return prediction, values, slope.nan_to_num(0.0)  # such a row proposes as the base model does
        values, known = problem.scored(x, level, group.rows)
        return known or problem.denoiser.predict(x, level, group.rows), values, torch.zeros_like(x)

    def _twist(self, group: Particles, phi: Tensor) -> None:
        """Exchange the twist [B, K] of the level before for this one's."""
        group.reweight(phi - group.carried["twist"])
        group.carried["twist"] = phi

    def _propose(self, problem: Problem, group: Particles, base: Gaussian, gradient: Tensor, level: int) -> None:
        """Step by the shifted proposal, and weigh by the ratio of the base transition to it."""
        slots = list(range(group.count))
        if base.std == 0:
            group.latents = problem.step(base, level, slots)
            return
        shift = base.std**2 * gradient
        size = shift.flatten(1).double().square().mean(1).sqrt() / base.std
        factor = (self.largest_shift / size.clamp(min=1e-30)).clamp(max=1.0)
        proposal = Gaussian(base.mean + scaled(shift, factor), base.std)
        group.latents = problem.step(proposal, level, slots)
        ratio = base.log_prob(group.latents.double()) - proposal.log_prob(group.latents.double())
        group.reweight(group.table(ratio.double()))

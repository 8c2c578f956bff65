"""LiDAR: guidance by lookahead samples, without backpropagation (arXiv 2602.03211).

K few-step samples x0^k of the prompt are drawn once and judged, r_k.  They stand for the data: seen from x_t = alpha x0 +
sigma eps, sample k has weight w_k = softmax(-|x_t - alpha x0^k|^2 / (2 sigma^2)), and under the tilted law
w^r_k = softmax(the same + r_k / lambda).  The posterior mean moves by their difference,

    x0' = x0 + strength sum_k (w^r_k - w_k) x0^k,

which is the score difference alpha / sigma^2 sum_k (w^r_k - w_k) x0^k.  With many lookahead samples and strength 1 this is
exact guidance to p(x0) exp(r / lambda) / Z; with few it pulls towards the best of them, and needs the larger strength that the
paper takes, too (12.5).  The reward may be a black box.
Rewards are standardised per prompt unless `standardize` is off (ours: `temperature` is then a number of standard deviations,
whatever the reward's units).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rsm_guidance.core.rows import per_row
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import Transition, ode
from rsm_guidance.samplers.base import (
    Interrupted,
    Problem,
    SamplerOutput,
    check_deadline,
    finished,
    interruptible,
    new_trace,
)


@dataclass(frozen=True)
class Lidar:
    """Guidance towards good lookahead samples.

    Attributes:
        candidates: K >= 2 lookahead samples per prompt; 1 is unguided.
        lookahead_steps: >= 1 levels that a lookahead sample visits.
        strength: factor on the shift of the posterior mean, >= 0.
        temperature: lambda > 0, in standard deviations of the K rewards.
        standardize: divide rewards by their standard deviation per prompt.
        window: noise levels (low, high) as fractions of the noisiest sigma in which there is guidance.
        transition: how to step.
    """

    name: ClassVar[str] = "lidar"
    scales: ClassVar[str | None] = "candidates"
    candidates: int = 8
    lookahead_steps: int = 5
    strength: float = 8.0
    temperature: float = 0.002
    standardize: bool = True
    window: tuple[float, float] = (0.6, 1.0)
    transition: Transition = Transition("cps", 0.9)

    def __post_init__(self) -> None:
        for name in ("candidates", "lookahead_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength must be finite and at least 0; got {self.strength}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive and finite; got {self.temperature}")
        if not 0 <= self.window[0] < self.window[1] <= 1:
            raise ValueError(f"window must be (low, high) with 0 <= low < high <= 1; got {self.window}")
        if self.transition.kind in ("scheduler", "glass"):
            raise ValueError(
                f"the transition {self.transition.kind!r} cannot be guided; choose ode, ddim, cps or flow_sde"
            )

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image: an unguided sample, and K times `lookahead_steps` denoiser evaluations and a final score.

        A budget lowers K.
        """
        if self.candidates > 1:
            problem.require_judge(self.name)
        problem.require_budget()
        schedule, trace = problem.denoiser.schedule, new_trace(self, problem)
        x = problem.initial(0)
        estimate: Tensor | None = None
        samples = weights = None

        def note(x0: Tensor) -> None:
            nonlocal estimate
            estimate = x0[: problem.count]

        try:
            with interruptible(problem):
                k = problem.most(self.candidates, lambda k: self._cost(problem, k))
                if k > 1:
                    samples, rewards = self._look(problem, k, note)
                    trace["lookahead"] = {"rewards": rewards.tolist()}
                    weights = (rewards - rewards.mean(1, keepdim=True)) / self.temperature
                    if self.standardize:
                        weights = weights / rewards.std(1, keepdim=True).clamp(min=1e-12)
                for level in range(schedule.steps):
                    check_deadline(problem)
                    prediction = problem.denoiser.predict(x, level)
                    if samples is not None and weights is not None and self._guides(problem, level):
                        prediction = self._guided(prediction, samples, weights, *schedule.coefficients(level))
                    estimate = prediction.x0
                    x = problem.step(self.transition(prediction, schedule, level, level + 1), level, [0])
                    problem.report(level, estimate)
        except Interrupted:
            if estimate is None:
                raise
            return finished(problem, estimate, trace)
        return finished(problem, x, trace)

    def _guides(self, problem: Problem, level: int) -> bool:
        sigma = problem.denoiser.schedule.sigma
        return self.strength > 0 and self.window[0] <= float(sigma[level] / sigma[0]) <= self.window[1]

    def _look(self, problem: Problem, k: int, note: Callable[[Tensor], None]) -> tuple[Tensor, Tensor]:
        """Lookahead samples [B, K, ...] and their rewards float64 [B, K]; `note` is told of estimates on the way."""
        schedule, rows = problem.denoiser.schedule, problem.rows.repeat(k)
        stops = torch.linspace(0, schedule.steps, min(self.lookahead_steps, schedule.steps) + 1).round().long().tolist()
        x = torch.cat([problem.initial(c + 1) for c in range(k)])
        for level, target in zip(stops[:-1], stops[1:], strict=True):
            check_deadline(problem)
            prediction = problem.denoiser.predict(x, level, rows)
            note(prediction.x0)
            x = prediction.x0 if target == schedule.steps else ode(prediction, schedule, level, target).mean
        rewards = problem.final_rewards(x, rows)
        assert rewards is not None
        return x.view(k, problem.count, *x.shape[1:]).transpose(0, 1), rewards.view(k, problem.count).T

    def _guided(self, p: Prediction, samples: Tensor, weights: Tensor, alpha: float, sigma: float) -> Prediction:
        distance = (p.x.unsqueeze(1) - alpha * samples).flatten(2).double().square().sum(2)
        seen = -distance / (2 * sigma**2)
        moved = (seen + weights).softmax(1) - seen.softmax(1)
        still = (moved == 0).all(1)  # nothing to choose: the unguided step, bit for bit
        shift = torch.einsum("bk,bk...->b...", moved.to(samples), samples)
        x0 = p.x0 + self.strength * shift
        eps = p.eps - self.strength * alpha / sigma * shift
        velocity = None if p.velocity is None else eps - x0
        if bool(still.any()):
            at = per_row(still, x0)
            x0, eps = torch.where(at, p.x0, x0), torch.where(at, p.eps, eps)
            velocity = None if velocity is None or p.velocity is None else torch.where(at, p.velocity, velocity)
        return Prediction(p.x, x0, eps, velocity)

    def _cost(self, problem: Problem, k: int) -> tuple[float, int]:
        """Denoiser evaluations and reward calls of one image with k lookahead samples."""
        denoiser = problem.denoiser
        levels = k * min(self.lookahead_steps, denoiser.steps) + denoiser.steps
        return levels * denoiser.evaluations_per_row + (k + 1) * problem.final_cost, (k + 1) * problem.final_calls

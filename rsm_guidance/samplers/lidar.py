"""LiDAR: guidance by lookahead samples, without backpropagation (arXiv 2602.03211).

K few-step samples x0^k of the prompt are drawn once and scored, r_k.  They stand for the data: seen from x_t = alpha x0 +
sigma eps, sample k has weight w_k = softmax(-|x_t - alpha x0^k|^2 / (2 sigma^2)), and under the tilted law
w^r_k = softmax(the same + r_k / lambda).  The posterior mean moves by their difference,

    x0' = x0 + strength sum_k (w^r_k - w_k) x0^k,

which is the score difference alpha / sigma^2 sum_k (w^r_k - w_k) x0^k.  With many lookahead samples and strength 1, and a
transition that keeps marginals, this is exact guidance to p(x0) exp(r / lambda) / Z; with few it pulls towards the best of
them, and needs the larger strength that the paper takes, too (12.5).  The reward may be a black box.
Rewards are standardised per prompt unless `standardize` is off (ours: `temperature` is then a number of standard deviations,
whatever the reward's units).
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rsm_guidance.core.rows import per_row
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import CPS, ODE, GaussianTransition, require_gaussian
from rsm_guidance.samplers import kernel
from rsm_guidance.samplers.kernel import Info, Result, Sampler, Solution, first_of, grouped, table
from rsm_guidance.samplers.task import Task

_EXACT = ODE()


@dataclass(frozen=True)
class Lidar(Sampler):
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
    budget_field: ClassVar[str | None] = "candidates"
    candidates: int = 8
    lookahead_steps: int = 5
    strength: float = 8.0
    temperature: float = 0.002
    standardize: bool = True
    window: tuple[float, float] = (0.6, 1.0)
    transition: GaussianTransition = CPS(0.9)

    def __post_init__(self) -> None:
        kernel.at_least(self, 1, "candidates", "lookahead_steps")
        kernel.finite(self, "strength")
        kernel.finite(self, "temperature", positive=True)
        kernel.check_window(self.window)
        require_gaussian(self.transition, "predictions are guided level by level")

    def check(self, task: Task) -> None:
        if self.candidates > 1:
            kernel.require(self, task)

    def solve(self, task: Task) -> Solution:
        """Cost per image: an unguided sample, and K times `lookahead_steps` denoiser evaluations and a final score."""
        samples = weights = None
        sections = {}
        if self.candidates > 1:
            samples, rewards = yield from self._look(task)
            sections["lookahead"] = {"rewards": rewards.tolist()}
            weights = (rewards - rewards.mean(1, keepdim=True)) / self.temperature
            if self.standardize:
                weights = weights / rewards.std(1, keepdim=True).clamp(min=1e-12)
        x = task.initial(0)
        for jump in self.transition.jumps(task.schedule):
            prediction = task.predict(x, jump[0])
            if samples is not None and weights is not None and self._guides(task, jump[0]):
                prediction = self.guided(prediction, samples, weights, *task.schedule.coefficients(jump[0]))
            x = task.step(self.transition, prediction, jump).next
            yield Info(jump[0], prediction.x0)
        return Result(x, sections=sections)

    def _guides(self, task: Task, level: int) -> bool:
        return self.strength > 0 and kernel.in_window(self.window, task.schedule, level)

    def _look(self, task: Task) -> Generator[Info, None, tuple[Tensor, Tensor]]:
        """Lookahead samples [B, K, ...] and their rewards float64 [B, K]."""
        k, schedule, rows = self.candidates, task.schedule, task.rows_of(self.candidates)
        count = min(self.lookahead_steps, schedule.steps)
        stops = torch.linspace(0, schedule.steps, count + 1).round().long().tolist()
        x = task.initial(*range(1, k + 1))
        for level, target in zip(stops[:-1], stops[1:], strict=True):
            prediction = task.predict(x, level, rows)
            x = prediction.x0 if target == schedule.steps else _EXACT(prediction, schedule, level, target).center
            yield Info(level, first_of(prediction.x0, k), silent=True)
        rewards = task.final_scores(x, rows)
        assert rewards is not None
        return grouped(x, k), table(rewards, k)

    def guided(self, p: Prediction, samples: Tensor, weights: Tensor, alpha: float, sigma: float) -> Prediction:
        """The prediction [B, ...] moved towards good samples [B, K, ...] with log-weights [B, K]."""
        distance = (p.x.unsqueeze(1) - alpha * samples).flatten(2).double().square().sum(2)
        seen = -distance / (2 * sigma**2)
        moved = (seen + weights.to(seen)).softmax(1) - seen.softmax(1)
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

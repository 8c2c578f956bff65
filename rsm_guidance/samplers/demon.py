"""Demon: every step takes the noise that its candidates' values recommend (arXiv 2410.05760).

At each level K noises z_k make K children of the same Gaussian N(mu, s^2), which are judged by their values r_k.  The
noises are weighed, their sum is stretched to the length of a noise, and the step is taken with it:

    z* = sqrt(d) sum_k w_k z_k / |sum_k w_k z_k|,    x' = mu + s z*,

w_k = tanh((r_k - mean r) / tau)  (`tanh`: bad noises push away)  or  softmax(r_k / tau)  (`softmax`), where tau is
`temperature` times the standard deviation of the r_k.  No gradient of the reward is needed; it may be a person.
The children share the parent's denoiser evaluation.  Where all values are equal the step takes its first noise, which is the
unguided one.  `window` bounds the noise levels in which noises are combined; below it the paper turns to the ODE, here
the transition goes on (ours), and so the unguided run is the same transition throughout.  Greedy.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.rows import rows_where, scaled
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


@dataclass(frozen=True)
class Demon:
    """Step with a combination of K noises.

    Attributes:
        candidates: K >= 1 noises per level; the first is the unguided one.
        weights: how values become weights.
        temperature: tau in standard deviations of the level's values, > 0.
        window: noise levels (low, high) as fractions of the noisiest sigma, of the states that are judged.
        transition: how to step; a stochastic one.
    """

    name: ClassVar[str] = "demon"
    scales: ClassVar[str | None] = "candidates"
    candidates: int = 8
    weights: Literal["tanh", "softmax"] = "tanh"
    temperature: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    transition: Transition = Transition("cps", 0.9)

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1; got {self.candidates}")
        if self.weights not in ("tanh", "softmax"):
            raise ValueError(f"weights must be 'tanh' or 'softmax'; got {self.weights!r}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be positive and finite; got {self.temperature}")
        if not 0 <= self.window[0] < self.window[1] <= 1:
            raise ValueError(f"window must be (low, high) with 0 <= low < high <= 1; got {self.window}")
        if self.transition.kind not in ("ddim", "cps", "flow_sde"):
            raise ValueError(
                f"the transition {self.transition.kind!r} has no noise to combine; choose ddim, cps or flow_sde"
            )

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image: one denoiser evaluation per level, and K value evaluations at each level of the window.

        When the budget no longer reaches for K values, the run goes on unguided.
        """
        if self.candidates > 1 and problem.value is None:
            raise ValueError("the sampler 'demon' scores noisy latents: pass a diffusion reward model, or a reward")
        problem.require_budget()
        schedule, trace = problem.denoiser.schedule, new_trace(self, problem)
        x, estimate = problem.initial(0), None
        try:
            with interruptible(problem):
                for level in range(schedule.steps):
                    check_deadline(problem)
                    prediction = problem.denoiser.predict(x, level, problem.rows)
                    estimate, scores = prediction.x0, None
                    gaussian = self.transition(prediction, schedule, level, level + 1)
                    x = problem.step(gaussian, level, [0])
                    if self._combines(schedule, level) and gaussian.std > 0 and self._affordable(problem, level + 1):
                        scores, weights = self._judge(problem, gaussian, level)
                        x = self._combine(problem, gaussian, level, weights, x)
                        listed = {"scores": scores.tolist(), "weights": weights.tolist()}
                        trace["levels"].append({"level": level + 1, **listed, "chosen": weights.argmax(1).tolist()})
                    problem.report(level, estimate, scores)
        except Interrupted:
            if estimate is None:
                raise
            return finished(problem, estimate, trace)
        return finished(problem, x, trace)

    def _combines(self, schedule: NoiseSchedule, level: int) -> bool:
        low, high = self.window
        share = float(schedule.sigma[level + 1] / schedule.sigma[0])
        return self.candidates > 1 and level + 1 < schedule.steps and low <= share <= high

    def _affordable(self, problem: Problem, level: int) -> bool:
        denoiser, value = problem.denoiser, problem.value
        assert value is not None
        rest = (denoiser.steps - level) * denoiser.evaluations_per_row + problem.final_cost
        evaluations = rest + self.candidates * value.evaluations_per_row
        calls = self.candidates * value.reward_calls_per_row + problem.final_calls
        return problem.affords(evaluations * problem.count, calls * problem.count)

    def _judge(self, problem: Problem, gaussian: Gaussian, level: int) -> tuple[Tensor, Tensor]:
        """Values and weights, float64 [B, K], of the children."""
        children = torch.cat([problem.step(gaussian, level, [0], child=k) for k in range(self.candidates)])
        rows = problem.rows.repeat(self.candidates)
        scores = problem.values(children, level + 1, rows).view(self.candidates, problem.count).T
        apart = scores - scores.mean(1, keepdim=True)
        # The differences of equal values can be a rounding error instead of zero.
        spread = torch.where(scores.amax(1) > scores.amin(1), scores.std(1, correction=0), torch.inf)
        unit = apart / (self.temperature * spread[:, None])
        if self.weights == "tanh":
            return scores, unit.tanh()
        return scores, torch.where(spread[:, None].isinf(), 0.0, unit.softmax(1))

    def _combine(self, problem: Problem, gaussian: Gaussian, level: int, weights: Tensor, first: Tensor) -> Tensor:
        """The step [B, ...] with the weighted noise; `first` in rows without weights."""
        total = torch.zeros_like(gaussian.mean)
        unit = Gaussian(torch.zeros_like(total), 1.0)  # whose samples are the noises themselves, under the same names
        for k in range(self.candidates):
            total = total + scaled(problem.step(unit, level, [0], child=k), weights[:, k])
        length = total.flatten(1).double().norm(dim=1)
        size = math.sqrt(total[0].numel()) / length.clamp(min=1e-300)
        known = (length > 0) & (weights != 0).any(1).to(length.device)
        combined = gaussian.sample(scaled(total.double(), size).to(total))
        return rows_where(known, combined, first)

"""Demon: every step takes the noise that its candidates' values recommend (arXiv 2410.05760).

At each level K noises z_k make K children of the same Gaussian N(mu, s^2), which are scored by their values r_k.  The
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
from rsm_guidance.core.transitions import CPS, GaussianTransition, require_gaussian
from rsm_guidance.samplers import kernel
from rsm_guidance.samplers.kernel import Info, Kernel, State, table
from rsm_guidance.samplers.task import Task


@dataclass(frozen=True)
class Demon(Kernel):
    """Step with a combination of K noises.

    Attributes:
        candidates: K >= 1 noises per level; the first is the unguided one.
        weights: how values become weights.
        temperature: tau in standard deviations of the level's values, > 0.
        window: noise levels (low, high) as fractions of the noisiest sigma, of the states that are scored.
        transition: how to step; a stochastic one.
    """

    name: ClassVar[str] = "demon"
    budget_field: ClassVar[str | None] = "candidates"
    candidates: int = 8
    weights: Literal["tanh", "softmax"] = "tanh"
    temperature: float = 1.0
    window: tuple[float, float] = (0.0, 1.0)
    transition: GaussianTransition = CPS(0.9)

    def __post_init__(self) -> None:
        kernel.at_least(self, 1, "candidates")
        kernel.one_of(self, weights=("tanh", "softmax"))
        kernel.finite(self, "temperature", positive=True)
        kernel.check_window(self.window)
        require_gaussian(self.transition, "there must be noise to combine", noisy=True)

    def check(self, task: Task) -> None:
        if self.candidates > 1:
            kernel.require(self, task, value=True)

    def init(self, task: Task) -> State:
        """Cost per image: one denoiser evaluation per level, and K value evaluations at each level of the window."""
        return State(task.initial(0))

    def step(self, task: Task, state: State, jump: tuple[int, int]) -> tuple[State, Info]:
        level, target = jump
        prediction = task.predict(state.x, level)
        gaussian = self.transition(prediction, task.schedule, level, target)
        if not self._combines(task.schedule, level) or gaussian.std == 0:
            x = task.step(self.transition, prediction, jump).next
            return State(x), Info(level, prediction.x0)
        k, shape = self.candidates, prediction.x.shape[1:]
        noises = [task.noise(task.rows, shape, level, [0] * task.count, child) for child in range(k)]
        children = torch.stack([gaussian.sample(z) for z in noises], 1)
        scores = table(task.score(children.flatten(0, 1), target, task.rows_of(k))[0], k)
        weights = self.weighed(scores)
        combined = gaussian.sample(combine(torch.stack(noises, 1), weights).to(gaussian.mean))
        moved = (weights != 0).any(1) & combined.flatten(1).isfinite().all(1).cpu()
        x = rows_where(moved, combined, children[:, 0])
        record = {"weights": weights, "chosen": weights.argmax(1)}
        return State(x), Info(level, prediction.x0, scores, target, record)

    def _combines(self, schedule: NoiseSchedule, level: int) -> bool:
        inside = kernel.in_window(self.window, schedule, level + 1)
        return self.candidates > 1 and level + 1 < schedule.steps and inside

    def weighed(self, scores: Tensor) -> Tensor:
        """Weights [B, K] of scores [B, K]; zero where all are equal."""
        apart = scores - scores.mean(1, keepdim=True)
        # The differences of equal values can be a rounding error instead of zero.
        spread = torch.where(scores.amax(1) > scores.amin(1), scores.std(1, correction=0), torch.inf)
        unit = apart / (self.temperature * spread[:, None])
        if self.weights == "tanh":
            return unit.tanh()
        return torch.where(spread[:, None].isinf(), 0.0, unit.softmax(1))


def combine(noises: Tensor, weights: Tensor) -> Tensor:
    """Noises [B, K, ...] weighed by [B, K], summed and stretched to the length of a noise; [B, ...], NaN where that is zero."""
    total = torch.zeros_like(noises[:, 0], dtype=torch.float64)
    for k in range(noises.shape[1]):  # one after the other, so that no batch rounds otherwise
        total = total + scaled(noises[:, k].double(), weights[:, k])
    length = total.flatten(1).norm(dim=1)
    return scaled(total, math.sqrt(total[0].numel()) / length)

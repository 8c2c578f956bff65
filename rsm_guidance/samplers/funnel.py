"""Funnel: many particles at the noisy levels, few at the clean ones (arXiv 2508.12361; early pruning as in TTSnap).

N starts step on independently.  At level i, N (M / N)^(i / T) of them are kept, rounded: those of highest value, so that
most evaluations go where the image is still open, and the last M are judged as finished images.  With no pruning (M = N) it
is best-of-N.  Greedy.  (The papers shrink the population by resampling and by a threshold schedule; keeping the top is ours.)
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rsm_guidance.core.schedule import Prediction
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


@dataclass(frozen=True)
class Funnel:
    """Prune from many starts to few finished images.

    Attributes:
        candidates: N >= 1 starts; the first is that of the unguided run.
        survivors: M in 1..N finished images, of which the final judge picks one.
        start: share of the levels, in [0, 1), before which nothing is pruned: values of pure noise say little.
        transition: how to step; `ode` serves, too.
    """

    name: ClassVar[str] = "funnel"
    scales: ClassVar[str | None] = "candidates"
    candidates: int = 8
    survivors: int = 1
    start: float = 0.3
    transition: Transition = Transition("cps", 0.9)

    def __post_init__(self) -> None:
        if not 1 <= self.survivors <= self.candidates:
            raise ValueError(
                f"survivors must lie between 1 and the number of candidates; got {self.survivors} of {self.candidates}"
            )
        if not 0 <= self.start < 1:
            raise ValueError(f"start is a share of the levels in [0, 1); got {self.start}")

    def population(self, steps: int, candidates: int) -> list[int]:
        """Particles alive at each level 0..N."""
        survivors = min(self.survivors, candidates)
        shares = [max(0.0, (i / steps - self.start) / (1 - self.start)) for i in range(steps + 1)]
        return [max(survivors, round(candidates * (survivors / candidates) ** share)) for share in shares]

    def cost(self, problem: Problem, candidates: int) -> tuple[float, int]:
        """Denoiser evaluations and reward calls of one image."""
        denoiser, value = problem.denoiser, problem.value
        evaluations, calls, alive, known = 0.0, 0, candidates, 0
        kept = self.population(denoiser.steps, candidates)
        for level, target in self.transition.jumps(denoiser.schedule):
            evaluations += (alive * (target - level) - known) * denoiser.evaluations_per_row
            known = 0
            if kept[target] < alive and value is not None and target < denoiser.steps:
                evaluations += alive * value.evaluations_per_row
                calls += alive * value.reward_calls_per_row
                alive = kept[target]
                known = alive if value.reads_prediction else 0
        return evaluations + alive * problem.final_cost, calls + alive * problem.final_calls

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image: see `cost`; a budget lowers the number of starts."""
        if self.candidates > 1:
            problem.require_judge(self.name)
        problem.require_budget()
        schedule, trace, b = problem.denoiser.schedule, new_trace(self, problem), problem.count
        alive = problem.most(self.candidates, lambda count: self.cost(problem, count))
        kept = self.population(schedule.steps, alive)
        x = torch.cat([problem.initial(c) for c in range(alive)]) if alive > 1 else problem.initial(0)
        estimate: Tensor | None = None
        known: Prediction | None = None
        try:
            with interruptible(problem):
                for level, target in self.transition.jumps(schedule):
                    check_deadline(problem)
                    rows, slots = problem.rows.repeat(alive), list(range(alive))
                    prediction, x = problem.advance(x, rows, (level, target), self.transition, slots, known)
                    estimate, known = prediction.x0[:b], None
                    if kept[target] < alive and problem.value is not None and target < schedule.steps:
                        values, known = problem.scored(x, target, rows)
                        scores = values.view(alive, b).T
                        order = scores.argsort(dim=1, descending=True, stable=True)[:, : kept[target]]
                        trace["levels"].append({"level": target, "scores": scores.tolist(), "kept": order.tolist()})
                        alive = kept[target]
                        index = (order.T * b + problem.rows).flatten()
                        x, known = x[index], None if known is None else known.pick(index)
                    problem.report(level, estimate)
                rewards = problem.final_rewards(x, problem.rows.repeat(alive)) if alive > 1 else None
        except Interrupted:
            if estimate is None:
                raise
            return finished(problem, estimate, trace)
        return finished_best(problem, x, rewards, trace)

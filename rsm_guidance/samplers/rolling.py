"""Budget-rolling selection (RBF, arXiv 2503.19385) and accept-threshold advance (Verifier-Threshold, arXiv 2512.08985).

At every level children are drawn one after the other from the parent's Gaussian and judged; the first that is good enough
continues at once, and the tries it leaves unused roll over to later levels.  Good enough means better than the value with
which the parent was accepted (`rbf`), or than a fixed `threshold`.  When the tries of a level are spent, its best child
continues.  Prompts are tried together, in rounds that shrink as they accept.  Greedy.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

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
class RollingSelection:
    """Accept the first child that is good enough; unused tries roll over.

    Attributes:
        candidates: tries per level and prompt, >= 1; what a level leaves unused serves the later ones.
        threshold: value with which a child is accepted; None accepts what beats the parent's own value.
        transition: how to step; a stochastic one, or there is nothing to choose.
    """

    name: ClassVar[str] = "rbf"
    scales: ClassVar[str | None] = "candidates"
    candidates: int = 4
    threshold: float | None = None
    transition: Transition = Transition("cps", 0.9)

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates must be at least 1; got {self.candidates}")
        if self.threshold is not None and not -float("inf") < self.threshold < float("inf"):
            raise ValueError(f"threshold must be finite; got {self.threshold}")

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image: one denoiser evaluation and at most K value evaluations per level, on the average of levels.

        When the budget no longer reaches for a score, the run goes on unguided.
        """
        if self.candidates > 1 and problem.value is None:
            raise ValueError("the sampler 'rbf' scores noisy latents: pass a diffusion reward model, or a reward")
        problem.require_budget()
        schedule, trace = problem.denoiser.schedule, new_trace(self, problem)
        x, rows = problem.initial(0), problem.rows
        spare = torch.zeros(problem.count, dtype=torch.int64)
        below = -torch.inf if self.threshold is None else math.nextafter(self.threshold, -math.inf)
        bar = torch.full((problem.count,), below, dtype=torch.float64)
        estimate: Tensor | None = None
        try:
            with interruptible(problem):
                for level in range(schedule.steps):
                    check_deadline(problem)
                    prediction = problem.denoiser.predict(x, level, rows)
                    estimate = prediction.x0
                    gaussian = self.transition(prediction, schedule, level, level + 1)
                    if gaussian.std == 0 or self.candidates == 1 or level + 1 == schedule.steps:
                        x = problem.step(gaussian, level, [0])
                    else:
                        x, best, used = self._try(problem, gaussian, level, spare + self.candidates, bar, trace)
                        spare += self.candidates - used
                        if self.threshold is None:
                            bar = torch.maximum(bar, best)
                    problem.report(level, estimate)
        except Interrupted:
            if estimate is None:
                raise
            return finished(problem, estimate, trace)
        return finished(problem, x, trace)

    def _try(
        self, problem: Problem, gaussian: Gaussian, level: int, tries: Tensor, bar: Tensor, trace: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Children [B, ...], their values [B] and tries used [B]: the first above `bar` [B], else the best of `tries` [B]."""
        chosen = problem.step(gaussian, level, [0])
        best = torch.full((problem.count,), -torch.inf, dtype=torch.float64)
        index = torch.zeros(problem.count, dtype=torch.int64)
        used = torch.zeros(problem.count, dtype=torch.int64)
        scores: list[list[float]] = [[] for _ in range(problem.count)]
        for attempt in range(int(tries.max())):
            active = ((attempt < tries) & ((best <= bar) | (used == 0))).nonzero().flatten()
            if not len(active) or not self._affordable(problem, level + 1, len(active)):
                break
            children = chosen if attempt == 0 else problem.step(gaussian, level, [0], child=attempt)
            values = problem.values(children[active], level + 1, active)
            better = values > best[active]
            rows = active[better]
            best[rows], index[rows], chosen = values[better], attempt, chosen.clone()
            chosen[rows] = children[rows]
            used[active] += 1
            for row, score in zip(active.tolist(), values.tolist(), strict=True):
                scores[row].append(score)
        trace["levels"].append({"level": level + 1, "scores": scores, "chosen": index.tolist()})
        return chosen, best, used

    def _affordable(self, problem: Problem, level: int, rows: int) -> bool:
        denoiser, value = problem.denoiser, problem.value
        assert value is not None
        rest = (denoiser.steps - level) * denoiser.evaluations_per_row + problem.final_cost
        evaluations = problem.count * rest + rows * value.evaluations_per_row
        calls = problem.count * problem.final_calls + rows * value.reward_calls_per_row
        return problem.affords(evaluations, calls)

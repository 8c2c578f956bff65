"""Best-of-N: N independent samples per prompt, the best by the final score is returned.

The baseline every other method must beat at equal cost.  Greedy: it maximises, and overshoots the tilted posterior.

With `accept` samples are drawn one after the other and a prompt is done with the first whose reward reaches it, as in
rejection sampling: easy prompts take one sample, hard ones up to N.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rsm_guidance.core.transitions import SchedulerSteps, Transition
from rsm_guidance.rollouts.collect import trajectories
from rsm_guidance.samplers.kernel import Info, Result, Sampler, Solution, at_least, require
from rsm_guidance.samplers.task import Task


@dataclass(frozen=True)
class BestOfN(Sampler):
    """N samples, one winner per prompt.

    Attributes:
        candidates: N >= 1; candidate 0 is the unguided sample of the same seed.
        transition: how to step.
        batch_rows: how many latents one denoiser call takes at most, but for one of each prompt.
        accept: final reward with which a prompt is done; None draws all N samples.
    """

    name: ClassVar[str] = "best-of-n"
    budget_field: ClassVar[str | None] = "candidates"
    candidates: int = 4
    transition: Transition = SchedulerSteps()
    batch_rows: int = 64
    accept: float | None = None

    def __post_init__(self) -> None:
        at_least(self, 1, "candidates", "batch_rows")
        if self.accept is not None and not math.isfinite(self.accept):
            raise ValueError(f"accept must be finite; got {self.accept}")

    def check(self, task: Task) -> None:
        if self.candidates > 1:
            require(self, task)

    def solve(self, task: Task) -> Solution:
        """Cost per image: N times an unguided sample and its final score, or fewer with `accept`."""
        best, going = Winners(task), task.rows
        for candidates in self._batches(task):
            for step in trajectories(task.denoiser, task.streams, self.transition, candidates, going):
                estimate = best.shown(step.estimate[:: len(candidates)], going)
                yield Info(step.level, estimate, so_far=best.result if best.found else None)
            scores = task.final_scores(step.next, going.repeat_interleave(len(candidates)))
            if scores is None:
                return Result(step.next)
            best.see(step.next, scores.view(len(going), -1), going, candidates)
            if self.accept is not None:
                going = going[best.rewards[going] < self.accept]
            if not len(going):
                break
            yield Info(task.steps, best.latents, so_far=best.result, silent=True)
        return best.result()

    def _batches(self, task: Task) -> list[list[int]]:
        """Candidates in batches of at most `batch_rows` latents.

        Candidate 0 runs alone: it is then the unguided sample to the last bit, which a larger batch would round otherwise.
        """
        size = 1 if self.accept is not None else max(1, self.batch_rows // task.count)
        starts = range(1, self.candidates, size)
        return [[0], *(list(range(start, min(start + size, self.candidates))) for start in starts)]


class Winners:
    """The best finished sample of every prompt so far, and the scores of all."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.rewards = torch.full((task.count,), -torch.inf, dtype=torch.float64)
        self.chosen = torch.zeros_like(task.rows)
        self.latents = torch.empty(0)
        self.scores: list[list[float]] = [[] for _ in range(task.count)]

    @property
    def found(self) -> bool:
        """Whether every prompt has a finished sample."""
        return all(self.scores)

    def shown(self, estimate: Tensor, rows: Tensor) -> Tensor:
        """Estimates [B, ...] for every prompt, of which `rows` [P] have new ones."""
        if len(rows) == self.task.count:
            return estimate
        shown = self.latents.clone()
        shown[rows] = estimate.to(shown)
        return shown

    def see(self, x0: Tensor, scores: Tensor, rows: Tensor, candidates: list[int]) -> Tensor:
        """Finished samples [P * K, ...] of candidates [K] of prompts `rows` [P], and their scores [P, K].

        Returns which prompts [P] have a new best one.
        """
        for row, found in zip(rows.tolist(), scores.tolist(), strict=True):
            self.scores[row] += found
        top, index = scores.max(1)
        better = top > self.rewards[rows]
        winners = x0[torch.arange(len(rows)) * len(candidates) + index]
        if not len(self.latents):
            self.latents = winners.clone()
        improved = rows[better]
        self.latents[improved] = winners[better]
        self.rewards[improved] = top[better]
        self.chosen[improved] = torch.tensor(candidates)[index[better]]
        return better

    def result(self) -> Result:
        """The best of every prompt."""
        candidates = {"rewards": self.scores, "chosen": self.chosen.tolist()}
        return Result(self.latents, self.rewards, sections={"candidates": candidates})

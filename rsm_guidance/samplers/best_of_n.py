"""Best-of-N: N independent samples per prompt, the best by the final judge is returned.

The baseline every other method must beat at equal cost.  Greedy: it maximises, and overshoots the tilted posterior.

With `accept` samples are drawn one after the other and a prompt is done with the first whose reward reaches it, as in
rejection sampling: easy prompts take one sample, hard ones up to N.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rsm_guidance.core.transitions import Transition
from rsm_guidance.samplers.base import Interrupted, Problem, SamplerOutput, finished, interruptible, new_trace
from rsm_guidance.samplers.rollout import Rollout


@dataclass(frozen=True)
class BestOfN:
    """N samples, one winner per prompt.

    Attributes:
        candidates: N >= 1; candidate 0 is the unguided sample of the same seed.
        transition: how to step.
        batch_rows: how many latents one denoiser call takes at most, but for one of each prompt.
        accept: final reward with which a prompt is done; None draws all N samples.
    """

    name: ClassVar[str] = "best-of-n"
    scales: ClassVar[str | None] = "candidates"
    candidates: int = 4
    transition: Transition = Transition("scheduler")
    batch_rows: int = 64
    accept: float | None = None

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.batch_rows < 1:
            raise ValueError(f"candidates and batch_rows must be at least 1; got {self.candidates}, {self.batch_rows}")
        if self.accept is not None and not math.isfinite(self.accept):
            raise ValueError(f"accept must be finite; got {self.accept}")

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image: N times an unguided sample and its final score, or fewer with `accept`.  A budget lowers N."""
        if self.candidates > 1:
            problem.require_judge(self.name)
        problem.require_budget()
        trace = new_trace(self, problem)
        scores: list[list[float]] = [[] for _ in range(problem.count)]
        best = torch.full((problem.count,), -torch.inf, dtype=torch.float64)
        chosen, going = torch.zeros_like(problem.rows), problem.rows
        latents: Tensor | None = None
        for candidates in self._batches(problem):
            rollout = Rollout(problem, self.transition, candidates, prompts=going, others=latents)
            try:
                x0 = rollout.run()
                with interruptible(problem):
                    rewards = problem.final_rewards(x0, rollout.rows)
            except Interrupted:
                if latents is not None:
                    break
                if rollout.estimate is None:  # not one sample is finished: the first estimate is the best so far
                    raise
                return finished(problem, rollout.estimate[: problem.count], trace)
            if rewards is None:
                return finished(problem, x0, trace)
            table = rewards.view(len(candidates), -1)
            for row, found in zip(going.tolist(), table.T.tolist(), strict=True):
                scores[row] += found
            top, index = table.max(0)
            better = top > best[going]
            winners = x0.view(*table.shape, *x0.shape[1:])[index, torch.arange(len(going))]
            latents = winners if latents is None else latents
            latents[going[better]] = winners[better]
            best[going[better]] = top[better]
            chosen[going[better]] = torch.tensor(candidates)[index[better]]
            if self.accept is not None:
                going = going[best[going] < self.accept]
            if not len(going):
                break
        assert latents is not None
        trace["candidates"] = {"rewards": scores, "chosen": chosen.tolist()}
        return finished(problem, latents, trace, best)

    def _batches(self, problem: Problem) -> list[list[int]]:
        """Candidates in batches of at most `batch_rows` latents, as many as the budget reaches for.

        Candidate 0 runs alone: it is then the unguided sample to the last bit, which a larger batch would round otherwise.
        """
        count = problem.affordable(self.candidates, 0)
        size = 1 if self.accept is not None else max(1, self.batch_rows // problem.count)
        return [[0], *(list(range(start, min(start + size, count))) for start in range(1, count, size))]

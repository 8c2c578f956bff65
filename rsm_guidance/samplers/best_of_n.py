"""Best-of-N: N independent samples per prompt, the best by the final judge is returned.

The baseline every other method must beat at equal cost.  Greedy: it maximises, and overshoots the tilted posterior.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rsm_guidance.core.transitions import Transition
from rsm_guidance.samplers.base import Interrupted, Problem, SamplerOutput, finished_best, interruptible, new_trace
from rsm_guidance.samplers.rollout import Rollout


@dataclass(frozen=True)
class BestOfN:
    """N samples, one winner per prompt.

    Attributes:
        candidates: N >= 1; candidate 0 is the unguided sample of the same seed.
        transition: how to step.
        batch_rows: how many latents one denoiser call takes at most.
    """

    name: ClassVar[str] = "best-of-n"
    scales: ClassVar[str | None] = "candidates"
    candidates: int = 4
    transition: Transition = Transition("scheduler")
    batch_rows: int = 64

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.batch_rows < 1:
            raise ValueError(f"candidates and batch_rows must be at least 1; got {self.candidates}, {self.batch_rows}")

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image: N times an unguided sample and its final score.  A budget lowers N."""
        if self.candidates > 1:
            problem.require_judge(self.name)
        problem.require_budget()
        trace = new_trace(self, problem)
        latents: list[Tensor] = []
        rewards: list[Tensor] = []
        for candidates in self._batches(problem):
            rollout = Rollout(problem, self.transition, candidates)
            try:
                x0 = rollout.run()
                with interruptible(problem):
                    scores = problem.final_rewards(x0, rollout.rows)
            except Interrupted:
                if not latents:  # not one sample is finished: the first estimate is the best so far
                    if rollout.estimate is None:
                        raise
                    latents = [rollout.estimate[: problem.count]]
                break
            latents.append(x0)
            if scores is not None:
                rewards.append(scores)
        return finished_best(problem, torch.cat(latents), torch.cat(rewards) if rewards else None, trace)

    def _batches(self, problem: Problem) -> list[list[int]]:
        """Candidates in batches of at most `batch_rows` latents, as many as the budget reaches for.

        Candidate 0 runs alone: it is then the unguided sample to the last bit, which a larger batch would round otherwise.
        """
        count = problem.affordable(self.candidates, 0)
        size = max(1, self.batch_rows // problem.count)
        return [[0], *(list(range(start, min(start + size, count))) for start in range(1, count, size))]

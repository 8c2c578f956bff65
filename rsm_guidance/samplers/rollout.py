"""Unguided sampling: `none`, and the rollouts that other samplers are made of."""

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
    interruptible,
    new_trace,
)


class Rollout:
    """Whole trajectories of some candidates, all rows at once; holds the best estimate while it runs.

    Args:
        problem: the task.
        transition: how to step.
        candidates: which candidates to run; latents are candidate-major, [len(candidates) * B, ...].
    """

    def __init__(self, problem: Problem, transition: Transition, candidates: list[int]) -> None:
        self.problem, self.transition, self.candidates = problem, transition, candidates
        self.rows = problem.rows.repeat(len(candidates))
        self.estimate: Prediction | None = None

    def run(self) -> Tensor:
        """Clean latents [len(candidates) * B, ...].

        Raises:
            Interrupted: on Ctrl-C or at the deadline; `estimate` then holds the last prediction.
        """
        problem, schedule = self.problem, self.problem.denoiser.schedule
        starts = [problem.initial(c) for c in self.candidates]
        x = starts[0] if len(starts) == 1 else torch.cat(starts)
        with interruptible(problem):
            for level in range(schedule.steps):
                check_deadline(problem)
                self.estimate = problem.denoiser.predict(x, level, self.rows)
                gaussian = self.transition(self.estimate, schedule, level, level + 1)
                x = problem.step(gaussian, level, self.candidates)
                problem.report(level, self.estimate)
        return x


@dataclass(frozen=True)
class Unguided:
    """One sample per prompt, nothing chosen.  With the `ode` transition it is the stock pipeline, bit for bit.

    Attributes:
        transition: how to step; the deterministic `ode` or a stochastic transition.
    """

    name: ClassVar[str] = "none"
    transition: Transition = Transition("ode")

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost: one denoiser evaluation per level and image (two with CFG)."""
        problem.require_budget()
        trace = new_trace(self, problem)
        rollout = Rollout(problem, self.transition, [0])
        try:
            x0 = rollout.run()
        except Interrupted:
            if rollout.estimate is None:
                raise
            x0 = rollout.estimate.x0
        return finished(problem, x0, trace)

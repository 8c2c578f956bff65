"""Unguided sampling: `none`."""

from dataclasses import dataclass
from typing import ClassVar

from rsm_guidance.core.transitions import SchedulerSteps, Transition
from rsm_guidance.rollouts.collect import trajectories
from rsm_guidance.samplers.kernel import Info, Result, Sampler, Solution
from rsm_guidance.samplers.task import Task


@dataclass(frozen=True)
class Unguided(Sampler):
    """One sample per prompt, nothing chosen.  At its default it is the stock pipeline, bit for bit.

    Attributes:
        transition: how to step; the pipeline's own scheduler, or one of ours.
    """

    name: ClassVar[str] = "none"
    transition: Transition = SchedulerSteps()

    def solve(self, task: Task) -> Solution:
        """Cost: one denoiser evaluation per level and image (two with CFG)."""
        for step in trajectories(task.denoiser, task.streams, self.transition, [0]):
            yield Info(step.level, step.estimate)
        return Result(step.next)

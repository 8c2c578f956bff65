"""Unguided sampling: `none`, and the rollouts that other samplers are made of."""

from collections.abc import Iterator
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
    """Whole trajectories of some candidates, all their prompts at once; holds the best estimate while it runs.

    Args:
        problem: the task.
        transition: how to step.
        candidates: which candidates to run; latents are candidate-major, [len(candidates) * B, ...].
        start: latents to start from, instead of the candidates' own; every run then draws what candidate 0 draws on
            its way, so that the outcome depends on nothing else.
        prompts: rows [P] of the prompts to run, all B by default; latents are then [len(candidates) * P, ...].
        others: latents [B, ...] to show for the rest while it runs.
    """

    def __init__(
        self,
        problem: Problem,
        transition: Transition,
        candidates: list[int],
        start: Tensor | None = None,
        prompts: Tensor | None = None,
        others: Tensor | None = None,
    ) -> None:
        self.problem, self.transition, self.candidates = problem, transition, candidates
        self.start, self.others = start, others
        self.prompts = problem.rows if prompts is None else prompts
        self.rows = self.prompts.repeat(len(candidates))
        self.estimate: Tensor | None = None

    def run(self) -> Tensor:
        """Clean latents [len(candidates) * B, ...].

        Raises:
            Interrupted: on Ctrl-C or at the deadline; `estimate` then holds the last estimate of the clean latents.
        """
        steps = self._own_steps() if self.transition.kind == "scheduler" else self._our_steps()
        with interruptible(self.problem):
            check_deadline(self.problem)
            for level, (prediction, x) in enumerate(steps):
                self.estimate = x if prediction is None else prediction.x0
                self.problem.report(level, self._shown(self.estimate))
                if level + 1 < self.problem.denoiser.steps:
                    check_deadline(self.problem)
        return x

    def _shown(self, estimate: Tensor) -> Tensor:
        """Estimates [>= B, ...] for every prompt."""
        if self.others is None or len(self.prompts) == self.problem.count:
            return estimate
        shown = self.others.clone()
        shown[self.prompts] = estimate[: len(self.prompts)].to(shown)
        return shown

    def _our_steps(self) -> Iterator[tuple[Prediction, Tensor]]:
        problem, schedule = self.problem, self.problem.denoiser.schedule
        candidates = self.candidates
        if self.start is None:
            starts = [self._of_prompts(problem.initial(c)) for c in candidates]
            x = starts[0] if len(starts) == 1 else torch.cat(starts)
        else:
            candidates, x = [0] * len(candidates), self.start
        for jump in self.transition.jumps(schedule):
            prediction, x = problem.advance(x, self.rows, jump, self.transition, candidates)
            yield prediction, x

    def _of_prompts(self, x: Tensor) -> Tensor:
        return x if len(self.prompts) == self.problem.count else x[self.prompts]

    def _own_steps(self) -> Iterator[tuple[Prediction | None, Tensor]]:
        if self.start is not None:
            return self.problem.denoiser.follow(self.rows, start=self.start)
        if self.candidates == [0] and len(self.prompts) == self.problem.count:
            return self.problem.denoiser.follow()
        prompts = self.prompts.tolist()
        generators = [starts[r] for starts in map(self.problem.starts, self.candidates) for r in prompts]
        return self.problem.denoiser.follow(self.rows, generators)


@dataclass(frozen=True)
class Unguided:
    """One sample per prompt, nothing chosen.  At its default it is the stock pipeline, bit for bit.

    Attributes:
        transition: how to step; the pipeline's own scheduler, or one of ours.
    """

    name: ClassVar[str] = "none"
    scales: ClassVar[str | None] = None
    transition: Transition = Transition("scheduler")

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
            x0 = rollout.estimate
        return finished(problem, x0, trace)

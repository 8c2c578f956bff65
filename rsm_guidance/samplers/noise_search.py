"""Search over the noises a sample grows from: "Inference-time scaling beyond denoising steps" (Ma et al., arXiv 2501.09732).

- `random`: independent starts, the best finished image wins; best-of-N under another name.
- `zero-order`: rounds of starts around the best one so far, x' = sqrt(1 - r^2) x + r f with a fresh noise f.  The first
  round is independent starts (ours; the paper begins around a single one), so one round is `random`.
- `paths`: N starts run to a noise level.  From there, in rounds, each path is noised back some levels in M - 1 ways, runs on
  again, and the best N of its prompt survive by the value of where they got.  The last round is judged by the final reward.
  Branch 0 of a path goes on undisturbed (ours), so one branch is best-of-N.

The fresh noise is such that x' has the law of a start also where starts hold an input image (`neighbours`).  `random` and `zero-order` see the
pipeline as a black box and go with any scheduler; noise that it draws on its way is the same for all starts of
`zero-order`, which searches the start alone.  All modes are greedy.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.random import Purpose
from rsm_guidance.core.rows import rows_where
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import ODE, SchedulerSteps, Transition
from rsm_guidance.rollouts.collect import interleave, trajectories, walk
from rsm_guidance.rollouts.record import Label
from rsm_guidance.samplers import kernel
from rsm_guidance.samplers.best_of_n import BestOfN, Winners
from rsm_guidance.samplers.kernel import Info, Result, Sampler, Solution, first_of, grouped, pick, table
from rsm_guidance.samplers.neighbours import neighbours
from rsm_guidance.samplers.task import Task


@dataclass(frozen=True)
class NoiseSearch(Sampler):
    """Search over starting noises, or over sampling paths.

    Attributes:
        mode: "random", "zero-order" or "paths".
        candidates: starts per round, >= 1, candidate 0 being the unguided one; in `paths` the paths N that are kept.
        rounds: >= 1; in `paths` how often paths branch, at levels evenly spread between `start` and the clean end.
        radius: r in (0, 1], `zero-order`: how far neighbours lie; 1 is an independent start.
        branches: M >= 1 per path and round (`paths`).
        start: noise level, as a fraction of the noisiest sigma, to which paths run before they branch first.
        back: how far a branch is noised back, as a share of the run's levels, in (0, 1].
        transition: how to step.  `paths` stops between levels: it takes the pipeline's own "scheduler" as "ode".
        batch_rows: how many latents one denoiser call takes at most (`random`, `zero-order`).
    """

    name: ClassVar[str] = "noise-search"
    budget_field: ClassVar[str | None] = "candidates"
    mode: Literal["random", "zero-order", "paths"] = "zero-order"
    candidates: int = 4
    rounds: int = 2
    radius: float = 0.6
    branches: int = 2
    start: float = 0.8
    back: float = 0.3
    transition: Transition = SchedulerSteps()
    batch_rows: int = 64

    def __post_init__(self) -> None:
        kernel.one_of(self, mode=("random", "zero-order", "paths"))
        kernel.at_least(self, 1, "candidates", "rounds", "branches", "batch_rows")
        kernel.share(self, "radius", "start", "back")
        if self.mode == "paths" and any(target - level > 1 for level, target in self.stepping.jumps(_LEVELS)):
            raise ValueError(
                f"paths branch between single levels, which the transition {self.transition.name!r} jumps; choose ode, ddim or "
                "cps"
            )

    @property
    def stepping(self) -> Transition:
        """Paths step by single levels, which the pipeline's own solver does not."""
        return ODE() if self.mode == "paths" and self.transition.whole_runs else self.transition

    def check(self, task: Task) -> None:
        if self.candidates * self.rounds > 1 or (self.mode == "paths" and self.branches > 1):
            kernel.require(self, task, value=self.mode == "paths" and self.branches > 1)

    def solve(self, task: Task) -> Solution:
        """Cost per image: `candidates` x `rounds` unguided samples with their final scores.

        `paths`: N unguided samples, and in every round N M value evaluations (of the final reward in the last),
        N (M - 1) `back` denoiser evaluations, and N (M - 1) for each level up to the next round.
        """
        if self.mode == "random":
            return BestOfN(self.candidates * self.rounds, self.transition, self.batch_rows).solve(task)
        return self._paths(task) if self.mode == "paths" else self._zero_order(task)

    # --- zero-order ---

    def _zero_order(self, task: Task) -> Solution:
        best, pivot, place = Winners(task), task.initial(0), task.initial(0)
        for round_ in range(self.rounds):
            for batch in self._batches(task, round_):
                starts = pivot if batch == [0] else interleave([self.near(task, c, pivot) for c in batch])
                own = None if batch == [0] else starts
                for step in trajectories(task.denoiser, task.streams, self.transition, batch, start=own):
                    shown = first_of(step.estimate, len(batch))
                    yield Info(step.level, shown, so_far=best.result if best.found else None)
                scores = task.final_scores(step.next, task.rows_of(len(batch)))
                if scores is None:
                    return Result(step.next)
                top = table(scores, len(batch)).argmax(1)
                better = best.see(step.next, table(scores, len(batch)), task.rows, batch)
                place = rows_where(better, pick(starts, top, len(batch)), place)
            pivot = place
            record = {"best": best.rewards.clone()}
            yield Info(task.steps, best.latents, record=record, section="rounds", so_far=best.result, silent=True)
        return best.result()

    def _batches(self, task: Task, round_: int) -> list[list[int]]:
        """Candidates of a round, at most `batch_rows` latents at once; candidate 0 runs alone, to be the unguided sample."""
        size = max(1, self.batch_rows // task.count)
        listed = list(range(round_ * self.candidates, (round_ + 1) * self.candidates))
        alone = [[0]] if round_ == 0 else []
        rest = listed[len(alone) :]
        return alone + [rest[i : i + size] for i in range(0, len(rest), size)]

    def near(self, task: Task, candidate: int, pivot: Tensor) -> Tensor:
        """Initial latents [B, ...] of a candidate: its own in the first round, then near the pivot [B, ...]."""
        if candidate < self.candidates or self.radius == 1:
            return task.initial(candidate)
        return neighbours(task, pivot, math.sqrt(1 - self.radius**2), Purpose.INITIAL, candidate)

    # --- paths ---

    def _stops(self, schedule: NoiseSchedule) -> list[int]:
        """Levels at which paths branch, and the clean one."""
        first = int((schedule.sigma > self.start * schedule.sigma[0]).sum().clamp(1, max(1, schedule.steps - 1)))
        return sorted(set(torch.linspace(first, schedule.steps, self.rounds + 1).round().long().tolist()))

    def _paths(self, task: Task) -> Solution:
        n, m, stops = self.candidates, self.branches, self._stops(task.schedule)
        own: list[Label] = [(c,) for c in range(n)]
        x, _ = yield from self._onward(task, task.initial(*range(n)), 0, stops[0], own)
        for round_, (level, target) in enumerate(zip(stops[:-1], stops[1:], strict=True)):
            # Branch 0 of a path keeps its place and its noise; those of the others are named by round and branch.
            labels = own + [(*p, round_, b) for p in own for b in range(1, m)]
            if m > 1:
                begin = max(0, level - max(1, round(self.back * task.steps)))
                again = self._back(task, x, level, begin, round_)
                again, _ = yield from self._onward(task, again, begin, level, labels[n:])
                x = torch.cat([grouped(x, n), grouped(again, n * (m - 1))], 1).flatten(0, 1)
            x, x0 = yield from self._onward(task, x, level, target, labels)
            if target < task.steps and m > 1:
                k = len(labels)
                scores = table(task.score(x, target, task.rows_of(k))[0], k)
                kept = scores.argsort(dim=1, descending=True, stable=True)[:, :n]  # the best first
                x = pick(x, kept, k)
                ancestors = torch.cat([kept, kept.repeat_interleave(m - 1, 1)], 1)  # of each branch of the next round
                estimate = pick(x0, kept[:, :1], k)
                yield Info(target - 1, estimate, scores, target, {"ancestors": ancestors}, silent=True)
        return kernel.best_of(task, x, len(x) // task.count)

    def _back(self, task: Task, x: Tensor, level: int, begin: int, round_: int) -> Tensor:
        """M - 1 copies [B * N * (M - 1), ...] of paths [B * N, ...], noised back to `begin`."""
        n, extra = self.candidates, self.branches - 1
        names = [(Purpose.BRANCH, p, round_, b) for p in range(n) for b in range(1, self.branches)] * task.count
        copies = x.repeat_interleave(extra, 0)
        noise = task.named_noise(task.rows_of(n * extra), x.shape[1:], names)
        return task.schedule.noise_back(copies, noise, level, begin)

    def _onward(
        self, task: Task, x: Tensor, level: int, target: int, labels: list[Label]
    ) -> Generator[Info, None, tuple[Tensor, Tensor]]:
        """Latents [B * K, ...] with labels [K], stepped on from `level` to `target`, and their last estimates."""
        k, x0, jumps = len(labels), x, [(at, at + 1) for at in range(level, target)]
        rows = task.rows_of(k)
        for step in walk(task.denoiser, task.streams, self.stepping, x, rows, labels * task.count, jumps):
            yield Info(step.level, first_of(step.estimate, k))
            x, x0 = step.next, step.estimate
        return x, x0


_LEVELS = NoiseSchedule.flow(4)  # any will do to see whether a transition takes one level at a time

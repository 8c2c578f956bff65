"""Search over the noises a sample grows from: "Inference-time scaling beyond denoising steps" (Ma et al., arXiv 2501.09732).

- `random`: independent starts, the best finished image wins; best-of-N under another name.
- `zero-order`: rounds of starts around the best one so far, x' = sqrt(1 - r^2) x + r f with a fresh noise f.  The first
  round is independent starts (ours; the paper begins around a single one), so one round is `random`.
- `paths`: N starts run to a noise level.  From there, in rounds, each path is noised back some levels in M - 1 ways, runs on
  again, and the best N of its prompt survive by the value of where they got.  The last round is judged by the final reward.
  Branch 0 of a path goes on undisturbed (ours), so one branch is best-of-N.

The fresh noise is f = (b f1 + c f2) / r of two draws with a + b + c = 1 and a^2 + b^2 + c^2 = 1, a = sqrt(1 - r^2), so that
x' has the law of a start also where starts hold an input image, their mean (ours).  `random` and `zero-order` see the
pipeline as a black box and go with any scheduler; noise that it draws on its way is the same for all starts of
`zero-order`, which searches the start alone.  All modes are greedy.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.rows import rows_where
from rsm_guidance.core.schedule import NoiseSchedule
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
from rsm_guidance.samplers.best_of_n import BestOfN
from rsm_guidance.samplers.rollout import Rollout


def neighbours(problem: Problem, x: Tensor, share: float, *name: int | str) -> Tensor:
    """Starts [B, ...] that keep a `share` in (-1, 1) of starts x [B, ...] and have their law; the rest is fresh, by name."""
    root = math.sqrt(max((1 - share) * (1 + 3 * share), 0.0))
    streams, rows = problem.streams, range(problem.count)
    first, second = (
        problem.denoiser.initial([streams.generator(r, *name, which) for r in rows]) for which in ("first", "second")
    )
    return share * x + (1 - share + root) / 2 * first + (1 - share - root) / 2 * second


@dataclass(frozen=True)
class NoiseSearch:
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
    scales: ClassVar[str | None] = "candidates"
    mode: Literal["random", "zero-order", "paths"] = "zero-order"
    candidates: int = 4
    rounds: int = 2
    radius: float = 0.6
    branches: int = 2
    start: float = 0.8
    back: float = 0.3
    transition: Transition = Transition("scheduler")
    batch_rows: int = 64

    def __post_init__(self) -> None:
        if self.mode not in ("random", "zero-order", "paths"):
            raise ValueError(f"mode must be 'random', 'zero-order' or 'paths'; got {self.mode!r}")
        for name in ("candidates", "rounds", "branches", "batch_rows"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("radius", "start", "back"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in (0, 1]; got {getattr(self, name)}")
        if self.mode == "paths" and self.transition.kind == "glass":
            raise ValueError(
                "paths branch between single levels, which glass transitions jump; choose ode, ddim or cps"
            )

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image: `candidates` x `rounds` unguided samples with their final scores.

        `paths`: N unguided samples, and in every round N M value evaluations (of the final reward in the last),
        N (M - 1) `back` denoiser evaluations, and N (M - 1) for each level up to the next round.
        A budget lowers the number of candidates (and branches).
        """
        if self.mode == "paths":
            own = self.transition.kind == "scheduler"
            sampler = replace(self, transition=Transition("ode")) if own else self
            return sampler._paths(problem)
        if self.mode == "random":
            output = BestOfN(self.candidates * self.rounds, self.transition, self.batch_rows).sample(problem)
            output.trace["sampler"] = new_trace(self, problem)["sampler"]
            return output
        return self._zero_order(problem)

    # --- zero-order ---

    def _zero_order(self, problem: Problem) -> SamplerOutput:
        if self.candidates * self.rounds > 1:
            problem.require_judge(self.name)
        problem.require_budget()
        trace = new_trace(self, problem) | {"rounds": []}
        count = problem.affordable(self.candidates * self.rounds, 0)
        pivot = problem.initial(0)
        latents, best, start = torch.empty(0), torch.empty(0), pivot
        chosen = torch.zeros(problem.count, dtype=torch.int64)
        scores: list[Tensor] = []
        rollout: Rollout | None = None
        try:
            for first in range(0, count, self.candidates):
                for batch in self._batches(problem, range(first, min(first + self.candidates, count))):
                    starts = pivot if batch == [0] else torch.cat([self._start(problem, c, pivot) for c in batch])
                    rollout = Rollout(problem, self.transition, batch, None if batch == [0] else starts)
                    x0 = rollout.run()
                    with interruptible(problem):
                        rewards = problem.final_rewards(x0, rollout.rows)
                    if rewards is None:
                        return finished(problem, x0, trace)
                    if not scores:
                        latents, best = x0, rewards
                    table, group = rewards.view(len(batch), -1), (len(batch), problem.count, *x0.shape[1:])
                    scores += list(table)
                    top, index = table.max(0)
                    better = top > best
                    picked = (index, problem.rows)
                    best = torch.where(better, top, best)
                    chosen = torch.where(better, torch.tensor(batch)[index], chosen)
                    latents = rows_where(better, x0.view(group)[picked], latents)
                    start = rows_where(better, starts.view(group)[picked], start)
                trace["rounds"].append({"best": best.tolist()})
                pivot = start
        except Interrupted:
            if not scores:
                if rollout is None or rollout.estimate is None:
                    raise
                return finished(problem, rollout.estimate, trace)
        trace["candidates"] = {"rewards": torch.stack(scores, 1).tolist(), "chosen": chosen.tolist()}
        return finished(problem, latents, trace, best)

    def _batches(self, problem: Problem, candidates: range) -> list[list[int]]:
        """Candidates in batches of at most `batch_rows` latents; candidate 0 runs alone, to be the unguided sample."""
        size, listed = max(1, self.batch_rows // problem.count), list(candidates)
        alone = [[0]] if 0 in candidates else []
        rest = listed[len(alone) :]
        return alone + [rest[i : i + size] for i in range(0, len(rest), size)]

    def _start(self, problem: Problem, candidate: int, pivot: Tensor) -> Tensor:
        """Starting latents [B, ...] of a candidate: its own in the first round, then one near the pivot [B, ...]."""
        if candidate < self.candidates or self.radius == 1:
            return problem.initial(candidate)
        return neighbours(problem, pivot, math.sqrt(1 - self.radius**2), "initial", candidate)

    # --- paths ---

    def _stops(self, schedule: NoiseSchedule) -> list[int]:
        """Levels at which paths branch, and the clean one."""
        first = int((schedule.sigma > self.start * schedule.sigma[0]).sum().clamp(1, max(1, schedule.steps - 1)))
        return sorted(set(torch.linspace(first, schedule.steps, self.rounds + 1).round().long().tolist()))

    def _levels_back(self, steps: int) -> int:
        return max(1, round(self.back * steps))

    def _paths(self, problem: Problem) -> SamplerOutput:
        if max(self.candidates, self.branches) > 1:
            problem.require_judge(self.name)
        if self.branches > 1 and problem.value is None:
            raise ValueError("noise-search with mode='paths' scores noisy latents: pass a reward or a value model")
        problem.require_budget()
        schedule, trace = problem.denoiser.schedule, new_trace(self, problem)
        stops = self._stops(schedule)
        n, m = self._affordable(problem, stops)
        run = _Paths(problem, self.transition)
        rewards: Tensor | None = None
        try:
            with interruptible(problem):
                starts = [problem.initial(c) for c in range(n)]
                x = run.advance(starts[0] if n == 1 else torch.cat(starts), 0, stops[0], list(range(n)))
                for round_, (level, target) in enumerate(zip(stops[:-1], stops[1:], strict=True)):
                    slots = list(range(n))
                    if m > 1:
                        begin = max(0, level - self._levels_back(schedule.steps))
                        names = [("branch", p, round_, b) for b in range(1, m) for p in range(n)]
                        noise = [
                            problem.streams.normal(r, x.shape[1:], *a) for a in names for r in problem.rows.tolist()
                        ]
                        copies = x.repeat(m - 1, *[1] * (x.ndim - 1))
                        again = schedule.noise_back(copies, torch.stack(noise), level, begin)
                        slots = [p + b * self.candidates for b in range(m) for p in range(n)]
                        own = [s + self.candidates * m * (round_ + 1) for s in slots[n:]]  # names of their noise
                        x = torch.cat([x, run.advance(again, begin, level, own)])
                    x = run.advance(x, level, target, slots)
                    if target < schedule.steps and m > 1:
                        scores = problem.values(x, target, run.rows(x)).view(-1, problem.count).T
                        order = scores.argsort(dim=1, descending=True, stable=True)
                        kept = order[:, :n]  # the best first: it is returned should the run be cut off
                        ancestors = kept.repeat(1, m).tolist()  # of each branch of the next round
                        trace["levels"].append({"level": target, "scores": scores.tolist(), "ancestors": ancestors})
                        index = (kept.T * problem.count + problem.rows).flatten()
                        x = x[index]
                rewards = problem.final_rewards(x, run.rows(x))
        except Interrupted:
            if run.estimate is None:
                raise
            return finished(problem, run.estimate[: problem.count], trace)
        return finished_best(problem, x, rewards, trace)

    def _affordable(self, problem: Problem, stops: list[int]) -> tuple[int, int]:
        """The paths N and branches M that the budget reaches for: fewer paths first, then fewer branches."""
        for m in range(self.branches, 0, -1):
            for n in range(self.candidates, 0, -1):
                if problem.affords(*self._cost(problem, stops, n, m)):
                    return n, m
        return 1, 1

    def _cost(self, problem: Problem, stops: list[int], n: int, m: int) -> tuple[float, int]:
        denoiser, value, rounds = problem.denoiser, problem.value, len(stops) - 1
        back = sum(min(self._levels_back(denoiser.steps), level) for level in stops[:-1])
        steps = n * (denoiser.steps + (m - 1) * (back + stops[-1] - stops[0]))
        between = n * m * (rounds - 1) if m > 1 and rounds else 0
        final = n * (m if rounds else 1)
        share, calls = (0.0, 0) if value is None else (value.evaluations_per_row, value.reward_calls_per_row)
        evaluations = steps * denoiser.evaluations_per_row + between * share + final * problem.final_cost
        return evaluations * problem.count, (between * calls + final * problem.final_calls) * problem.count


@dataclass
class _Paths:
    """Runs latents [P * B, ...], path-major, from level to level; keeps the last estimate of the clean ones."""

    problem: Problem
    transition: Transition
    estimate: Tensor | None = None

    def rows(self, x: Tensor) -> Tensor:
        return self.problem.rows.repeat(len(x) // self.problem.count)

    def advance(self, x: Tensor, level: int, target: int, slots: list[int]) -> Tensor:
        for at in range(level, target):
            check_deadline(self.problem)
            prediction, x = self.problem.advance(x, self.rows(x), (at, at + 1), self.transition, slots)
            self.estimate = prediction.x0
            self.problem.report(at, prediction.x0)
        return x

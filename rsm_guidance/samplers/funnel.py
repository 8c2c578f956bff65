"""Funnel: many particles at the noisy levels, few at the clean ones (arXiv 2508.12361; early pruning as in TTSnap).

N starts step on independently.  At level i, N (M / N)^(i / T) of them are kept, rounded: those of highest value, so that
most evaluations go where the image is still open, and the last M are scored as finished images.  With no pruning (M = N) it
is best-of-N.  Greedy.  (The papers shrink the population by resampling and by a threshold schedule; keeping the top is ours.)
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from rsm_guidance.core.transitions import CPS, Transition, require_levels
from rsm_guidance.samplers import kernel
from rsm_guidance.samplers.kernel import Info, Kernel, State, pick, places, table
from rsm_guidance.samplers.task import Task


@dataclass(frozen=True)
class Funnel(Kernel):
    """Prune from many starts to few finished images.

    Attributes:
        candidates: N >= 1 starts; the first is that of the unguided run.
        survivors: M in 1..N finished images, of which the final score picks one.
        start: share of the levels, in [0, 1), before which nothing is pruned: values of pure noise say little.
        transition: how to step; `ode` serves, too.
    """

    name: ClassVar[str] = "funnel"
    budget_field: ClassVar[str | None] = "candidates"
    candidates: int = 8
    survivors: int = 1
    start: float = 0.3
    transition: Transition = CPS(0.9)

    def __post_init__(self) -> None:
        if not 1 <= self.survivors <= self.candidates:
            raise ValueError(
                f"survivors must lie between 1 and the number of candidates; got {self.survivors} of {self.candidates}"
            )
        if not 0 <= self.start < 1:
            raise ValueError(f"start is a share of the levels in [0, 1); got {self.start}")
        require_levels(self.transition, "a funnel stops between levels to prune")

    def check(self, task: Task) -> None:
        if self.candidates > 1:
            kernel.require(self, task)

    def population(self, steps: int) -> list[int]:
        """Particles alive at each level 0..N."""
        n, m = self.candidates, self.survivors
        shares = [max(0.0, (i / steps - self.start) / (1 - self.start)) for i in range(steps + 1)]
        return [max(m, round(n * (m / n) ** share)) for share in shares]

    def init(self, task: Task) -> State:
        """Cost per image: as many denoiser evaluations as particles are alive, and a value for each before it shrinks."""
        return State(task.initial(*range(self.candidates)), self.candidates)

    def step(self, task: Task, state: State, jump: tuple[int, int]) -> tuple[State, Info]:
        target = jump[1]
        state, info = self.unguided(task, state, jump)
        count = self.population(task.steps)[target]
        if count >= state.k or task.value is None or target == task.steps:
            return state, info
        values, known = task.score(state.x, target, task.rows_of(state.k))
        scores = table(values, state.k)
        kept = scores.argsort(dim=1, descending=True, stable=True)[:, :count]
        known = None if known is None else known.pick(places(kept, state.k))
        info = replace(info, scores=scores, at=target, record={"kept": kept})
        return State(pick(state.x, kept, state.k), count, None, known), info

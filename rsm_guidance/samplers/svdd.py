"""Value-based selection in blocks: SVDD (arXiv 2408.08252) and its block-wise form CoDe (arXiv 2502.00968).

Every `block` levels K copies of the state run on independently, and one of them continues: the best by its value
(temperature 0), or one drawn with probability proportional to exp(V / lambda), which is SVDD's soft-optimal policy.
With block 1 the copies share their parent's denoiser evaluation (SVDD).  In a longer first block each copy starts from a
noise of its own, so that a block as long as the run is best-of-N.
Greedy when temperature is 0; with one particle also the soft form is a biased sample of the tilted posterior.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from rsm_guidance.core.random import Purpose
from rsm_guidance.core.transitions import CPS, GaussianTransition, require_gaussian
from rsm_guidance.core.weights import choose
from rsm_guidance.samplers import kernel
from rsm_guidance.samplers.kernel import Info, Kernel, Result, State, first_of, pick, places, table
from rsm_guidance.samplers.task import Task


@dataclass(frozen=True)
class SVDD(Kernel):
    """Keep one of K continuations at the end of every block of levels.

    Attributes:
        candidates: K >= 1 continuations; the first is the unguided one of the same seed.
        block: levels per block, >= 1.
        temperature: 0 keeps the best, lambda > 0 draws by exp(V / lambda).
        transition: how to step; a stochastic one, or there is nothing to choose.
    """

    name: ClassVar[str] = "svdd"
    budget_field: ClassVar[str | None] = "candidates"
    candidates: int = 4
    block: int = 1
    temperature: float = 0.0
    transition: GaussianTransition = CPS(0.9)

    def __post_init__(self) -> None:
        kernel.at_least(self, 1, "candidates", "block")
        kernel.finite(self, "temperature")
        require_gaussian(self.transition, "copies of one state share its denoiser evaluation")

    def check(self, task: Task) -> None:
        if self.candidates > 1:
            kernel.require(self, task)

    def init(self, task: Task) -> State:
        """Cost per image: 1 + K (block - 1) denoiser evaluations per block (K block in the first, if longer than one level),
        and K value evaluations."""
        k = self.candidates if self.block > 1 else 1
        return State(task.initial(*range(k)), k)

    def step(self, task: Task, state: State, jump: tuple[int, int]) -> tuple[State, Info]:
        level, target = jump
        prediction = state.prediction or task.predict(state.x, level, task.rows_of(state.k))
        info = Info(level, first_of(prediction.x0, state.k))
        parts = level % self.block == 0 and state.k == 1 and target < task.steps and self.candidates > 1
        if parts:
            k, x = self.candidates, task.children(self.transition, prediction, level, 1, self.candidates)
        else:
            k, x = state.k, task.step(self.transition, prediction, jump, state.k).next
        state = State(x, k, prediction.x0)
        if k == 1 or target == task.steps or target % self.block:
            return state, info
        values, known = task.score(x, target, task.rows_of(k))
        scores = table(values, k)
        chosen = self._chosen(task, scores, target)
        known = None if known is None else known.pick(places(chosen, k))
        state = State(pick(x, chosen, k), 1, state.x0, known)
        return state, replace(info, scores=scores, at=target, record={"chosen": chosen})

    def finish(self, task: Task, state: State) -> Result:
        scores = None if state.k == 1 else task.final_scores(state.x, task.rows_of(state.k))
        if scores is None:
            return Result(first_of(state.x, state.k))
        rewards = table(scores, state.k)
        chosen = self._chosen(task, rewards, task.steps)
        candidates = kernel.candidates_of(rewards, chosen)
        return Result(pick(state.x, chosen, state.k), rewards[task.rows, chosen], sections={"candidates": candidates})

    def _chosen(self, task: Task, scores: Tensor, level: int) -> Tensor:
        """Which of K copies [B, K] goes on, [B]."""
        if self.temperature == 0:
            return scores.argmax(1)
        draws = [task.streams.uniform(row, Purpose.SELECT, 0, level) for row in range(task.count)]
        return choose(scores / self.temperature, torch.tensor(draws, dtype=torch.float64))

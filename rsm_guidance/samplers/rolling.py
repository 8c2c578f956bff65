"""Budget-rolling selection (RBF, arXiv 2503.19385) and accept-threshold advance (Verifier-Threshold, arXiv 2512.08985).

At every level children are drawn one after the other from the parent's Gaussian and scored; the first that is good enough
continues at once, and the tries it leaves unused roll over to later levels.  Good enough means better than the value with
which the parent was accepted (`rbf`), or than a fixed `threshold`.  When the tries of a level are spent, its best child
continues.  Prompts are tried together, in rounds that shrink as they accept.  Greedy.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import CPS, GaussianTransition, require_gaussian
from rsm_guidance.samplers import kernel
from rsm_guidance.samplers.kernel import Info, Kernel, State
from rsm_guidance.samplers.task import Task


@dataclass(frozen=True)
class RollingSelection(Kernel):
    """Accept the first child that is good enough; unused tries roll over.

    Attributes:
        candidates: tries per level and prompt, >= 1; what a level leaves unused serves the later ones.
        threshold: value with which a child is accepted; None accepts what beats the parent's own value.
        transition: how to step; a stochastic one, or there is nothing to choose.
    """

    name: ClassVar[str] = "rbf"
    budget_field: ClassVar[str | None] = "candidates"
    adaptive: ClassVar[bool] = True
    candidates: int = 4
    threshold: float | None = None
    transition: GaussianTransition = CPS(0.9)

    def __post_init__(self) -> None:
        kernel.at_least(self, 1, "candidates")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be finite; got {self.threshold}")
        require_gaussian(self.transition, "children of one state share its denoiser evaluation")

    def check(self, task: Task) -> None:
        if self.candidates > 1:
            kernel.require(self, task, value=True)

    def init(self, task: Task) -> State:
        """Cost per image: one denoiser evaluation and at most K value evaluations per level, on the average of levels.

        When the budget no longer pays for a score, the run goes on unguided.  Carried are the tries that each prompt has
        left over [B, 1], and the value that its next child must exceed [B, 1].
        """
        below = -torch.inf if self.threshold is None else math.nextafter(self.threshold, -math.inf)
        spare = torch.zeros(task.count, 1, dtype=torch.int64)
        bar = torch.full((task.count, 1), below, dtype=torch.float64)
        return State(task.initial(0), carried={"spare": spare, "bar": bar})

    def step(self, task: Task, state: State, jump: tuple[int, int]) -> tuple[State, Info]:
        level, target = jump
        prediction = state.prediction or task.predict(state.x, level)
        stochastic = self.transition.std(task.schedule, level, target) > 0
        if not stochastic or self.candidates == 1 or target == task.steps:
            x = task.step(self.transition, prediction, jump).next
            return State(x, carried=state.carried), Info(level, prediction.x0)
        spare, bar = state.carried["spare"][:, 0], state.carried["bar"][:, 0]
        tries = _Tries(task, self.transition, prediction, jump)
        tries.run(spare + self.candidates, bar)
        if self.threshold is None:
            bar = torch.maximum(bar, tries.best)
        carried = {"spare": (spare + self.candidates - tries.used)[:, None], "bar": bar[:, None]}
        record = {"scores": tries.scores, "chosen": tries.chosen}
        return State(tries.x, carried=carried), Info(level, prediction.x0, at=target, record=record)


class _Tries:
    """Children of one level, tried until each prompt has one that is good enough."""

    def __init__(
        self, task: Task, transition: GaussianTransition, prediction: Prediction, jump: tuple[int, int]
    ) -> None:
        self.task, self.level = task, jump[0]
        self.gaussian = transition(prediction, task.schedule, *jump)
        self.x = self._child(0)
        self.best = torch.full((task.count,), -torch.inf, dtype=torch.float64)
        self.chosen = torch.zeros(task.count, dtype=torch.int64)
        self.used = torch.zeros(task.count, dtype=torch.int64)
        self.scores: list[list[float]] = [[] for _ in range(task.count)]

    def _child(self, number: int) -> Tensor:
        task, shape = self.task, self.gaussian.mean.shape[1:]
        return self.gaussian.sample(task.noise(task.rows, shape, self.level, [0] * task.count, number))

    def run(self, tries: Tensor, bar: Tensor) -> None:
        """Draw up to `tries` [B] children, of which the first above `bar` [B] is taken, else the best."""
        for attempt in range(int(tries.max())):
            active = ((attempt < tries) & ((self.best <= bar) | (self.used == 0))).nonzero().flatten()
            if not len(active) or not self.task.affords_values(len(active), self.level + 1):
                break
            children = self.x if attempt == 0 else self._child(attempt)
            values, _ = self.task.score(children[active], self.level + 1, active)
            better = values > self.best[active]
            rows = active[better]
            self.best[rows], self.chosen[rows] = values[better], attempt
            self.x = self.x.clone()
            self.x[rows] = children[rows]
            self.used[active] += 1
            for row, score in zip(active.tolist(), values.tolist(), strict=True):
                self.scores[row].append(score)

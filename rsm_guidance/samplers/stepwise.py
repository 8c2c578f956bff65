"""Step-wise Sampling with a diffusion reward model (arXiv 2605.25661, inference-time application).

At every level K children are drawn from the one Gaussian p(x_{i+1} | x_i), a value model scores them at their own noise
level, and the best continues:  x_{i+1} = argmax_k R(x_{i+1}^k, c).  All children share the parent's denoiser
evaluation, so a level costs one denoiser evaluation (two with CFG) and K value evaluations.

The paper leaves open which levels, which transition and whether initial noises compete; the options below are ours, and
their defaults are the best of a small scan on training captions of an earlier shapes model.  Greedy: it maximises, and does
not sample the tilted posterior.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.random import Purpose
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import CPS, ODE, GaussianTransition, require_gaussian
from rsm_guidance.core.weights import choose
from rsm_guidance.samplers import kernel
from rsm_guidance.samplers.kernel import Info, Kernel, State, first_of
from rsm_guidance.samplers.task import Task


@dataclass(frozen=True)
class StepwiseSampling(Kernel):
    """Keep the best of K children at every level.

    Attributes:
        candidates: K >= 1 children per level; child 0 is the unguided step of the same seed.
        transition: how to step where children compete; a stochastic one, or there is nothing to choose.
        window: noise levels (low, high), 0 <= low < high <= 1, as fractions of the noisiest sigma: children compete
            where their level lies inside; elsewhere there is one child.
        outside: "same" steps with `transition` outside the window, "ode" deterministically.
        initial_candidates: initial noises that compete at the noisiest level before the first step.
        trajectories: independent step-wise runs per image, of which the final score picks one; a reward model is surest of
            finished images, and a second start undoes greedy mistakes.
        temperature: 0 keeps the best child; above 0 one is drawn with probability softmax(score / temperature).
    """

    name: ClassVar[str] = "stepwise"
    budget_field: ClassVar[str | None] = "candidates"
    candidates: int = 4
    transition: GaussianTransition = CPS(0.9)
    window: tuple[float, float] = (0.0, 1.0)
    outside: Literal["same", "ode"] = "same"
    initial_candidates: int = 1
    trajectories: int = 1
    temperature: float = 0.0

    def __post_init__(self) -> None:
        kernel.at_least(self, 1, "candidates", "initial_candidates", "trajectories")
        kernel.check_window(self.window)
        kernel.finite(self, "temperature")
        kernel.one_of(self, outside=("same", "ode"))
        require_gaussian(self.transition, "children of one state share its denoiser evaluation")

    def check(self, task: Task) -> None:
        if max(self.candidates, self.initial_candidates) > 1:
            kernel.require(self, task, value=True)
        if self.trajectories > 1:
            kernel.require(self, task)

    def init(self, task: Task) -> State:
        """Cost per image: N denoiser evaluations (2 N with CFG) and K value evaluations at each level of the window, per run.

        A `State` holds one candidate for each of the runs.
        """
        k, runs = self.initial_candidates, self.trajectories
        x = task.initial(*range(runs * k))
        if k == 1:
            return State(x, runs)
        x, scores, chosen = self._select(task, x, 0, k)
        return State(x, runs, opening=Info(0, None, scores, 0, {"chosen": chosen}))

    def step(self, task: Task, state: State, jump: tuple[int, int]) -> tuple[State, Info]:
        level, target = jump
        prediction = task.predict(state.x, level, task.rows_of(state.k))
        shown = first_of(prediction.x0, state.k)
        inside = self.competes(task.schedule, level)
        if not inside or self.candidates == 1:
            transition = self.transition if inside or self.outside == "same" else ODE()
            x = task.step(transition, prediction, jump, state.k).next
            return State(x, state.k), Info(level, shown)
        children = task.children(self.transition, prediction, level, state.k, self.candidates)
        x, scores, chosen = self._select(task, children, target, self.candidates)
        return State(x, state.k, prediction.x0), Info(level, shown, scores, target, {"chosen": chosen})

    def competes(self, schedule: NoiseSchedule, level: int) -> bool:
        """Whether the children of `level` compete: they lie inside the window and the step draws noise."""
        if level + 1 == schedule.steps or self.transition.std(schedule, level, level + 1) == 0:
            return False
        return kernel.in_window(self.window, schedule, level + 1)

    def _select(self, task: Task, candidates: Tensor, level: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """One of every k candidates [B * runs * k, ...] by its value at `level`, all scores, and which it is.

        A prediction that the value has read is not taken along: made in a larger batch it may differ in its last bits, and a
        run with nothing to choose is to be the unguided one bit for bit.
        """
        count = len(candidates) // k
        rows = task.rows.repeat_interleave(count // task.count)
        scores = task.score(candidates, level, rows.repeat_interleave(k))[0].view(count, k)
        if self.temperature == 0:
            chosen = scores.argmax(1)
        else:
            runs = count // task.count
            draws = [task.streams.uniform(r, Purpose.SELECT, i % runs, level) for i, r in enumerate(rows.tolist())]
            chosen = choose(scores / self.temperature, torch.tensor(draws, dtype=torch.float64))
        return candidates[torch.arange(count) * k + chosen], scores, chosen

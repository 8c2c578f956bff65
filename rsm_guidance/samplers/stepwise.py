"""Step-wise Sampling with a diffusion reward model (arXiv 2605.25661, inference-time application).

At every level K children are drawn from the one Gaussian p(x_{i+1} | x_i), a value model scores them at their own noise
level, and the best continues:  x_{i+1} = argmax_k R(x_{i+1}^k, c).  All children share the parent's denoiser
evaluation, so a level costs one denoiser evaluation (two with CFG) and K value evaluations.

The paper leaves open which levels, which transition and whether initial noises compete; the options below are ours, and
their defaults are what our benchmark found best.  Greedy: it maximises, and does not sample the tilted posterior.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.core.weights import choose
from rsm_guidance.samplers.base import (
    Interrupted,
    Problem,
    SamplerOutput,
    check_deadline,
    finished,
    interruptible,
    new_trace,
)


@dataclass(frozen=True)
class StepwiseSampling:
    """Keep the best of K children at every level.

    Attributes:
        candidates: K >= 1 children per level; child 0 is the unguided step of the same seed.
        transition: how to step where children compete; a stochastic one, or there is nothing to choose.
        window: noise levels (low, high), 0 <= low < high <= 1, as fractions of the noisiest sigma: children compete
            where their level lies inside; elsewhere there is one child.
        outside: "same" steps with `transition` outside the window, "ode" deterministically.
        initial_candidates: initial noises that compete at the noisiest level before the first step.
        temperature: 0 keeps the best child; above 0 one is drawn with probability softmax(score / temperature).
    """

    name: ClassVar[str] = "stepwise"
    candidates: int = 4
    transition: Transition = Transition("cps", 0.9)
    window: tuple[float, float] = (0.0, 1.0)
    outside: Literal["same", "ode"] = "same"
    initial_candidates: int = 1
    temperature: float = 0.0

    def __post_init__(self) -> None:
        if self.candidates < 1 or self.initial_candidates < 1:
            raise ValueError(
                f"candidates and initial_candidates must be at least 1; got {self.candidates}, {self.initial_candidates}"
            )
        low, high = self.window
        if not 0 <= low < high <= 1:
            raise ValueError(f"window must be (low, high) with 0 <= low < high <= 1; got {self.window}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0; got {self.temperature}")
        if self.outside not in ("same", "ode"):
            raise ValueError(f"outside must be 'same' or 'ode'; got {self.outside!r}")

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image: N denoiser evaluations (2 N with CFG) and K value evaluations at each level of the window.

        When the budget no longer reaches for K scores, the run goes on unguided; at the deadline or on Ctrl-C the
        current estimate of the clean latents is returned.
        """
        if max(self.candidates, self.initial_candidates) > 1 and problem.value is None:
            raise ValueError(
                "the sampler 'stepwise' scores noisy latents: pass a diffusion reward model, or a reward, which is then "
                "applied to the decoded estimate"
            )
        problem.require_budget()
        schedule = problem.denoiser.schedule
        trace = new_trace(self, problem)
        estimate: Prediction | None = None
        x = problem.denoiser.initial()
        try:
            with interruptible(problem):
                x = self._start(problem, trace)
                for level in range(schedule.steps):
                    check_deadline(problem)
                    estimate = problem.denoiser.predict(x, level)
                    x, scores = self._advance(problem, estimate, level, trace)
                    problem.report(level, estimate, scores)
        except Interrupted:
            if estimate is None:
                raise
            x = estimate.x0
        return finished(problem, x, trace)

    def competes(self, schedule: NoiseSchedule, level: int) -> bool:
        """Whether the children of `level` compete: they lie inside the window and the step is not deterministic."""
        if self.transition.kind == "ode" or level + 1 == schedule.steps:
            return False
        low, high = self.window
        return low <= float(schedule.sigma[level + 1] / schedule.sigma[0]) <= high

    def _affordable(self, problem: Problem, level: int, count: int) -> bool:
        """Whether `count` scores per image leave enough to finish the remaining levels."""
        denoiser, value = problem.denoiser, problem.value
        if count == 1 or value is None:
            return False
        rest = (denoiser.schedule.steps - level) * denoiser.evaluations_per_row + problem.final_cost
        calls = count * value.reward_calls_per_row + problem.final_calls
        if problem.ledger.affords(
            (rest + count * value.evaluations_per_row) * problem.count,
            calls * problem.count,
            (calls + 1) * problem.count,
        ):
            return True
        problem.ledger.stop("budget")
        return False

    def _start(self, problem: Problem, trace: dict[str, Any]) -> Tensor:
        """Initial latents, the best of the competing ones."""
        if not self._affordable(problem, 0, self.initial_candidates):
            return problem.initial(0)
        starts = torch.stack([problem.initial(k) for k in range(self.initial_candidates)], 1)
        return self._select(problem, starts, 0, trace)[0]

    def _advance(
        self, problem: Problem, estimate: Prediction, level: int, trace: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The next latents [B, ...] and the scores [B, K] of the children, if they competed."""
        schedule = problem.denoiser.schedule
        inside = self.competes(schedule, level)
        transition = self.transition if inside or self.outside == "same" else Transition("ode")
        gaussian = transition(estimate, schedule, level, level + 1)
        if not inside or gaussian.std == 0 or not self._affordable(problem, level + 1, self.candidates):
            return problem.step(gaussian, level, [0]), None
        children = torch.stack([problem.step(gaussian, level, [0], child=k) for k in range(self.candidates)], 1)
        return self._select(problem, children, level + 1, trace)

    def _select(
        self, problem: Problem, children: Tensor, level: int, trace: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """One of the children [B, K, ...] per row, by their values at `level`."""
        b, k = children.shape[:2]
        scores = problem.values(children.flatten(0, 1), level, problem.rows.repeat_interleave(k)).view(b, k)
        if self.temperature == 0:
            chosen = scores.argmax(1)
        else:
            uniform = torch.tensor([problem.streams.uniform(r, "select", level) for r in range(b)], dtype=torch.float64)
            chosen = choose(scores / self.temperature, uniform)
        trace["levels"].append({"level": level, "scores": scores.tolist(), "chosen": chosen.tolist()})
        return children[problem.rows, chosen], scores

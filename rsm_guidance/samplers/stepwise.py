"""Step-wise Sampling with a diffusion reward model (arXiv 2605.25661, inference-time application).

At every level K children are drawn from the one Gaussian p(x_{i+1} | x_i), a value model scores them at their own noise
level, and the best continues:  x_{i+1} = argmax_k R(x_{i+1}^k, c).  All children share the parent's denoiser
evaluation, so a level costs one denoiser evaluation (two with CFG) and K value evaluations.

The paper leaves open which levels, which transition and whether initial noises compete; the options below are ours, and
their defaults are the best of a small scan on training captions of an earlier shapes model.  Greedy: it maximises, and does
not sample the tilted posterior.
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
    finished_best,
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
        trajectories: independent step-wise runs per image, of which the final judge picks one; a judge is surest of
            finished images, and a second start undoes greedy mistakes.
        temperature: 0 keeps the best child; above 0 one is drawn with probability softmax(score / temperature).
    """

    name: ClassVar[str] = "stepwise"
    scales: ClassVar[str | None] = "candidates"
    candidates: int = 4
    transition: Transition = Transition("cps", 0.9)
    window: tuple[float, float] = (0.0, 1.0)
    outside: Literal["same", "ode"] = "same"
    initial_candidates: int = 1
    trajectories: int = 1
    temperature: float = 0.0

    def __post_init__(self) -> None:
        for field in ("candidates", "initial_candidates", "trajectories"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1; got {getattr(self, field)}")
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
        if self.trajectories > 1:
            problem.require_judge(self.name)
        problem.require_budget()
        schedule = problem.denoiser.schedule
        trace = new_trace(self, problem)
        runs = list(range(problem.affordable(self.trajectories, 0)))
        rows = problem.rows.repeat(len(runs))  # latents are trajectory-major, [R * B, ...]
        estimate: Prediction | None = None
        try:
            with interruptible(problem):
                x = self._start(problem, runs, rows, trace)
                for level in range(schedule.steps):
                    check_deadline(problem)
                    estimate = problem.denoiser.predict(x, level, rows)
                    x, scores = self._advance(problem, estimate, level, runs, rows, trace)
                    problem.report(level, estimate.x0, scores)
        except Interrupted:
            if estimate is None:
                raise
            x = estimate.x0
        if len(runs) == 1:
            return finished(problem, x, trace)
        try:
            with interruptible(problem):
                rewards = problem.final_rewards(x, rows)
        except Interrupted:
            return finished(problem, x[: problem.count], trace)
        return finished_best(problem, x, rewards, trace)

    def competes(self, schedule: NoiseSchedule, level: int) -> bool:
        """Whether the children of `level` compete: they lie inside the window and the step is not deterministic."""
        if self.transition.kind == "ode" or level + 1 == schedule.steps:
            return False
        low, high = self.window
        return low <= float(schedule.sigma[level + 1] / schedule.sigma[0]) <= high

    def _affordable(self, problem: Problem, level: int, count: int, runs: int) -> bool:
        """Whether `count` scores per trajectory leave enough to finish the remaining levels of all of them."""
        denoiser, value = problem.denoiser, problem.value
        if count == 1 or value is None:
            return False
        rest = (denoiser.schedule.steps - level) * denoiser.evaluations_per_row + problem.final_cost
        calls = runs * (count * value.reward_calls_per_row + problem.final_calls)
        evaluations = runs * (rest + count * value.evaluations_per_row)
        return problem.affords(evaluations * problem.count, calls * problem.count)

    def _start(self, problem: Problem, runs: list[int], rows: Tensor, trace: dict[str, Any]) -> Tensor:
        """Initial latents of every trajectory, the best of those that compete for it."""
        k = self.initial_candidates
        if not self._affordable(problem, 0, k, len(runs)):
            starts = [problem.initial(r * k) for r in runs]
            return starts[0] if len(runs) == 1 else torch.cat(starts)
        candidates = torch.cat([torch.stack([problem.initial(r * k + c) for c in range(k)], 1) for r in runs])
        return self._select(problem, candidates, 0, rows, trace)[0]

    def _advance(
        self, problem: Problem, estimate: Prediction, level: int, runs: list[int], rows: Tensor, trace: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """The next latents [R * B, ...] and the scores [R * B, K] of the children, if they competed."""
        schedule = problem.denoiser.schedule
        inside = self.competes(schedule, level)
        transition = self.transition if inside or self.outside == "same" else Transition("ode")
        gaussian = transition(estimate, schedule, level, level + 1)
        if not inside or gaussian.std == 0 or not self._affordable(problem, level + 1, self.candidates, len(runs)):
            return problem.step(gaussian, level, runs), None
        children = torch.stack([problem.step(gaussian, level, runs, child=k) for k in range(self.candidates)], 1)
        return self._select(problem, children, level + 1, rows, trace)

    def _select(
        self, problem: Problem, children: Tensor, level: int, rows: Tensor, trace: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """One of the children [R * B, K, ...] per trajectory, by their values at `level`."""
        n, k = children.shape[:2]
        scores = problem.values(children.flatten(0, 1), level, rows.repeat_interleave(k)).view(n, k)
        if self.temperature == 0:
            chosen = scores.argmax(1)
        else:
            run = [i // problem.count for i in range(n)]
            draws = [problem.streams.uniform(r, "select", run[i], level) for i, r in enumerate(rows.tolist())]
            chosen = choose(scores / self.temperature, torch.tensor(draws, dtype=torch.float64))
        trace["levels"].append({"level": level, "scores": scores.tolist(), "chosen": chosen.tolist()})
        return children[torch.arange(n), chosen], scores

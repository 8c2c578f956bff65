"""Value-based selection in blocks: SVDD (arXiv 2408.08252) and its block-wise form CoDe (arXiv 2502.00968).

Every `block` levels K copies of the state run on independently, and one of them continues: the best by its value
(temperature 0), or one drawn with probability proportional to exp(V / lambda), which is SVDD's soft-optimal policy.
With block 1 the copies share their parent's denoiser evaluation (SVDD).  In a longer first block each copy starts from a
noise of its own, so that a block as long as the run is best-of-N.
Greedy when temperature is 0; with one particle also the soft form is a biased sample of the tilted posterior.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

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
class SVDD:
    """Keep one of K continuations at the end of every block of levels.

    Attributes:
        candidates: K >= 1 continuations; the first is the unguided one of the same seed.
        block: levels per block, >= 1.
        temperature: 0 keeps the best, lambda > 0 draws by exp(V / lambda).
        transition: how to step; a stochastic one, or there is nothing to choose.
    """

    name: ClassVar[str] = "svdd"
    scales: ClassVar[str | None] = "candidates"
    candidates: int = 4
    block: int = 1
    temperature: float = 0.0
    transition: Transition = Transition("cps", 0.9)

    def __post_init__(self) -> None:
        for name in ("candidates", "block"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be finite and at least 0; got {self.temperature}")

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image: 1 + K (block - 1) denoiser evaluations per block (K block in the first, if longer than one level),
        and K value evaluations."""
        if self.candidates > 1:
            problem.require_judge(self.name)
        problem.require_budget()
        trace = new_trace(self, problem)
        steps = problem.denoiser.schedule.steps
        x, rewards, estimate = problem.initial(0), None, None
        try:
            with interruptible(problem):
                for start in range(0, steps, self.block):
                    stop = min(start + self.block, steps)
                    k = self.candidates if self._affordable(problem, start, stop) else 1
                    if start == 0 and k > 1 and self.block > 1:
                        x = torch.cat([problem.initial(c) for c in range(k)])
                    children, estimate = self._run(problem, x, start, stop, k)
                    if k == 1:
                        x = children
                        continue
                    x, rewards = self._select(problem, children, stop, k, trace)
        except Interrupted:
            if estimate is None:
                raise
            return finished(problem, estimate, trace)
        return finished(problem, x, trace, rewards)

    def _run(self, problem: Problem, x: Tensor, start: int, stop: int, k: int) -> tuple[Tensor, Tensor]:
        """K continuations [K * B, ...] of states [B, ...] (or of K * B) over a block, and the first one's last estimate."""
        schedule, b = problem.denoiser.schedule, problem.count
        rows = problem.rows.repeat(len(x) // b)
        for level in range(start, stop):
            check_deadline(problem)
            prediction = problem.denoiser.predict(x, level, rows)
            gaussian = self.transition(prediction, schedule, level, level + 1)
            if level == start and k > 1 and len(x) == b:
                x = torch.cat([problem.step(gaussian, level, [0], child=c) for c in range(k)])
                rows = problem.rows.repeat(k)
            else:
                x = problem.step(gaussian, level, list(range(len(x) // b)))
            problem.report(level, prediction.x0)
        return x, prediction.x0[:b]

    def _select(
        self, problem: Problem, children: Tensor, level: int, k: int, trace: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """One child per prompt; also its reward, when the block ended at the clean level."""
        rows, clean = problem.rows.repeat(k), level == problem.denoiser.schedule.steps
        judged = problem.final_rewards(children, rows) if clean else problem.values(children, level, rows)
        assert judged is not None
        scores = judged.view(k, problem.count).T
        if self.temperature == 0:
            chosen = scores.argmax(1)
        else:
            draws = [problem.streams.uniform(r, "select", 0, level) for r in range(problem.count)]
            chosen = choose(scores / self.temperature, torch.tensor(draws, dtype=torch.float64))
        trace["levels"].append({"level": level, "scores": scores.tolist(), "chosen": chosen.tolist()})
        grouped = children.view(k, problem.count, *children.shape[1:])
        return grouped[chosen, problem.rows], scores[problem.rows, chosen] if clean else None

    def _affordable(self, problem: Problem, start: int, stop: int) -> bool:
        """Whether there is something to choose in this block, and K continuations leave enough to finish the run."""
        denoiser, value = problem.denoiser, problem.value
        if self.candidates == 1 or start == denoiser.steps - 1:  # the last step alone adds no noise
            return False
        clean = stop == denoiser.steps
        share, calls = (
            (problem.final_cost, problem.final_calls)
            if clean or value is None
            else (value.evaluations_per_row, value.reward_calls_per_row)
        )
        shared = 0 if start == 0 and self.block > 1 else 1
        run = shared + self.candidates * (stop - start - shared) + denoiser.steps - stop
        evaluations = (
            run * denoiser.evaluations_per_row + self.candidates * share + (0 if clean else problem.final_cost)
        )
        reward_calls = self.candidates * calls + (0 if clean else problem.final_calls)
        return problem.affords(evaluations * problem.count, reward_calls * problem.count)

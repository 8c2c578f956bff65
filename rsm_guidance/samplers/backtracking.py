"""Depth-first search with backtracking: "Inference-time scaling of diffusion models through classical search" (arXiv 2505.23614).

A trajectory goes on while its value passes the bar delta_t of the level it has reached.  When it does not, it is noised back
by some levels with fresh noise and tries again; easy prompts spend little, hard ones more.  When its attempts are used up,
it goes on from the best state seen at that level.

Ours: levels are checked a few times in a run, the clean one last, and its judge is the final reward.  The attempts are shared
out over the checks: what an earlier one leaves unused serves the later ones.  Whatever ends the attempts, the best state
seen at the check continues.  `threshold=None` needs no bar in the reward's units: a state passes if it reaches the
`quantile` of all values that its own prompt has seen at this check, of which there must be two at least.
Prompts move together, in rounds at the noisiest level at which one of them stands.  Greedy.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from rsm_guidance.core.random import Purpose
from rsm_guidance.core.transitions import CPS, GaussianTransition, require_gaussian
from rsm_guidance.samplers import kernel
from rsm_guidance.samplers.kernel import Info, Result, Sampler, Solution
from rsm_guidance.samplers.task import Task


@dataclass(frozen=True)
class Backtracking(Sampler):
    """Go back and try again where the value falls short.

    Attributes:
        attempts: how often a trajectory may go back in all, >= 0.
        back: how far it goes back, as a share of the run's levels, in (0, 1].
        checks: levels at which it is judged, evenly spread up to the clean one, >= 1.
        threshold: value that passes; None takes the bar from the values seen so far.
        quantile: of these values, in [0, 1].
        transition: how to step; a deterministic one will do, since going back brings new noise, but less of it.
    """

    name: ClassVar[str] = "backtracking"
    budget_field: ClassVar[str | None] = "attempts"
    least: ClassVar[int] = 0
    adaptive: ClassVar[bool] = True
    attempts: int = 6
    back: float = 0.5
    checks: int = 4
    threshold: float | None = None
    quantile: float = 0.5
    transition: GaussianTransition = CPS(0.9)

    def __post_init__(self) -> None:
        kernel.at_least(self, 0, "attempts")
        kernel.at_least(self, 1, "checks")
        kernel.share(self, "back")
        if not 0 <= self.quantile <= 1:
            raise ValueError(f"quantile must be in [0, 1]; got {self.quantile}")
        if self.threshold is not None and not math.isfinite(self.threshold):
            raise ValueError(f"threshold must be finite; got {self.threshold}")
        require_gaussian(self.transition, "it is stopped at single levels")

    def check(self, task: Task) -> None:
        if self.attempts:
            kernel.require(self, task, value=self.checks > 1)

    def solve(self, task: Task) -> Solution:
        """Cost per image: an unguided sample, a value evaluation at each check, and for every attempt that is used
        `back` of a run and another evaluation.  An image's budget bounds its attempts, whatever the others use.
        """
        search = _Search(self, task)
        yield from search.run()
        return search.result()


class _Search:
    """Where every row stands, and what it has seen."""

    def __init__(self, config: Backtracking, task: Task) -> None:
        self.config, self.task = config, task
        self.schedule, count = task.schedule, task.count
        self.steps = self.schedule.steps
        self.back = max(1, round(config.back * self.steps))
        self.spare = [math.inf] * count  # denoiser evaluations that each row may spend on going back
        self.spare_calls = [math.inf] * count
        self.checks = self._affordable_checks()
        self.x = task.initial(0)
        self.level = [0] * count
        self.next = [0] * count  # index of the row's next check
        self.used = [0] * count  # attempts
        self.attempt = [0] * count  # that is under way, by which its noise is named; 0 where the row goes on
        self.seen: list[list[list[float]]] = [[[] for _ in self.checks] for _ in range(count)]
        self.best: list[Tensor | None] = [None] * count  # at the row's next check
        self.rewards: list[float | None] = [None] * count
        self.estimate = self.x
        self.visits: list[dict[str, Any]] = []

    # --- what may be spent ---

    def _price(self, level: int) -> tuple[float, int]:
        """Denoiser evaluations and reward calls of scoring one latent at a check."""
        task = self.task
        if level == self.steps:
            return task.final_cost, task.final_calls
        return task.value_cost(reused=False), task.value.reward_calls_per_row

    def _affordable_checks(self) -> list[int]:
        """The levels to score at; none where there is nothing to go back for or to pay with."""
        task, config = self.task, self.config
        if not config.attempts:
            return []
        spread = torch.linspace(0, self.steps, config.checks + 1).round().long().tolist()
        checks = sorted(set(spread) - {0})
        prices = [self._price(level) for level in checks]
        cost = self.steps * task.denoiser.evaluations_per_row + sum(p for p, _ in prices)
        calls = sum(c for _, c in prices)
        budget = task.ledger.budget
        if not task.ledger.affords(cost * task.count, calls * task.count, (calls + 1) * task.count):
            task.ledger.stop("budget")
            return []
        left = min([cap - more for cap, more in ((budget.reward_calls, 0), (budget.decodes, 1)) if cap] or [math.inf])
        # What a single row may spend on going back, so that no row depends on the others.
        self.spare = [(budget.evaluations or math.inf) - cost] * task.count
        self.spare_calls = [left - calls] * task.count
        return checks

    def _try_again(self, row: int, level: int) -> bool:
        """Whether a row that stands at a check has an attempt left, and pays for it."""
        limit = math.ceil(self.config.attempts * (self.next[row] + 1) / len(self.checks))
        if self.used[row] >= limit:
            return False
        price, calls = self._price(level)
        cost = min(self.back, level) * self.task.denoiser.evaluations_per_row + price
        if cost > self.spare[row] + 1e-6 or calls > self.spare_calls[row]:
            self.task.ledger.stop("budget")
            return False
        self.spare[row] -= cost
        self.spare_calls[row] -= calls
        self.used[row] += 1
        return True

    # --- moving ---

    def run(self) -> Iterator[Info]:
        """Take every row to the clean level."""
        while min(self.level) < self.steps:
            at = min(self.level)
            rows = [r for r, level in enumerate(self.level) if level == at]
            self._step(rows, at)
            yield Info(at, self.estimate, so_far=self.so_far)
            due = [r for r in rows if self.checks and self.checks[self.next[r]] == at + 1]
            if due:
                self._check(due, at + 1)

    def _step(self, rows: list[int], level: int) -> None:
        task, index = self.task, torch.tensor(rows)
        prediction = task.predict(self.x[index], level, index)
        gaussian = self.config.transition(prediction, self.schedule, level, level + 1)
        names = [(Purpose.STEP, 0, level, self.attempt[r]) for r in rows]
        noise = torch.zeros(1) if gaussian.std == 0 else task.named_noise(index, self.x.shape[1:], names)
        self.x, self.estimate = self.x.clone(), self.estimate.clone()
        self.x[index] = gaussian.sample(noise)
        self.estimate[index] = prediction.x0
        for row in rows:
            self.level[row] = level + 1

    def _check(self, rows: list[int], level: int) -> None:
        """Score rows at their check; each goes back, or on from the best state it has seen here."""
        task, index = self.task, torch.tensor(rows)
        clean = level == self.steps
        found = task.final_scores(self.x[index], index) if clean else task.score(self.x[index], level, index)[0]
        assert found is not None
        back = []
        for row, value in zip(rows, found.tolist(), strict=True):
            seen = self.seen[row][self.next[row]]
            if not seen or value > max(seen):
                self.best[row] = self.x[row].clone()
            seen.append(value)
            again = not self._passes(seen) and self._try_again(row, level)
            self.visits.append({"row": row, "level": level, "value": value, "back": again})
            if again:
                back.append(row)
            else:
                self._accept(row, level)
        if back:
            target = max(0, level - self.back)
            names = [(Purpose.BACK, level, self.used[r]) for r in back]
            noise = task.named_noise(torch.tensor(back), self.x.shape[1:], names)
            self.x[back] = self.schedule.noise_back(self.x[back], noise, level, target)
            for row in back:
                self.level[row], self.attempt[row] = target, self.used[row]

    def _passes(self, seen: list[float]) -> bool:
        if self.config.threshold is not None:
            return seen[-1] >= self.config.threshold
        values = torch.tensor(seen, dtype=torch.float64)
        return len(seen) > 1 and seen[-1] >= float(values.quantile(self.config.quantile))

    def _accept(self, row: int, level: int) -> None:
        best, seen = self.best[row], self.seen[row][self.next[row]]
        assert best is not None
        self.x[row] = best
        self.best[row], self.attempt[row] = None, 0
        self.next[row] = min(self.next[row] + 1, len(self.checks) - 1)
        if level == self.steps:
            self.rewards[row] = max(seen)

    # --- reports ---

    def result(self) -> Result:
        """The finished search."""
        known = bool(self.checks) and None not in self.rewards
        rewards = torch.tensor(self.rewards, dtype=torch.float64) if known else None
        return Result(self.x, rewards, sections=self._sections())

    def so_far(self) -> Result:
        """An unfinished search: finished images where there are any, estimates elsewhere."""
        latents = self.estimate.clone()
        for row, (reward, best) in enumerate(zip(self.rewards, self.best, strict=True)):
            if reward is not None:
                latents[row] = self.x[row]
            elif best is not None and self.checks[self.next[row]] == self.steps:
                latents[row] = best
        return Result(latents, sections=self._sections())

    def _sections(self) -> dict[str, Any]:
        """All visits, and per check that all rows have reached the values seen by each row and the one that went on."""
        listed = []
        for i, level in enumerate(self.checks):
            scores = [rows[i] for rows in self.seen]
            if all(scores):
                listed.append({"level": level, "scores": scores, "chosen": [s.index(max(s)) for s in scores]})
        return {"levels": listed, "visits": self.visits}

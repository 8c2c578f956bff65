"""The one driver of every sampling method: budget, deadline, Ctrl-C, progress, trace, and the best so far."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rsm_guidance.core.contracts import StopRequested, UsageError
from rsm_guidance.rewards import name_of
from rsm_guidance.samplers.kernel import Info, Result, Sampler, SamplerOutput
from rsm_guidance.samplers.planning import planned
from rsm_guidance.samplers.task import Progress, Task


class DeadlinePassed(UsageError):
    """The deadline passed before there was anything to return."""


class _CutOff(Exception):
    """A run is to end here; `why` as in `Ledger.stop`."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why


def run(sampler: Sampler, task: Task) -> SamplerOutput:
    """Solve a task.

    A budget lowers the method's size, and below the smallest the number of guided levels, so that no cap is broken.  At the
    deadline, on Ctrl-C, or when a gold reward has seen enough, the best so far is returned.

    Raises:
        ValueError: if the task lacks what the method needs, or the budget does not pay for one unguided image.
        KeyboardInterrupt, DeadlinePassed: if there was nothing to return yet.
    """
    sampler.check(task)
    require_budget(task)
    method, task.guided_levels = planned(sampler, task)
    trace = _opened(sampler, task)
    last: Info | None = None
    best: Info | None = None
    result: Result | None = None
    steps = method.solve(task)
    try:
        while result is None:
            _check(task, last)
            try:
                last = next(steps)
            except StopIteration as end:
                result = end.value
                break
            best = best if last.x0 is None else last
            if entry := last.entry():
                trace.setdefault(last.section, []).append(entry)
            _report(task, last)
    except (KeyboardInterrupt, StopRequested) as interrupt:
        task.ledger.stop("interrupted")
        if best is None:
            raise KeyboardInterrupt from interrupt
    except _CutOff as cut:
        task.ledger.stop(cut.why)
        if best is None:
            raise DeadlinePassed(
                f"the deadline of {task.ledger.budget.seconds} s passed before the first denoising step; allow more time"
            ) from cut
    finally:
        steps.close()
    if result is None:
        assert best is not None and best.x0 is not None
        result = Result(best.x0) if best.so_far is None else best.so_far()
    return _closed(task, result, trace)


def require_budget(task: Task) -> None:
    """Raise a ValueError if the budget does not pay for one unguided image."""
    budget, cost = task.ledger.budget, task.denoiser.evaluations_per_row
    for cap, calls, what in (
        (budget.reward_calls, task.final_calls, "reward calls"),
        (budget.decodes, task.final_calls + 1, "decodes"),
    ):
        if cap is not None and calls > cap:
            raise UsageError(f"a budget of {cap:g} {what} is too small: one finished image takes {calls}; raise it")
    needed = task.steps * cost + task.final_cost
    if budget.evaluations is not None and needed > budget.evaluations + 1e-6:
        raise UsageError(
            f"a budget of {budget.evaluations:g} denoiser evaluations cannot finish one image: {task.steps} steps at "
            f"{cost:g} and the final score take {needed:g}; raise the budget or take fewer steps"
        )


def _check(task: Task, last: Info | None) -> None:
    """Cut the run off at the deadline, or when the gold reward has seen enough; not between the last step and its score."""
    if last is not None and last.level == task.steps - 1:
        return
    if task.watch is not None and task.watch.stopped:
        raise _CutOff("over-optimised")
    if task.ledger.late:
        raise _CutOff("deadline")


def _report(task: Task, info: Info) -> None:
    if task.progress is not None and info.x0 is not None and not info.silent and info.level < task.steps:
        task.progress(Progress(info.level + 1, task.steps, info.x0.detach(), info.scores))


def _opened(sampler: Sampler, task: Task) -> dict[str, Any]:
    """A trace with the sampler's settings, the prompts and, where the run steps by itself, the noise levels."""
    return {
        "sampler": sampler.described(),
        "target": sampler.target,
        "prompts": list(task.denoiser.prompts),
        "seed": task.streams.seed,
        "steps": task.steps,
        "sigma": None if sampler.stepping.whole_runs else task.schedule.sigma.tolist(),
        "levels": [],
    }


def _closed(task: Task, result: Result, trace: dict[str, Any]) -> SamplerOutput:
    """Score what has not been scored, and close the books.  A second Ctrl-C leaves the latents without scores."""
    rewards = result.rewards
    with _kept(task):
        if rewards is None:
            rewards = task.final_scores(result.latents, task.rows)
    rewards = None if rewards is None else task.failures.closed(rewards)
    trace |= result.sections | task.failures.record()
    if task.watch is not None:
        trace["monitor"] = {"name": name_of(task.watch.monitor.reward), "history": task.watch.history}
    task.ledger.finish()
    trace["rewards"] = None if rewards is None else [r if math.isfinite(r) else None for r in rewards.tolist()]
    trace["ledger"] = task.ledger.to_dict()
    normalizer = result.log_normalizer
    trace["log_normalizer"] = None if normalizer is None else normalizer.tolist()
    return SamplerOutput(result.latents, rewards, normalizer, result.particles, task.ledger, trace)


@contextmanager
def _kept(task: Task) -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        task.ledger.stop("interrupted")

"""What a sampler costs, and how large it may be for a budget: found by running it on a toy of the same costs.

No sampler has to know its own cost formula: a dry run over the same levels books every evaluation that a real one books,
without a network.  Samplers whose cost depends on the values they meet are estimated, and those that stop at a good enough
reward (`accept`) taken not to; these mind the budget themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.core.ledger import Budget, Ledger
from rsm_guidance.core.meter import MeteredValue
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.oracles.mixture import GaussianMixture, GaussianMixtureDenoiser
from rsm_guidance.samplers.kernel import Kernel, Sampler
from rsm_guidance.samplers.task import Task
from rsm_guidance.samplers.unguided import Unguided

_MOST = 512
_WIDTH = 4


@dataclass(frozen=True)
class Costs:
    """What a run consists of.

    Attributes:
        schedule: the levels.
        per_level: denoiser evaluations per latent and level (2 with CFG).
        value: denoiser evaluations of scoring one noisy latent by a model of latents; None if a reward of the decoded
            estimate scores them.
        final: denoiser evaluations of scoring one finished image.
        ahead: denoiser evaluations of a value beyond the prediction that it reads (lookahead).
        value_calls: reward calls of one value; None for 1 where a reward of the decoded estimate scores, else 0.
        final_calls: reward calls of one final score; None for 1 unless a model of latents gives it, else 0.
    """

    schedule: NoiseSchedule
    per_level: float
    value: float | None
    final: float
    ahead: float = 0.0
    value_calls: int | None = None
    final_calls: int | None = None

    @property
    def once(self) -> float:
        """Of one unguided image and its final score."""
        return self.schedule.steps * self.per_level + self.final

    @staticmethod
    def of(task: Task) -> "Costs":
        """Those of a task."""
        per_level = float(task.denoiser.evaluations_per_row)
        try:
            schedule = task.schedule
        except ValueError:  # the scheduler steps by itself, and its levels cannot be read
            schedule = NoiseSchedule.flow(task.steps)
        value = task.value
        if value is None:
            return Costs(schedule, per_level, 0.0, task.final_cost, 0.0, 0, task.final_calls)
        reads = value.reads_prediction
        own = None if reads else float(value.evaluations_per_row)
        ahead = value.evaluations_per_row - per_level if reads else 0.0
        return Costs(schedule, per_level, own, task.final_cost, ahead, value.reward_calls_per_row, task.final_calls)


class _ToyDenoiser(GaussianMixtureDenoiser):
    """That of a standard normal law, at the costs of a run."""

    def __init__(self, costs: Costs) -> None:
        self.per_level = costs.per_level
        mixture = GaussianMixture.from_weights([1.0], [[0.0] * _WIDTH], 1.0)
        super().__init__(mixture, costs.schedule, ["toy"])

    @property
    def evaluations_per_row(self) -> float:
        return self.per_level


@dataclass(frozen=True)
class _ToyReward:
    """|x|^2, negative, at the costs of a final score."""

    share: float
    name: str = "toy"
    differentiable: bool | None = True
    requires: tuple[str, ...] = ()

    def __call__(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        return -images.square().sum(1)


class _ToyValue:
    """|x|^2 of latents or of their estimate, negative, at the costs of a value."""

    name = "toy"

    def __init__(self, costs: Costs, denoiser: Any, ledger: Ledger) -> None:
        self._costs, self._denoiser, self._ledger = costs, denoiser, ledger
        self.reads_prediction = costs.value is None
        self.share = 0.0 if costs.value is None else costs.value
        self.evaluations_per_row = costs.per_level + costs.ahead if costs.value is None else costs.value
        calls = int(costs.value is None) if costs.value_calls is None else costs.value_calls
        self.reward_calls_per_row = calls

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        self._ledger.reward_calls += len(x) * self.reward_calls_per_row
        self._ledger.decodes += len(x) * self.reward_calls_per_row
        if self.reads_prediction and level < self._denoiser.steps:
            x = (prediction or self._denoiser.predict(x, level, rows)).x0
            self._ledger.denoiser_evaluations += len(x) * self._costs.ahead
        return -x.square().sum(1)


def rehearsal(costs: Costs, budget: Budget | None = None) -> Task:
    """A toy task for one image at the costs of a real one."""
    by_model = costs.final_calls == 0 if costs.final_calls is not None else costs.value is not None and costs.final > 0
    streams = RandomStreams.for_prompts(0, ["toy"])
    task = Task(_ToyDenoiser(costs), streams, Ledger(budget or Budget()), None if by_model else _ToyReward(costs.final))
    task.value = MeteredValue(_ToyValue(costs, task.denoiser, task.ledger), task.ledger)
    return task


def dry_run(sampler: Sampler, costs: Costs, guided_levels: int | None = None) -> Ledger:
    """What making one image spends, found by making it with a toy model of the same costs."""
    if getattr(sampler, "accept", None) is not None:
        sampler = replace(sampler, accept=None)  # type: ignore[type-var]
    task = rehearsal(costs)
    task.guided_levels = guided_levels
    with torch.no_grad():
        steps = sampler.solve(task)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                if end.value.rewards is None:
                    task.final_scores(end.value.latents, task.rows)
                return task.ledger


def cost(sampler: Sampler, costs: Costs) -> float:
    """Denoiser evaluations of one image: those of a dry run."""
    return dry_run(sampler, costs).evaluations


def planned(sampler: Sampler, task: Task) -> tuple[Sampler, int | None]:
    """The sampler as large as the budget of a task allows, and its number of guided levels (None for all).

    Where nothing above its smallest size fits, a method that goes through the levels once is guided at the first, noisiest
    levels alone, any other not at all.
    Methods that mind the budget themselves are returned as they are.
    """
    budget = task.ledger.budget
    if (
        sampler.adaptive
        or not task.can_score
        or (budget.evaluations, budget.reward_calls, budget.decodes) == (None,) * 3
    ):
        return sampler, None
    costs = Costs.of(task)

    def fits(trial: Sampler, guided_levels: int | None = None) -> bool:
        spent = dry_run(trial, costs, guided_levels)
        caps = (
            (budget.evaluations, spent.evaluations),
            (budget.reward_calls, spent.reward_calls),
            (budget.decodes, spent.decodes + 1),  # the pipeline decodes what is returned
        )
        return all(cap is None or need <= cap + 1e-6 for cap, need in caps)

    if fits(sampler):
        return sampler, None
    task.ledger.stop("budget")
    smallest = _smallest(sampler)
    name = sampler.budget_field
    if fits(smallest):
        found = _largest(smallest, getattr(sampler, str(name)), fits)
        if found is not smallest or not isinstance(sampler, Kernel):
            return found, None
        smallest = replace(smallest, **{str(name): getattr(smallest, str(name)) + 1})  # type: ignore[type-var]
    if not isinstance(sampler, Kernel) or not fits(smallest, 0):
        return Unguided(sampler.stepping), None
    levels = 0
    while levels < costs.schedule.steps and fits(smallest, levels + 1):
        levels += 1
    return smallest, levels


def fit_to_budget(sampler: Sampler, budget: float, costs: Costs) -> Sampler:
    """The sampler with as many candidates, particles, ... (its `budget_field`) as a budget pays for.

    Args:
        sampler: any; one without such a field is returned as it is.
        budget: denoiser evaluations per image.
        costs: of the run.

    Raises:
        UsageError: if the budget does not pay for the sampler at its smallest.
    """
    if budget < costs.once - 1e-6:
        raise UsageError(f"a budget of {budget:g} denoiser evaluations is less than the {costs.once:g} of one image")
    name = sampler.budget_field
    if name is None:
        return sampler
    low = _smallest(sampler)
    if cost(low, costs) > budget + 1e-6:
        raise UsageError(
            f"a budget of {budget:g} denoiser evaluations is less than the {cost(low, costs):g} of {low.name} at its "
            f"smallest ({name}={getattr(low, name)})"
        )
    return _largest(low, _MOST - 1, lambda trial: cost(trial, costs) <= budget + 1e-6)


def _largest(smallest: Sampler, most: int, fits: Callable[[Sampler], bool]) -> Sampler:
    """The largest size up to `most` that fits, from one that does."""
    name = str(smallest.budget_field)
    fitting, size, too_many = smallest, getattr(smallest, name), most + 1
    upper = size
    while upper < too_many - 1:  # double, then halve the gap
        upper = min(2 * max(upper, 1), too_many - 1)
        trial: Any = replace(smallest, **{name: upper})  # type: ignore[type-var]
        if not fits(trial):
            too_many = upper
        else:
            fitting, size = trial, upper
    while too_many - size > 1:
        middle = (size + too_many) // 2
        trial = replace(smallest, **{name: middle})  # type: ignore[type-var]
        if fits(trial):
            fitting, size = trial, middle
        else:
            too_many = middle
    return fitting


def _smallest(sampler: Sampler) -> Sampler:
    """The sampler with the smallest size that its other settings allow."""
    name = sampler.budget_field
    if name is None:
        return sampler
    for size in range(sampler.least, getattr(sampler, name) + 1):
        try:
            small: Sampler = replace(sampler, **{name: size})  # type: ignore[type-var]
        except ValueError:
            continue
        return small
    return sampler

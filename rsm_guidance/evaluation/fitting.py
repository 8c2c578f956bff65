"""What a sampler costs, and how large it may be for a budget: found by running it on a toy of the same costs.

No sampler has to know its own cost formula: a dry run over the same levels books every evaluation that a real one books,
without a network.  Samplers whose cost depends on the values they meet (rbf, backtracking) are estimated, and those that
stop at a good enough reward (`accept`) taken not to; the hard cap of the real run holds in any case.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.ledger import Budget, Ledger
from rsm_guidance.oracles.mixture import GaussianMixture, GaussianMixtureDenoiser
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.samplers import Problem, Sampler

_MOST = 512
_WIDTH = 4


@dataclass(frozen=True)
class Costs:
    """What a run consists of.

    Attributes:
        schedule: the levels.
        per_level: denoiser evaluations per latent and level (2 with CFG).
        value: denoiser evaluations of judging one noisy latent by a model of latents; None if a reward of the decoded
            estimate judges them.
        final: denoiser evaluations of judging one finished image.
    """

    schedule: NoiseSchedule
    per_level: float
    value: float | None
    final: float

    @property
    def once(self) -> float:
        """Of one unguided image and its final score."""
        return self.schedule.steps * self.per_level + self.final


class _ToyDenoiser(GaussianMixtureDenoiser):
    """That of a standard normal law, at the costs of a run.

    As the engine does, it answers again for free about the latents it was last asked about.
    """

    def __init__(self, costs: Costs, ledger: Ledger) -> None:
        super().__init__(GaussianMixture.from_weights([1.0], [[0.0] * _WIDTH], 1.0), costs.schedule, ["toy"])
        self._costs, self._ledger = costs, ledger
        self._last: tuple[Tensor, int, Prediction] | None = None

    @property
    def evaluations_per_row(self) -> float:
        return self._costs.per_level

    def predict(self, x: Tensor, level: int, rows: Tensor | None = None) -> Prediction:
        if self._last is None or self._last[0] is not x or self._last[1] != level:
            self._ledger.denoiser_evaluations += len(x) * self.evaluations_per_row
            self._last = (x, level, super().predict(x, level))
        return self._last[2]

    def decode(self, x0: Tensor, rows: Tensor | None = None) -> Tensor:
        self._ledger.decodes += len(x0)
        return x0


class _ToyValue:
    def __init__(self, costs: Costs, denoiser: _ToyDenoiser, ledger: Ledger) -> None:
        self._share, self._denoiser, self._ledger = costs.value, denoiser, ledger
        self.reads_prediction = costs.value is None
        self.evaluations_per_row = costs.per_level if costs.value is None else costs.value
        self.reward_calls_per_row = int(costs.value is None)

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        if self._share is not None:
            self._ledger.charge_value(len(x), self._share)
        else:
            self._ledger.reward_calls += len(x)
            if level < self._denoiser.steps:
                x = (prediction or self._denoiser.predict(x, level, rows)).x0
        return -x.square().sum(1)


def dry_run(sampler: Sampler, costs: Costs, budget: Budget | None = None) -> Ledger:
    """What making one image spends, found by making it with a toy model of the same costs."""
    if getattr(sampler, "accept", None) is not None:
        sampler = replace(sampler, accept=None)  # type: ignore[type-var]
    ledger = Ledger(budget or Budget())
    denoiser = _ToyDenoiser(costs, ledger)
    problem = Problem(
        denoiser,
        RandomStreams.for_prompts(0, denoiser.prompts),
        ledger,
        None if costs.value is not None and costs.final else lambda x, prompts: -x.square().sum(1),
        _ToyValue(costs, denoiser, ledger),
    )
    with torch.no_grad():
        sampler.sample(problem)
    return ledger


def cost(sampler: Sampler, costs: Costs) -> float:
    """Denoiser evaluations of one image: those of a dry run."""
    return dry_run(sampler, costs).evaluations


def fit_to_budget(sampler: Sampler, budget: float, costs: Costs) -> Sampler:
    """The sampler with as many candidates, particles, ... (the field it names as `scales`) as a budget pays for.

    Args:
        sampler: any; one that names no such field is returned as it is.
        budget: denoiser evaluations per image.
        costs: of the run.

    Raises:
        ValueError: if the budget does not pay for the sampler at its smallest.
    """
    if budget < costs.once - 1e-6:
        raise ValueError(f"a budget of {budget:g} denoiser evaluations is less than the {costs.once:g} of one image")
    field = sampler.scales
    if field is None:
        return sampler
    low = _smallest(sampler, field)
    if cost(low, costs) > budget + 1e-6:
        raise ValueError(
            f"a budget of {budget:g} denoiser evaluations is less than the {cost(low, costs):g} of {low.name} at its "
            f"smallest ({field}={getattr(low, field)})"
        )
    fitting, size, too_many = low, getattr(low, field), _MOST
    upper = size
    while upper < too_many:  # double, then halve the gap
        upper = min(2 * max(upper, 1), too_many)
        trial: Any = replace(sampler, **{field: upper})  # type: ignore[type-var]
        if cost(trial, costs) > budget + 1e-6:
            too_many = upper
        else:
            fitting, size = trial, upper
    while too_many - size > 1:
        middle = (size + too_many) // 2
        trial = replace(sampler, **{field: middle})  # type: ignore[type-var]
        if cost(trial, costs) > budget + 1e-6:
            too_many = middle
        else:
            fitting, size = trial, middle
    return fitting


def _smallest(sampler: Sampler, field: str) -> Sampler:
    """The sampler with the smallest size that its other settings allow."""
    assert field in {f.name for f in fields(sampler)}  # type: ignore[arg-type]
    for size in range(1, getattr(sampler, field) + 1):
        try:
            small: Any = replace(sampler, **{field: size})  # type: ignore[type-var]
        except ValueError:
            continue
        return small
    return sampler

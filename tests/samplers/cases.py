"""Sampling tasks on Gaussian mixtures, shared by the tests of the samplers."""

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.ledger import Budget, Ledger
from rsm_guidance.core.meter import MeteredValue
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import DDIM
from rsm_guidance.oracles import cases
from rsm_guidance.oracles.cases import MixtureValue
from rsm_guidance.oracles.mixture import GaussianMixtureDenoiser
from rsm_guidance.rewards import RowReward
from rsm_guidance.samplers import Info, SamplerOutput, Task

CASES = {name: cases.CASES[name] for name in ("grid", "ring", "linear")}
ANCESTRAL = DDIM(1.0)
SHORT = NoiseSchedule.flow(8)
SCHEDULES = {"flow": NoiseSchedule.flow(100), "vp": NoiseSchedule.variance_preserving(100)}
COARSE = NoiseSchedule.variance_preserving(40)


class OpenTask(Task):
    """A task whose reward and value can be exchanged; each is bound to it."""

    def __setattr__(self, name: str, new: Any) -> None:
        if name == "reward" and callable(new) and not isinstance(new, RowReward) and hasattr(self, "inner"):
            new = self.bound_reward(new)
        if name == "value" and new is not None and not isinstance(new, MeteredValue) and hasattr(self, "inner"):
            new = self.bound_value(new)
        super().__setattr__(name, new)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.inner = self.denoiser.inner  # from now on


def problem(
    case: str, schedule: NoiseSchedule, count: int, exact: bool = True, seed: int = 0, **caps: float
) -> OpenTask:
    """The values are a model's, which costs half an evaluation, or Tweedie's estimate."""
    prompts = [f"point {i}" for i in range(count)]
    mixture, reward = CASES[case]
    denoiser = GaussianMixtureDenoiser(mixture, schedule, prompts, seed)
    value = MixtureValue(mixture, reward, denoiser, exact, 0.5)
    ledger = Ledger(Budget(**caps), images=count)
    return OpenTask(denoiser, RandomStreams.for_prompts(seed, prompts), ledger, reward, value)


def weighted_reward(output: SamplerOutput) -> tuple[float, float]:
    """Self-normalised estimate of E*[r] and its standard error over prompts."""
    assert output.particles is not None
    means = torch.tensor([p.mean_reward for p in output.particles], dtype=torch.float64)
    return float(means.mean()), float(means.std() / len(means) ** 0.5)


def mean_normalizer(output: SamplerOutput) -> tuple[float, float]:
    """Mean of the estimates of Z over prompts, and its standard error."""
    assert output.log_normalizer is not None
    z = output.log_normalizer.exp()
    return float(z.mean()), float(z.std() / len(z) ** 0.5)


def exhausted(steps: Generator[Info, None, Any]) -> Any:
    """What a method's generator returns in the end."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


class ConstantValue:
    name = "constant"
    share = 0.0
    evaluations_per_row = 0.0
    reward_calls_per_row = 0
    reads_prediction = False

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        return 3.0 + 0 * x.flatten(1).sum(1)

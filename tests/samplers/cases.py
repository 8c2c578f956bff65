"""Sampling tasks on Gaussian mixtures, shared by the tests of the samplers."""

import torch
from torch import Tensor

from rsm_guidance.core.ledger import Budget, Ledger
from rsm_guidance.oracles.mixture import GaussianMixtureDenoiser, value
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.evaluation import exactness
from rsm_guidance.samplers import Problem, SamplerOutput

CASES = {name: exactness.CASES[name] for name in ("grid", "ring", "linear")}
ANCESTRAL = Transition("ddim", 1.0)
SHORT = NoiseSchedule.flow(8)
SCHEDULES = {"flow": NoiseSchedule.flow(100), "vp": NoiseSchedule.variance_preserving(100)}
COARSE = NoiseSchedule.variance_preserving(40)


class CaseValue:
    """V in closed form, or the reward of the posterior mean, which is what Tweedie's estimate gives."""

    reward_calls_per_row = 0

    def __init__(self, case: str, schedule: NoiseSchedule, ledger: Ledger, exact: bool) -> None:
        self.mixture, self.reward = CASES[case]
        self.schedule, self.ledger, self.exact = schedule, ledger, exact
        self.reads_prediction = not exact
        self.evaluations_per_row = 0.5

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        self.ledger.charge_value(len(x), 0.5)
        alpha, sigma = self.schedule.coefficients(level)
        if self.exact or level == self.schedule.steps:
            return value(self.mixture, self.reward, x.double(), alpha, sigma)
        if prediction is None:
            prediction = GaussianMixtureDenoiser(self.mixture, self.schedule, []).predict(x, level)
        return self.reward(prediction.x0)


def problem(
    case: str, schedule: NoiseSchedule, count: int, exact: bool = True, seed: int = 0, **caps: float
) -> Problem:
    prompts = [f"point {i}" for i in range(count)]
    mixture, reward = CASES[case]
    ledger = Ledger(Budget(**caps), images=count)
    judge = CaseValue(case, schedule, ledger, exact)
    denoiser = GaussianMixtureDenoiser(mixture, schedule, prompts, seed)
    inner = denoiser.predict

    def counted(x: Tensor, level: int, rows: Tensor | None = None) -> Prediction:
        ledger.denoiser_evaluations += len(x)
        return inner(x, level, rows)

    object.__setattr__(denoiser, "predict", counted)
    streams = RandomStreams.for_prompts(seed, prompts)
    return Problem(denoiser, streams, ledger, reward=lambda x, p: reward(x), value=judge)


def weighted_reward(output: SamplerOutput) -> tuple[float, float]:
    """Self-normalised estimate of E*[r] and its standard error over prompts."""
    rewards = torch.tensor(output.trace["candidates"]["rewards"], dtype=torch.float64)
    weights = torch.tensor(output.trace["candidates"]["log_weights"], dtype=torch.float64).exp()
    means = (weights * rewards).sum(1)
    return float(means.mean()), float(means.std() / len(means) ** 0.5)


def mean_normalizer(output: SamplerOutput) -> tuple[float, float]:
    """Mean of the estimates of Z over prompts, and its standard error."""
    assert output.log_normalizer is not None
    z = output.log_normalizer.exp()
    return float(z.mean()), float(z.std() / len(z) ** 0.5)


class ConstantValue:
    evaluations_per_row = 0.0
    reward_calls_per_row = 0
    reads_prediction = False

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        return 3.0 + 0 * x.flatten(1).sum(1)

"""Value estimators against closed forms on a Gaussian mixture, and through a pipeline."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor

import rsm_guidance as rg
from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.random import Purpose, RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.oracles.mixture import (
    GaussianMixture,
    GaussianMixtureDenoiser,
    QuadraticReward,
    expected_reward,
    value,
)
from rsm_guidance.samplers import FKSteering, RewardGradient, Task
from rsm_guidance.values import Lookahead, Smoothed, Tweedie
from tests.zoo import ZOO

MIXTURE = GaussianMixture.from_weights([0.5, 0.5], [[-2.0], [2.0]], 0.25)
REWARD = QuadraticReward.around([2.0], 1.0)
CALL = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "np"}


def schedule(squares: list[float]) -> NoiseSchedule:
    """Variance preserving levels with these squares of alpha."""
    alpha = torch.tensor([*squares, 1.0], dtype=torch.float64).sqrt()
    return NoiseSchedule(alpha, (1 - alpha**2).sqrt(), torch.arange(len(alpha), 0, -1))


def estimate(estimator: Any, points: list[float], level: int, levels: NoiseSchedule) -> tuple[Tensor, Tensor, Ledger]:
    """Estimated and exact values of points at a level."""
    x = torch.tensor(points, dtype=torch.float64)[:, None]
    denoiser = GaussianMixtureDenoiser(MIXTURE, levels, ["a"])
    task = Task(denoiser, RandomStreams.for_prompts(0, ["a"]), Ledger(), REWARD, estimator)
    found = task.value(x, level, torch.zeros(len(x), dtype=torch.int64))
    return found, value(MIXTURE, REWARD, x, *levels.coefficients(level)), task.ledger


@pytest.mark.parametrize(
    ("square", "x", "tweedie", "exact"),
    [
        (0.01, 0.0, -4.0, -0.8955),
        (0.5, 0.0, -4.0, -0.9756),
        (0.5, -1.0, -14.811, -5.0348),
        (0.5, 1.0, -0.0229, -0.1888),
    ],
)
def test_tweedies_bias_is_as_computed_by_hand(square: float, x: float, tweedie: float, exact: float) -> None:
    found, truth, ledger = estimate(Tweedie(), [x], 0, schedule([square]))
    assert float(found) == pytest.approx(tweedie, abs=6e-4) and float(truth) == pytest.approx(exact, abs=6e-4)
    assert ledger.reward_calls == 1


def test_smoothing_averages_rewards_around_the_mean() -> None:
    levels = schedule([0.5])
    found, _, ledger = estimate(Smoothed(4000), [0.0], 0, levels)
    width = 0.5**0.5  # E[-(m + w z - 2)^2] = -(m - 2)^2 - w^2 with m = 0
    assert float(found) == pytest.approx(-4 - width**2, abs=0.15)
    assert ledger.reward_calls == 4000
    tilted, _, _ = estimate(Smoothed(4000, temperature=1.0), [0.0], 0, levels)
    exact = -0.5 * np.log(1 + 2 * width**2) - 4 / (1 + 2 * width**2)  # log E exp(-(w z - 2)^2)
    assert float(tilted) == pytest.approx(exact, abs=0.1)
    narrow, _, _ = estimate(Smoothed(4, spread=1e-6), [0.0], 0, levels)
    assert float(narrow) == pytest.approx(-4, abs=1e-3)
    twice, _, _ = estimate(Smoothed(4), [0.3, 0.3], 0, levels)
    assert twice[0] == twice[1], "candidates of one image share their offsets"


@pytest.mark.parametrize("spread", [1.0, 0.5])
@pytest.mark.parametrize(
    ("levels", "level"),
    [(NoiseSchedule.flow(4), 1), (NoiseSchedule.flow(4), 3), (schedule([0.8]), 0), (schedule([0.1]), 0)],
)
def test_the_width_of_smoothing_is_that_of_standard_normal_data(
    levels: NoiseSchedule, level: int, spread: float
) -> None:
    """sigma / sqrt(alpha^2 + sigma^2), at levels where alpha, sigma and their norm all differ."""
    seen: list[Tensor] = []

    def reward(x: Tensor, prompts: list[str]) -> Tensor:
        seen.append(x)
        return x[:, 0]

    denoiser, streams = GaussianMixtureDenoiser(MIXTURE, levels, ["a"]), RandomStreams.for_prompts(0, ["a"])
    x, rows = torch.tensor([[0.3], [-0.4]], dtype=torch.float64), torch.zeros(2, dtype=torch.int64)
    Task(denoiser, streams, Ledger(), reward, Smoothed(3, spread)).value(x, level, rows)
    mean, alpha, sigma = denoiser.predict(x, level).x0, float(levels.alpha[level]), float(levels.sigma[level])
    offsets = [streams.normal(0, (1,), Purpose.SMOOTH, level, i).double() for i in (1, 2)]
    width = spread * sigma / (alpha**2 + sigma**2) ** 0.5
    assert torch.allclose(seen[0], torch.cat([mean, *(mean + width * z for z in offsets)]))


def test_looking_ahead_has_no_bias_on_the_average_where_the_mean_has() -> None:
    """The ODE carries the law of x_t to that of x0, so E[r(end)] = E[r(x0)]; r of the mean is too high by the lost variance."""
    levels = NoiseSchedule.variance_preserving(48)
    points = MIXTURE.noised(*levels.coefficients(12)).sample(4000, torch.Generator().manual_seed(0))[:, 0].tolist()
    truth = float(expected_reward(MIXTURE, REWARD))
    bias = {n: float(estimate(Lookahead(n), points, 12, levels)[0].mean()) - truth for n in (1, 2, 36)}
    assert bias[1] > 1 and bias[1] > bias[2] > abs(bias[36])
    assert abs(bias[36]) < 0.4  # two standard errors and the discretisation
    one, tweedie = (estimate(e, points[:5], 12, levels)[0] for e in (Lookahead(1), Tweedie()))
    assert torch.equal(one, tweedie), "one step is Tweedie's estimate"


def test_bad_settings_are_refused() -> None:
    for cls, options, words in (
        (Smoothed, {"samples": 1}, "at least 2"),
        (Smoothed, {"spread": 0.0}, "spread must be positive"),
        (Smoothed, {"temperature": float("nan")}, "temperature must be positive"),
        (Lookahead, {"steps": 0}, "at least 1"),
        (Lookahead, {"pipe": object(), "adapter": "lcm"}, "not both"),
    ):
        with pytest.raises(ValueError, match=words):
            cls(**options)  # type: ignore[operator]


# --- through a pipeline ---


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    return (images[:, 0] - images[:, 2]).mean((1, 2))


@pytest.mark.parametrize("spec", ["tweedie", "smoothed", "lookahead", Lookahead(3), Smoothed(3, temperature=0.1)])
def test_every_estimator_guides_particles_and_gradients(guided: DiffusionPipeline, spec: Any) -> None:
    plain = guided("a star", seed=0, sampler=rg.Unguided(FKSteering().transition), reward=redness, **CALL)
    for sampler in (FKSteering(4), RewardGradient(0.4)):
        out = guided("a star", seed=0, sampler=sampler, reward=redness, value=spec, **CALL)
        assert out.rewards[0] > plain.rewards[0]
    with pytest.raises(ValueError, match="pass a reward as well"):
        guided("a star", seed=0, sampler=FKSteering(2), value=spec, **CALL)


def test_another_pipeline_or_an_adapter_looks_ahead(guided: DiffusionPipeline) -> None:
    reference = guided("a star", seed=0, sampler=FKSteering(3), reward=redness, value=Lookahead(2), **CALL)
    other = rg.RewardGuidedStableDiffusion3Pipeline.from_pipe(guided)
    out = guided("a star", seed=0, sampler=FKSteering(3), reward=redness, value=Lookahead(2, pipe=other), **CALL)
    assert np.allclose(out.images, reference.images, atol=1e-5), "the same weights look ahead alike"
    assert out.ledger.denoiser_evaluations > reference.ledger.denoiser_evaluations, "and share no evaluation"
    sd15 = ZOO["sd15"].build()
    with pytest.raises(ValueError, match="cannot look ahead"):
        guided("a star", seed=0, sampler=FKSteering(3), reward=redness, value=Lookahead(2, pipe=sd15), **CALL)


def test_an_adapter_is_on_for_looking_ahead_alone() -> None:
    pipe = rg.reward_guided(type(ZOO["sd3"].build())).from_pipe(ZOO["sd3"].build())
    pipe.set_progress_bar_config(disable=True)
    call = ZOO["sd3"].call() | {"output_type": "np", "seed": 0, "reward": redness}
    with pytest.raises(ValueError, match="no adapter 'fast'"):
        pipe(**call, sampler=FKSteering(3), value=Lookahead(2, adapter="fast"))
    plain = pipe(**call, sampler=FKSteering(3), value=Lookahead(2))
    unguided = pipe(**call, sampler="none").images
    torch.manual_seed(0)
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "fast")
    pipe.transformer.disable_adapters()
    assert np.array_equal(pipe(**call, sampler="none").images, unguided)
    out = pipe(**call, sampler=FKSteering(3), value=Lookahead(2, adapter="fast"))
    assert np.array_equal(pipe(**call, sampler="none").images, unguided), "switched off again"
    scores = [[level["scores"] for level in o.trace["levels"]] for o in (plain, out)]
    assert not np.allclose(scores[0], scores[1], atol=1e-7), "the adapter changed what was seen ahead"


@pytest.mark.parametrize("estimator", [Tweedie(), Smoothed(4), Lookahead(2)])
def test_rows_are_judged_for_their_own_prompts(estimator: Any) -> None:
    prompts = ["a", "b"]

    def reward(x: Tensor, asked: list[str]) -> Tensor:
        return REWARD(x) + 100 * torch.tensor([prompt == "b" for prompt in asked])

    denoiser = GaussianMixtureDenoiser(MIXTURE, NoiseSchedule.flow(6), prompts)
    judge = Task(denoiser, RandomStreams.for_prompts(0, prompts), Ledger(), reward, estimator).value
    x, rows = torch.tensor([[0.3], [-0.4], [1.0]], dtype=torch.float64), torch.tensor([0, 1, 1])
    alone = [judge(x[i : i + 1], 3, rows[i : i + 1]) for i in range(3)]
    assert torch.allclose(judge(x, 3, rows), torch.cat(alone))


def test_terms_count_within_their_windows() -> None:
    denoiser = GaussianMixtureDenoiser(MIXTURE, NoiseSchedule.flow(6), ["a"])
    early = rg.Term(lambda x, p: x[:, 0], window=(0.0, 0.4))
    late = rg.Term(lambda x, p: 10 + x[:, 0], window=(0.6, 1.0))
    streams = RandomStreams.for_prompts(0, ["a"])
    judge = Task(denoiser, streams, Ledger(), rg.Composite((early, late)), Tweedie()).value
    x, rows = torch.tensor([[0.3]], dtype=torch.float64), torch.tensor([0])
    assert torch.allclose(judge(x, 1, rows), denoiser.predict(x, 1).x0[:, 0])
    assert torch.allclose(judge(x, 6, rows), 10 + x[:, 0])

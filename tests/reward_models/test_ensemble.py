"""Outputs, their mixtures, and clean latents scored under noise."""

import math
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.meter import MeteredReward
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.reward_models import DiffusionRewardModel
from rsm_guidance.reward_models.ensemble import NoiseEnsemble
from rsm_guidance.reward_models.levels import level_table
from rsm_guidance.reward_models.outputs import RewardOutput, gaussian, joined, mixture, normalised, ordinal, scalar
from tests.zoo import ZOO

PROMPTS = ["a cat", "a red dog", "a cat"]


def latents() -> Tensor:
    return torch.randn(3, 16, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    return ZOO["sd3"].build()


def made(pipe: Any, **options: Any) -> DiffusionRewardModel:
    torch.manual_seed(0)
    drm = DiffusionRewardModel.from_pipeline(pipe, adaptation="frozen", attention_heads=2, **options)
    with torch.no_grad():
        for tensor in drm.own_tensors().values():
            tensor.add_(0.1 * torch.randn(tensor.shape))
    return drm


# --- outputs ---


def test_an_ordinal_output_is_a_distribution_over_its_ratings() -> None:
    ratings = (1.0, 3.0, 4.0)
    raw = torch.tensor([[0.0, 0.0, 0.0], [0.0, 50.0, 0.0]], dtype=torch.float64)
    out = ordinal(raw, ratings)
    assert out.mean.tolist() == pytest.approx([8 / 3, 3.0])
    assert out.variance is not None and out.variance.tolist() == pytest.approx([26 / 3 - (8 / 3) ** 2, 0.0])
    assert out.log_probs is not None and out.log_probs.exp().sum(-1).tolist() == pytest.approx([1.0, 1.0])


def test_variances_are_positive_and_scores_may_have_any_sign() -> None:
    out = gaussian(torch.tensor([[-3.0, -100.0], [3.0, 5.0]]))
    assert out.mean.tolist() == [-3.0, 3.0] and out.variance is not None and (out.variance > 0).all()
    assert torch.equal(scalar(torch.tensor([[1.0], [2.0]])).mean, scalar(torch.tensor([1.0, 2.0])).mean)


def test_a_mixture_has_the_moments_of_its_parts_together() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [gaussian(torch.randn(2, 2, generator=draw, dtype=torch.float64)) for _ in range(3)]
    mixed = mixture(parts)
    mean = sum(p.mean for p in parts) / 3
    second = sum(p.mean**2 + p.variance for p in parts) / 3  # type: ignore[operator]
    assert torch.allclose(mixed.mean, mean) and torch.allclose(mixed.variance, second - mean**2)  # type: ignore[arg-type]
    graded = [ordinal(torch.randn(2, 4, generator=draw, dtype=torch.float64), (1.0, 2.0, 3.0, 4.0)) for _ in range(3)]
    mixed = mixture(graded)
    probs = sum(p.log_probs.exp() for p in graded) / 3  # type: ignore[union-attr]
    again = ordinal(probs.log(), (1.0, 2.0, 3.0, 4.0))  # type: ignore[union-attr]
    assert torch.allclose(mixed.log_probs.exp(), probs) and torch.allclose(mixed.mean, again.mean)  # type: ignore[union-attr, arg-type]
    assert torch.allclose(mixed.variance, again.variance)  # type: ignore[arg-type]
    assert mixture(parts[:1]) is parts[0]


def test_opinions_are_joined_picked_and_put_on_a_scale() -> None:
    out = ordinal(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), (1.0, 2.0, 3.0))
    whole = joined([out.pick(slice(0, 1)), out.pick(slice(1, 4))])
    scaled = normalised(whole, 2.0, 4.0)
    assert torch.equal(whole.mean, out.mean) and torch.equal(whole.log_probs, out.log_probs)  # type: ignore[arg-type]
    assert torch.allclose(scaled.mean, (out.mean - 2) / 4) and scaled.ratings is not None
    assert torch.allclose((scaled.log_probs.exp() * scaled.ratings).sum(-1), scaled.mean)  # type: ignore[union-attr]
    assert torch.allclose(scaled.variance * 16, out.variance)  # type: ignore[arg-type, operator]
    plain = RewardOutput(torch.ones(2))
    assert normalised(plain, 0.0, 1.0) is plain


@torch.no_grad()
def test_scores_are_on_the_scale_that_the_checkpoint_says(pipe: StableDiffusion3Pipeline) -> None:
    raw, scaled = made(pipe, head="pool"), made(pipe, head="pool", score_mean=2.0, score_std=4.0)
    one, two = (m.score(latents(), 300.0, PROMPTS) for m in (raw, scaled))
    assert torch.allclose(two, (one - 2) / 4)
    inputs = scaled.inputs(latents(), 300.0, PROMPTS)
    assert torch.equal(scaled.read(scaled.scorer(*inputs)).mean, one), "training sees them before"


# --- noise ---


@torch.no_grad()
@pytest.mark.parametrize("head", ["pool", "query", "drm", "conv"])
def test_one_level_is_a_score_there(pipe: StableDiffusion3Pipeline, head: str) -> None:
    drm = made(pipe, head=head)
    table = level_table(pipe.scheduler)
    index = int(table.nearest(torch.tensor([0.4])))
    sigma = float(table.sigma[index])
    noise = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(5))
    x = (1 - sigma) * latents() + sigma * noise
    together = drm.judge_clean(latents(), PROMPTS, noise=NoiseEnsemble((0.4,), seed=5)).mean
    assert abs(sigma - 0.4) < 2e-3 and torch.allclose(together, drm.score(x, 1000 * sigma, PROMPTS), atol=1e-5)


@torch.no_grad()
def test_other_heads_average_and_the_query_head_reads_all_levels_at_once(pipe: StableDiffusion3Pipeline) -> None:
    levels = (0.2, 0.6)
    for head in ("pool", "query"):
        drm = made(pipe, head=head)
        draws = torch.Generator().manual_seed(0)
        table, alone, shown = level_table(pipe.scheduler), [], []
        for level in levels:
            index = int(table.nearest(torch.tensor([level])))
            sigma, noise = float(table.sigma[index]), torch.randn(16, 16, 16, generator=draws)
            x = (1 - sigma) * latents() + sigma * noise
            alone.append(drm.score(x, 1000 * sigma, PROMPTS))
            shown.append(drm.scorer.read(*drm.inputs(x, 1000 * sigma, PROMPTS)))
        both = drm.judge_clean(latents(), PROMPTS, noise=NoiseEnsemble(levels)).mean
        mean = torch.stack(alone).mean(0)
        assert torch.allclose(both, mean, atol=1e-5) == (head == "pool")
        if head == "query":
            joint = drm.head.answer([drm.head.gather(f.tokens, f.text, f.embedding) for f in shown])  # type: ignore[operator]
            assert torch.allclose(both, joint.squeeze(-1), atol=1e-5)


@torch.no_grad()
def test_scores_of_clean_latents_are_repeatable_and_depend_on_no_batch(pipe: StableDiffusion3Pipeline) -> None:
    drm = made(pipe, head="query", image_levels=(0.1, 0.4), image_draws=2, text_taps=("transformer_blocks.0",))
    torch.manual_seed(1)
    scores = drm.judge_clean(latents(), PROMPTS).mean
    torch.manual_seed(2)
    assert torch.equal(scores, drm.judge_clean(latents(), PROMPTS).mean), "no global random state is read"
    alone = torch.cat([drm.judge_clean(latents()[i : i + 1], PROMPTS[i : i + 1]).mean for i in range(3)])
    assert torch.allclose(scores, alone, atol=1e-5)
    assert not torch.allclose(
        scores, drm.judge_clean(latents(), PROMPTS, noise=NoiseEnsemble((0.1, 0.4), 2, seed=1)).mean, atol=1e-4
    )


@torch.no_grad()
def test_images_are_scored_at_the_levels_of_the_checkpoint(pipe: StableDiffusion3Pipeline) -> None:
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    drm, clean = made(pipe, head="pool", image_levels=(0.3,)), made(pipe, head="pool")
    assert not torch.allclose(drm(images, PROMPTS), clean(images, PROMPTS), atol=1e-4)
    assert torch.equal(drm.score_images(images, PROMPTS, 0.0), clean(images, PROMPTS))


@torch.no_grad()
def test_what_images_cost_is_booked_for_every_noise(pipe: StableDiffusion3Pipeline) -> None:
    drm = made(pipe, head="pool", image_levels=(0.1, 0.4), image_draws=3)
    ran: list[int] = []
    drm.trunk.register_forward_hook(lambda module, inputs, output: ran.append(len(output.tokens)))
    ledger = Ledger()
    MeteredReward(drm, ledger)(torch.rand(3, 3, 32, 32), PROMPTS)
    assert ledger.value_cost == pytest.approx(sum(ran) * drm.latent_share) and sum(ran) == 18
    ran.clear()
    drm.score_at_level(latents(), 4, PROMPTS, NoiseSchedule.flow(4))
    assert sum(ran) == 3, "a value costs the same at every level"


@torch.no_grad()
def test_more_draws_vary_less(pipe: StableDiffusion3Pipeline) -> None:
    drm = made(pipe, head="pool")

    def spread(draws: int) -> float:
        scores = [drm.judge_clean(latents(), PROMPTS, noise=NoiseEnsemble((0.7,), draws, s)).mean for s in range(12)]
        return float(torch.stack(scores).std(0).mean())

    assert spread(16) < 0.5 * spread(1)


def test_gradients_go_through_the_noise(pipe: StableDiffusion3Pipeline) -> None:
    x = latents().requires_grad_()
    (gradient,) = torch.autograd.grad(
        made(pipe, head="query").judge_clean(x, PROMPTS, noise=NoiseEnsemble((0.1, 0.5))).mean.sum(), x
    )
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


@torch.no_grad()
def test_prompts_may_be_longer_than_the_pipelines_default(pipe: StableDiffusion3Pipeline) -> None:
    lengths = []
    for tokens in (0, 16):
        arguments, _ = made(pipe, head="pool", max_sequence_length=tokens).inputs(latents(), 300.0, PROMPTS)
        lengths.append(arguments["encoder_hidden_states"].shape[1])
    assert lengths[0] - lengths[1] == 256 - 16


def test_levels_out_of_range_are_refused() -> None:
    for level, draws in ((1.2, 1), (-0.1, 1), (math.nan, 1), (0.4, 0)):
        with pytest.raises(UsageError, match=r"levels lie in \[0, 1\]"):
            NoiseEnsemble((level,), draws)

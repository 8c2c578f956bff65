"""Identities every sampler must keep, through the pipeline."""

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

import rsm_guidance as rg
from rsm_guidance.samplers import Sampler

PROMPTS = ["two red circles and a blue square", "a red star", "a cyan cross above a purple triangle"]
CALL = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "np"}
ODE = rg.Transition("ode")
CPS = rg.Transition("cps", 0.8)


def images(pipe: DiffusionPipeline, prompts: list[str] = PROMPTS, **extra: object) -> np.ndarray:
    return pipe(prompt=prompts, **(CALL | extra)).images


@pytest.mark.parametrize(
    "sampler",
    [rg.Unguided(ODE), rg.BestOfN(1, ODE), rg.StepwiseSampling(1, ODE), rg.StepwiseSampling(3, ODE)],
    ids=["none", "best-of-1", "stepwise-1", "stepwise-3"],
)
def test_nothing_to_choose_with_ode_is_bitwise_stock(
    stock: StableDiffusion3Pipeline, guided: DiffusionPipeline, drm: rg.DiffusionRewardModel, sampler: Sampler
) -> None:
    reference = images(stock, generator=torch.Generator().manual_seed(1))
    assert np.array_equal(images(guided, generator=torch.Generator().manual_seed(1)), reference)
    driven = images(guided, generator=torch.Generator().manual_seed(1), sampler=sampler, reward=drm)
    assert np.array_equal(driven, reference)


def test_no_sampler_with_a_seed_is_the_unguided_sampler(guided: DiffusionPipeline) -> None:
    assert np.array_equal(images(guided, seed=4), images(guided, seed=4, sampler="none"))


@pytest.mark.parametrize("kind", ["ddim", "cps", "flow_sde"])
def test_one_candidate_is_the_unguided_run_of_the_same_transition(guided: DiffusionPipeline, kind: str) -> None:
    transition = rg.Transition(kind, 0.7)
    reference = images(guided, seed=2, sampler=rg.Unguided(transition))
    assert not np.array_equal(reference, images(guided, seed=2, sampler="none"))
    for sampler in (rg.BestOfN(1, transition), rg.StepwiseSampling(1, transition)):
        assert np.array_equal(images(guided, seed=2, sampler=sampler), reference)


@pytest.mark.parametrize("sampler", [rg.BestOfN(3, CPS), rg.StepwiseSampling(3, CPS)], ids=["best-of-n", "stepwise"])
def test_constant_reward_changes_nothing(guided: DiffusionPipeline, sampler: Sampler) -> None:
    def constant(batch: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return torch.full((len(batch),), 7.0)

    reference = images(guided, PROMPTS[:1], seed=2, sampler=rg.Unguided(CPS))
    assert np.array_equal(images(guided, PROMPTS[:1], seed=2, sampler=sampler, reward=constant), reference)


@pytest.mark.parametrize(
    "sampler", [rg.Unguided(CPS), rg.BestOfN(2, CPS), rg.StepwiseSampling(2, CPS, temperature=1.0)]
)
def test_a_seeded_call_leaves_the_global_generator_alone(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel, sampler: Sampler
) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = images(guided, seed=3, sampler=sampler, reward=drm)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert np.array_equal(images(guided, seed=3, sampler=sampler, reward=drm), first)


def as_bytes(batch: np.ndarray) -> np.ndarray:
    return (batch * 255).round().astype(np.int16)


@pytest.mark.parametrize("sampler", [rg.BestOfN(3, CPS), rg.StepwiseSampling(4, CPS)], ids=["best-of-n", "stepwise"])
def test_batch_size_and_order_change_no_image(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel, sampler: Sampler
) -> None:
    seven = [*PROMPTS, "a star", "three green squares", "a cross", "a blue circle with a yellow star"]
    whole = as_bytes(images(guided, seven, seed=5, sampler=sampler, reward=drm))
    for size in (1, 2):
        for start in range(0, 4, size):
            part = as_bytes(images(guided, seven[start : start + size], seed=5, sampler=sampler, reward=drm))
            assert np.abs(part - whole[start : start + size]).max() <= 1
    turned = as_bytes(images(guided, seven[::-1], seed=5, sampler=sampler, reward=drm))
    assert np.abs(turned[::-1] - whole).max() <= 1


def test_copies_of_a_prompt_differ_and_keep_their_place(guided: DiffusionPipeline) -> None:
    twice = as_bytes(images(guided, PROMPTS[:1], seed=1, sampler="none", num_images_per_prompt=2))
    assert np.abs(twice[0] - twice[1]).max() > 20
    listed = as_bytes(images(guided, PROMPTS[:1] * 2, seed=1, sampler="none"))
    assert np.abs(twice - listed).max() <= 1


def test_shifting_the_reward_changes_nothing(guided: DiffusionPipeline) -> None:
    def redness(batch: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return (batch[:, 0] - batch[:, 1]).mean((1, 2)).double()

    def shifted(batch: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return redness(batch, prompts) + 100

    sampler = rg.StepwiseSampling(3, CPS)
    a = guided(prompt=PROMPTS[:2], seed=0, sampler=sampler, reward=redness, **CALL)
    b = guided(prompt=PROMPTS[:2], seed=0, sampler=sampler, reward=shifted, **CALL)
    assert np.array_equal(a.images, b.images)
    assert np.allclose(np.array(b.rewards) - 100, a.rewards)


def test_guidance_with_a_plain_function_raises_that_function(guided: DiffusionPipeline) -> None:
    def redness(batch: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return (batch[:, 0] - batch[:, 1]).mean((1, 2)).double()

    prompts = ["a circle", "a square", "a star", "a cross"]
    base = guided(prompt=prompts, seed=0, sampler=rg.Unguided(CPS), reward=redness, **CALL).rewards
    for sampler in (rg.BestOfN(4, CPS), rg.StepwiseSampling(4, CPS)):
        best = guided(prompt=prompts, seed=0, sampler=sampler, reward=redness, **CALL).rewards
        assert np.mean(best) > np.mean(base) + 0.005


# --- every sampler ---

ALL = [name for name in rg.SAMPLERS if name != "none"]
SEVEN = [*PROMPTS, "a star", "three green squares", "a cross", "a blue circle with a yellow star"]
DRAWS = ("psi", "tree-sampling")  # start from a draw, or return a draw among equals
SMALLER = {
    "tree-sampling": {"simulations": 10},
    "tree-search": {"simulations": 10},
    "noise-optimization": {"iterations": 2},
}


def small(name: str, **settings: float) -> Any:
    """The sampler at the smallest size at which it still does all that it does."""
    return rg.make_sampler(name, **SMALLER.get(name, {}), **settings)


def blueness(batch: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return (batch[:, 2] - batch[:, 0]).mean((1, 2))


@pytest.mark.parametrize("name", ALL)
def test_every_sampler_gives_a_prompt_its_image_in_any_batch_and_order(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel, name: str
) -> None:
    def run(prompts: list[str]) -> np.ndarray:
        return as_bytes(images(guided, prompts, seed=5, sampler=small(name), reward=drm))

    whole = run(SEVEN[:5])
    assert np.abs(run(SEVEN[2:3]) - whole[2:3]).max() <= 1
    assert np.abs(run(SEVEN[4::-1])[::-1] - whole).max() <= 1


@pytest.mark.parametrize("name", [name for name in ALL if name not in DRAWS])
def test_a_constant_reward_leaves_every_sampler_the_unguided_run(guided: DiffusionPipeline, name: str) -> None:
    def constant(batch: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return 7 + 0 * batch.mean((1, 2, 3))

    sampler = small(name)
    plain = as_bytes(images(guided, PROMPTS, seed=2, sampler=rg.Unguided(sampler.transition)))
    got = as_bytes(images(guided, PROMPTS, seed=2, sampler=sampler, reward=constant))
    assert np.abs(got - plain).max() <= 1


@pytest.mark.parametrize("name", ALL)
def test_every_sampler_raises_a_reward_and_does_not_mind_its_offset(guided: DiffusionPipeline, name: str) -> None:
    def shifted(batch: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return blueness(batch, prompts) + 64

    greedy = {"tree-sampling": {"temperature": 1e-3}} | dict.fromkeys(
        ("fk-steering", "smc", "psi"), {"returned": "best"}
    )
    sampler = small(name, **greedy.get(name, {}))
    base = guided(prompt=SEVEN[:4], seed=0, sampler=rg.Unguided(sampler.transition), reward=blueness, **CALL)
    out = guided(prompt=SEVEN[:4], seed=0, sampler=sampler, reward=blueness, **CALL)
    assert np.mean(out.rewards) > np.mean(base.rewards) and np.isfinite(out.images).all()
    again = guided(prompt=SEVEN[:4], seed=0, sampler=sampler, reward=shifted, **CALL)
    close = np.abs(np.array(again.rewards) - 64 - out.rewards) < 1e-3  # 64 costs digits, which may turn a near tie
    assert close.mean() > 0.6


@pytest.mark.parametrize("name", ALL)
def test_rewards_that_are_not_numbers_end_every_sampler_with_their_name(guided: DiffusionPipeline, name: str) -> None:
    def broken(batch: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return blueness(batch, prompts) * torch.nan

    with pytest.raises(ValueError, match="broken returned nan"):
        images(guided, PROMPTS[:1], seed=0, sampler=name, reward=broken)


@pytest.mark.parametrize("name", ["smc", "reward-gradient"])
def test_rewards_without_gradients_are_refused_where_one_is_needed(guided: DiffusionPipeline, name: str) -> None:
    with pytest.raises(ValueError, match="not differentiable"):
        images(guided, PROMPTS[:1], seed=0, sampler=name, reward=rg.resolve_reward("shapes-verifier"))

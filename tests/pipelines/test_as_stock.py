"""Guided calls take what stock calls take, under the same circumstances, and give what these give."""

import copy
import json
import pickle
import threading
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from torch import Tensor

import rsm_guidance as rg
from rsm_guidance.rewards import RewardError
from rsm_guidance.samplers import SAMPLERS, Progress
from tests.zoo import ZOO, _build, families

SIX = {"num_inference_steps": 6, "output_type": "np", "seed": 0}


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    return (images[..., 0, :, :] - images[..., 2, :, :]).flatten(1).mean(1)


def flat(images: Tensor, prompts: list[str]) -> Tensor:
    """Child 0 always wins, so that more children change nothing."""
    return torch.zeros(len(images))


def guided(stock: DiffusionPipeline) -> DiffusionPipeline:
    pipe = rg.RewardGuidedPipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build(name: str) -> DiffusionPipeline:
    return guided(ZOO[name].build())


# --- circumstances ---


@pytest.mark.parametrize(
    "sampler", ["none", "stepwise:candidates=2", "smc:particles=2", "noise-optimization:iterations=1"]
)
def test_inference_mode_changes_nothing(sampler: str) -> None:
    pipe, call = build("sd3"), ZOO["sd3"].call() | {"output_type": "np", "seed": 0}
    outside = pipe(**call, sampler=sampler, reward=redness)
    with torch.inference_mode():
        inside = pipe(**call, sampler=sampler, reward=redness)
        embeds = pipe.encode_prompt("a cat", None, None)
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        given = {k: v for k, v in call.items() if k not in ("prompt", "negative_prompt")} | dict(
            zip(names, embeds, strict=True)
        )
        assert np.isfinite(pipe(**given, sampler=sampler, reward=redness).images).all()
    assert np.array_equal(inside.images, outside.images) and inside.rewards == outside.rewards


def test_calls_over_the_same_modules_take_turns_and_book_their_own_cost() -> None:
    stock = ZOO["sd15"].build()
    one, two = guided(stock), guided(stock)
    plain = diffusers.StableDiffusionPipeline(**stock.components, requires_safety_checker=False)
    plain.set_progress_bar_config(disable=True)
    call = ZOO["sd15"].call() | {"output_type": "np", "num_inference_steps": 8}

    def by(pipe: DiffusionPipeline, seed: int) -> Callable[[], tuple[Any, float]]:
        def job() -> tuple[Any, float]:
            out = pipe(**call, seed=seed, sampler="stepwise:candidates=2", reward=redness)
            return out.images, out.ledger.denoiser_evaluations

        return job

    jobs: list[Callable[[], tuple[Any, float]]] = [
        by(one, 0),
        by(two, 1),
        by(one, 2),
        lambda: (plain(**call, generator=torch.Generator().manual_seed(3)).images, 0.0),
        lambda: (one(**call, seed=4).images, 0.0),
    ]
    alone = [job() for job in jobs]
    together: list[Any] = [None] * len(jobs)

    def run(index: int) -> None:
        for _ in range(2):
            together[index] = jobs[index]()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for (image, cost), (same, counted) in zip(alone, together, strict=True):
        assert np.array_equal(image, same) and cost == counted


# --- outputs ---


def checked(cls: Any, on: bool) -> DiffusionPipeline:
    """A pipeline whose safety checker, if it is on, finds fault with every image."""
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = text | {"image_size": 16, "patch_size": 8, "projection_dim": 16}
    checker = StableDiffusionSafetyChecker(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    ).eval()
    for weights in (checker.concept_embeds_weights, checker.special_care_embeds_weights):
        weights.data.fill_(-2.0)
    size = {"height": 16, "width": 16}
    extractor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size)
    parts = {"safety_checker": checker, "feature_extractor": extractor, "requires_safety_checker": True} if on else {}
    return guided(_build(lambda: cls(**families.sd15() | parts)))


@pytest.mark.parametrize("sampler", ["stepwise:candidates=2", "reward-gradient", "smc:particles=2"])
def test_rewards_judge_images_before_the_safety_checker_whose_verdict_is_kept(sampler: str) -> None:
    cls, call = diffusers.StableDiffusionImg2ImgPipeline, ZOO["sd15_inpaint"].call()
    call = {k: call[k] for k in ("prompt", "image")} | {"num_inference_steps": 4, "strength": 0.75, "seed": 0}
    without = checked(cls, False)(**call, sampler=sampler, reward=redness)
    out = checked(cls, True)(**call, sampler=sampler, reward=redness)
    assert out.rewards == without.rewards
    assert without.nsfw_content_detected is None and isinstance(out.nsfw_content_detected[0], bool)


@pytest.mark.parametrize("sampler", ["reward-gradient", "lidar", "noise-optimization:iterations=1"])
def test_gradients_pass_a_decoder_that_stock_casts_up(sampler: str) -> None:
    rewards = []
    for force in (False, True):
        stock = ZOO["sdxl_inpaint"].build()
        stock.vae.register_to_config(force_upcast=force)
        pipe = guided(stock).to(torch.float16)
        rewards.append(pipe(**ZOO["sdxl_inpaint"].call(), seed=0, sampler=sampler, reward=redness).rewards[0])
        assert pipe.vae.dtype == torch.float16
    assert rewards[0] == pytest.approx(rewards[1], abs=2e-3)


@pytest.mark.parametrize("sampler", ["none", "best-of-n", "stepwise", "demon", "backtracking", "smc"])
def test_videos_come_as_stock_gives_them(sampler: str) -> None:
    pipe, call = build("wan"), ZOO["wan"].call()
    stock = pipe(**call, seed=0)
    out = pipe(**call, seed=0, sampler=sampler, reward=redness)
    assert (
        type(out.frames) is type(stock.frames) and out.frames.shape == stock.frames.shape and out.images is out.frames
    )
    assert isinstance(pipe(**call, seed=0, sampler=sampler, reward=redness, return_dict=False), tuple)


# --- inputs ---


def test_equal_integers_are_one_seed() -> None:
    pipe, call = build("sd3"), ZOO["sd3"].call() | {"output_type": "np"}
    outs = [pipe(**call, seed=s, sampler="none") for s in (5, np.uint8(5), torch.tensor([5])[0])]
    assert all(np.array_equal(o.images, outs[0].images) and json.dumps(o.trace) for o in outs)


@pytest.mark.parametrize("name", ["sd15_inpaint", "flux"])
def test_empty_prompts_are_prompts(name: str) -> None:
    pipe, call = build(name), ZOO[name].call() | {"prompt": "", "output_type": "np"}
    stock = pipe(**call, seed=0)[0]
    assert np.array_equal(pipe(**call, seed=0, sampler="none", reward=redness).images, stock)
    out = pipe(**call, seed=0, sampler="best-of-n:candidates=2", reward=redness)
    assert out.rewards[0] >= float(redness(torch.as_tensor(stock).movedim(-1, -3), [])[0]) - 1e-6


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_pickled_and_copied_pipelines_are_the_same(name: str) -> None:
    pipe, call = build(name), ZOO[name].call() | {"output_type": "np", "seed": 0, "sampler": "none"}
    others = pickle.loads(pickle.dumps(pipe)), copy.deepcopy(pipe)
    reference = pipe(**call).images
    for other in others:
        assert type(other) is type(pipe) and np.array_equal(other(**call).images, reference)


def test_diffusers_finds_the_classes_of_other_tasks() -> None:
    pipe = build("sd3")
    assert type(diffusers.AutoPipelineForImage2Image.from_pipe(pipe)) is diffusers.StableDiffusion3Img2ImgPipeline
    assert type(diffusers.AutoPipelineForText2Image.from_pipe(pipe)) is diffusers.StableDiffusion3Pipeline
    assert type(pipe).__qualname__ == "RewardGuidedStableDiffusion3Pipeline"


# --- callbacks ---

CHOOSING = [
    "stepwise:candidates=3",
    "svdd:candidates=2",
    "demon:candidates=2",
    "funnel:candidates=2",
    "fk-steering:particles=3",
    "smc:particles=2",
    "lidar",
]


@pytest.mark.parametrize("what", ["latents", "embeddings", "in place", "guidance"])
@pytest.mark.parametrize("sampler", ["stepwise", "svdd", "demon", "funnel"])
def test_edits_of_a_callback_act_as_with_one_candidate(sampler: str, what: str) -> None:
    pipe, told = build("sd15"), []

    def edit(pipe: DiffusionPipeline, index: int, timestep: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        told.append(index)
        if index == 2 and what == "latents":
            return {"latents": 0.5 * inputs["latents"]}
        if index == 2 and what == "in place":
            inputs["latents"].mul_(0.5)
        if index == 2 and what == "embeddings":
            return {"prompt_embeds": torch.zeros_like(inputs["prompt_embeds"])}
        if index == 2 and what == "guidance":
            pipe._guidance_scale = 1.5
        return inputs

    call = ZOO["sd15"].call() | SIX | {"reward": flat}
    watch = {"callback_on_step_end": edit, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    plain = pipe(**call, sampler=f"{sampler}:candidates=1").images
    alone = pipe(**call, **watch, sampler=f"{sampler}:candidates=1").images
    assert told == [*range(6)] and abs(alone - plain).max() > 1e-3
    told.clear()
    several = pipe(**call, **watch, sampler=f"{sampler}:candidates=3").images
    assert told == [*range(6)] and np.allclose(several, alone, atol=1e-5)


@pytest.mark.parametrize(
    "sampler", [*CHOOSING, "reward-gradient", "best-of-n:candidates=2", "tree-search:simulations=4"]
)
def test_a_callback_ends_every_run_with_the_best_so_far(sampler: str) -> None:
    pipe = build("sdxl")

    def stop(pipe: DiffusionPipeline, index: int, timestep: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index >= 3
        return inputs

    call = ZOO["sdxl"].call() | SIX | {"reward": redness, "sampler": sampler}
    out = pipe(**call, callback_on_step_end=stop)
    assert out.ledger.stopped == "interrupted" and np.isfinite(out.images).all()
    assert pipe(**call).ledger.stopped is None, "of that call alone"


@pytest.mark.parametrize("sampler", ["none", "best-of-n:candidates=8", "demon:candidates=2", "smc:particles=2"])
def test_a_stop_from_another_thread_is_heard_at_the_next_level(sampler: str) -> None:
    pipe, reached = build("sd15"), []

    def on_step(progress: Progress) -> None:
        reached.append(progress.level)
        if progress.level == 2:  # as a button would, at whatever moment
            button = threading.Thread(target=setattr, args=(pipe, "_interrupt", True))
            button.start()
            button.join()

    out = pipe(**ZOO["sd15"].call() | SIX, sampler=sampler, reward=redness, on_step=on_step)
    assert out.ledger.stopped == "interrupted" and max(reached) <= 3 and np.isfinite(out.images).all()


def test_callbacks_of_the_old_form_and_of_lookahead_values() -> None:
    pipe, told = build("sd15"), []
    call = ZOO["sd15"].call() | SIX | {"sampler": "stepwise:candidates=2", "reward": redness}
    with pytest.warns(FutureWarning, match="Passing `callback`"):
        pipe(**call, callback=lambda index, timestep, x: told.append((index, x.shape[1:])), callback_steps=1)
    assert [i for i, _ in told] == [*range(6)] and {s for _, s in told} == {(4, 16, 16)}

    def watch(pipe: DiffusionPipeline, index: int, timestep: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
        told.append((index, ()))
        return inputs

    told.clear()
    pipe(**call, callback_on_step_end=watch, value="lookahead")
    assert [i for i, _ in told] == [*range(6)], "what a value foresees is no step of the run"


# --- rewards that fail ---


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_candidate_whose_reward_fails_loses_and_the_run_goes_on(sampler: str) -> None:
    pipe, calls = build("sd3"), [0]

    def flaky(images: Tensor, prompts: list[str]) -> Tensor:
        calls[0] += 1
        scores = redness(images, prompts)
        failed = (scores.detach() * 1e6).long() % 4 == 0
        return torch.where(failed, scores * float("nan" if calls[0] % 2 else "inf"), scores)

    call = ZOO["sd3"].call() | {"prompt": ["a cat", "a dog", "a cow"], "output_type": "np", "reward": flaky}
    failures = 0
    for seed in range(4):
        try:
            out = pipe(**call, seed=seed, sampler=sampler)
        except RewardError as error:
            assert "no finished image got a score" in str(error)
            continue
        assert np.isfinite(out.images).all() and min(r for r in out.rewards if r == r) > -10
        json.dumps(out.trace, allow_nan=False)
        failures += out.trace.get("failed_scores", {"count": 0})["count"]
    assert failures, "the test has to meet some"


def test_only_where_all_fail_the_call_fails() -> None:
    pipe, call = build("sd15"), ZOO["sd15"].call() | SIX

    def broken(images: Tensor, prompts: list[str]) -> Tensor:
        return torch.full((len(images),), torch.nan)

    for sampler in ("none", "best-of-n:candidates=2", "stepwise:candidates=2", "tree-search:simulations=2"):
        with pytest.raises(RewardError, match="broken returned nan for item 0 .* must be finite"):
            pipe(**call, sampler=sampler, reward=broken)
    first = [True]

    def once(images: Tensor, prompts: list[str]) -> Tensor:
        scores = redness(images, prompts)
        if first.pop() if first else False:
            scores[0] = torch.nan
        return scores

    with pytest.warns(RuntimeWarning, match="once returned nan for item 0 of .*; such candidates lose"):
        out = pipe(**call, sampler="best-of-n:candidates=4", reward=once)
    assert out.trace["failed_scores"]["count"] == 1 and out.trace["candidates"]["chosen"][0] != 0


def test_a_seed_serves_pipelines_without_prompts_too() -> None:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    unet = diffusers.UNet2DModel(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, sample_size=16, **blocks
    )
    pipe = rg.reward_guided(diffusers.DDIMPipeline)(unet=unet, scheduler=diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    first, again, other = (
        pipe(batch_size=2, num_inference_steps=2, output_type="np", seed=s).images for s in (0, 0, 1)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    with pytest.raises(ValueError, match="DDIMPipeline cannot be guided: it has no prepare_latents"):
        pipe(batch_size=2, seed=0, sampler="none")

"""What users do with stock pipelines keeps working under guidance: arguments, precision, offload, LoRA, compilation."""

import copy
from contextlib import closing
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig
from torch import Tensor

import rsm_guidance as rg
from rsm_guidance.core.transitions import Transition
from rsm_guidance.engine import PipelineDenoiser
from tests.zoo import ZOO

ODE = Transition("ode")


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    return (images[..., 0, :, :] - images[..., 2, :, :]).flatten(1).mean(1)


def build(name: str) -> DiffusionPipeline:
    pipe = rg.reward_guided(type(ZOO[name].build())).from_pipe(ZOO[name].build())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same_as_stock(pipe: DiffusionPipeline, arguments: dict[str, Any]) -> None:
    """The unguided sampler and the stock call agree to the last bit."""
    stock = pipe(**copy.deepcopy(arguments), generator=generator(), output_type="np")[0]
    ours = pipe(**copy.deepcopy(arguments), generator=generator(), output_type="np", sampler="none")[0]
    assert np.array_equal(np.asarray(stock), np.asarray(ours))


@pytest.mark.parametrize(
    ("name", "extra"),
    [
        ("sd15", {"negative_prompt": ["ugly", "bad"], "guidance_rescale": 0.7, "eta": 1.0}),
        ("sd15", {"num_images_per_prompt": 3, "negative_prompt": "ugly"}),
        ("sdxl", {"prompt_2": ["a dog", "a cow"], "num_images_per_prompt": 2, "original_size": (64, 64)}),
        ("sd3", {"negative_prompt": ["a", "b"], "num_images_per_prompt": 2}),
        ("flux", {"negative_prompt": ["a", "b"], "true_cfg_scale": 2.0}),
        ("qwenimage", {"num_images_per_prompt": 2}),
        ("zimage", {"num_images_per_prompt": 2}),
        ("wan", {"num_videos_per_prompt": 2}),
    ],
)
def test_stock_arguments(name: str, extra: dict[str, Any]) -> None:
    call = ZOO[name].call() | {"prompt": ["a cat", "a dog on a tree"]} | extra
    if isinstance(call.get("negative_prompt"), str):
        call["negative_prompt"] = [call["negative_prompt"]] * 2
    same_as_stock(build(name), call)


def test_embeddings_instead_of_text_are_guided_alike_and_the_reward_is_told_a_prompt_apart() -> None:
    pipe, text = build("sdxl"), ZOO["sdxl"].call() | {"prompt": ["a cat", "a dog"], "output_type": "np"}
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    told: list[list[str]] = []

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        told.append(prompts)
        return images[:, 0].mean((1, 2))

    with torch.no_grad():
        encoded = dict(zip(names, pipe.encode_prompt(prompt=text["prompt"]), strict=True))
    call = {k: v for k, v in text.items() if k not in ("prompt", "negative_prompt")} | encoded
    guide: dict[str, Any] = {
        "sampler": "best-of-n:candidates=3",
        "reward": reward,
        "generator": [generator(), generator()],
    }
    by_text = pipe(**text, **guide)
    guide["generator"] = [generator(), generator()]
    assert set(told[-1]) <= {"a cat", "a dog"}
    by_embeddings = pipe(**call, **guide, reward_prompt=["one", "two"])
    assert set(told[-1]) <= {"one", "two"} and len(by_embeddings.rewards) == len(by_text.rewards) == 2
    reward.reads_prompt = True  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="reward reads the prompt, which is not given as text; pass reward_prompt="):
        pipe(**call, sampler="none", reward=reward)
    pipe(**call, sampler="none", reward=reward, reward_prompt="both")
    assert told[-1] == ["both", "both"]


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_callbacks_are_called_once_per_step_and_may_interrupt(name: str) -> None:
    pipe, seen = build(name), []

    def watch(pipe: DiffusionPipeline, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(index)
        return tensors

    same_as_stock(pipe, ZOO[name].call() | {"callback_on_step_end": watch})
    assert seen == [0, 1, 2, 3] * 2

    def stop(pipe: DiffusionPipeline, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 1
        return tensors

    out = pipe(**ZOO[name].call(), seed=0, sampler=rg.Unguided(ODE), callback_on_step_end=stop, output_type="np")
    assert out.ledger.stopped == "interrupted" and np.isfinite(out.images).all()
    assert out.ledger.denoiser_evaluations < 8


@torch.no_grad()
def test_features_that_depend_on_the_step_survive_a_jump() -> None:
    pipe = ZOO["sd3"].build()
    layers = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.7}
    call = ZOO["sd3"].call() | {"num_inference_steps": 6, "generator": generator()}
    outputs = []
    for extra in ({}, layers):
        with closing(PipelineDenoiser(pipe, call | {"generator": generator()} | extra)) as denoiser:
            states = [denoiser.initial()]
            for level in range(6):
                prediction = denoiser.predict(states[-1], level)
                states.append(ODE(prediction, denoiser.schedule, level, level + 1).mean)
            for level in (3, 5, 0):
                again = denoiser.predict(states[level].clone(), level)
                assert torch.equal(ODE(again, denoiser.schedule, level, level + 1).mean, states[level + 1])
            outputs.append(states[-1])
    assert not torch.allclose(*outputs), "the feature must do something for this test to mean anything"


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "sana", "pixart_sigma"])
def test_half_precision(name: str) -> None:
    pipe = build(name).to(torch.bfloat16)
    same_as_stock(pipe, ZOO[name].call())
    stepwise = rg.StepwiseSampling(candidates=2, transition=Transition("ddim", 1.0))
    out = pipe(**ZOO[name].call(), seed=0, sampler=stepwise, reward=redness, output_type="np")
    assert np.isfinite(out.images).all() and pipe.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_sharing_in_both_directions_keeps_dtype_and_modules(name: str) -> None:
    stock = ZOO[name].build().to(torch.bfloat16)
    guided = rg.reward_guided(type(stock)).from_pipe(stock)
    back = type(stock).from_pipe(guided, dtype=guided.dtype)
    assert stock.dtype == guided.dtype == back.dtype == torch.bfloat16
    assert stock.vae is guided.vae is back.vae and type(back) is type(stock)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_offload_hooks_stay_in_place(name: str) -> None:
    pipe = build(name)
    reference = pipe(**ZOO[name].call(), generator=generator(), output_type="np")[0]
    pipe.enable_model_cpu_offload(device="cpu")
    same_as_stock(pipe, ZOO[name].call())
    best = pipe(**ZOO[name].call(), seed=0, sampler=rg.BestOfN(2), reward=redness, output_type="np")
    assert np.isfinite(best.images).all()
    assert np.array_equal(pipe(**ZOO[name].call(), generator=generator(), output_type="np")[0], reference)
    pipe.remove_all_hooks()


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_vae_slicing_and_tiling(name: str) -> None:
    pipe = build(name)
    pipe.vae.enable_slicing()
    pipe.vae.enable_tiling()
    same_as_stock(pipe, ZOO[name].call() | {"prompt": ["a cat", "a dog"]})


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_compiled_denoisers(name: str) -> None:
    pipe = build(name)
    attribute = "unet" if name == "sd15" else "transformer"
    reference = pipe(**ZOO[name].call(), generator=generator(), output_type="np")[0]
    setattr(pipe, attribute, torch.compile(getattr(pipe, attribute), backend="eager"))
    same_as_stock(pipe, ZOO[name].call())
    out = pipe(**ZOO[name].call(), generator=generator(), output_type="np", sampler="none")
    assert np.allclose(out.images, reference, atol=1e-5)
    assert out.ledger.denoiser_evaluations == 8, "evaluations of a compiled denoiser count too"


def test_lora_and_its_scale() -> None:
    pipe = build("sd3")
    plain = pipe(**ZOO["sd3"].call(), generator=generator(), output_type="np")[0]
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    for scale in (1.0, 0.3):
        same_as_stock(pipe, ZOO["sd3"].call() | {"joint_attention_kwargs": {"scale": scale}})
    assert not np.allclose(plain, pipe(**ZOO["sd3"].call(), generator=generator(), output_type="np")[0])


@pytest.mark.parametrize(
    ("name", "scheduler", "readable"),
    [
        ("sd15", "UniPCMultistepScheduler", True),
        ("sd15", "DPMSolverMultistepScheduler", True),
        ("sd15", "DDPMScheduler", True),
        ("sd15", "EulerAncestralDiscreteScheduler", True),
        ("sd15", "LMSDiscreteScheduler", True),
        ("sd15", "DEISMultistepScheduler", True),
        ("sd15", "TCDScheduler", True),
        ("sd15", "PNDMScheduler", False),
        ("sd15", "HeunDiscreteScheduler", False),
        ("sd15", "KDPM2AncestralDiscreteScheduler", False),
        ("sdxl", "UniPCMultistepScheduler", True),
        ("sd3", "FlowMatchHeunDiscreteScheduler", False),
    ],
)
def test_every_scheduler_as_it_is_and_our_transitions_where_it_can_be_read(
    name: str, scheduler: str, readable: bool
) -> None:
    pipe = build(name)
    pipe.scheduler = getattr(diffusers, scheduler).from_config(pipe.scheduler.config)
    call = ZOO[name].call()
    same_as_stock(pipe, call)
    best = pipe(**call, seed=0, sampler=rg.BestOfN(3), reward=redness, output_type="np")
    assert best.rewards[0] >= pipe(**call, seed=0, sampler="none", reward=redness).rewards[0] - 1e-6
    stepwise = rg.StepwiseSampling(candidates=3, transition=Transition("ddim", 1.0))
    if readable:
        assert np.isfinite(pipe(**call, seed=0, sampler=stepwise, reward=redness, output_type="np").images).all()
    else:
        with pytest.raises(ValueError, match=f"{scheduler}.*more than once per level.*best-of-n"):
            pipe(**call, seed=0, sampler=stepwise, reward=redness)


def test_a_saved_guided_pipeline_reloads_everywhere(tmp_path: Path) -> None:
    for name in ("sd15", "sdxl", "flux", "sana"):
        pipe = build(name)
        reference = pipe(**ZOO[name].call(), generator=generator(), output_type="np")[0]
        pipe.save_pretrained(tmp_path / name)
        stock = type(pipe).__mro__[1]
        for cls in (type(pipe), stock, DiffusionPipeline):
            again = cls.from_pretrained(tmp_path / name)
            again.set_progress_bar_config(disable=True)
            images = again(**ZOO[name].call(), generator=generator(), output_type="np")[0]
            assert np.abs(images - reference).max() < 1e-5, "weights lie elsewhere in memory, and may round otherwise"


def test_bad_input() -> None:
    sdxl = build("sdxl")
    with pytest.raises(ValueError, match="denoising_end"):
        sdxl(**ZOO["sdxl"].call(), seed=0, sampler="none", denoising_end=0.5)
    with pytest.raises(ValueError, match="StableCascadeCombinedPipeline cannot be guided: .*no denoising loop"):
        PipelineDenoiser(diffusers.StableCascadeCombinedPipeline.__new__(diffusers.StableCascadeCombinedPipeline), {})
    with pytest.raises(ValueError, match="another latent space"):
        build("flux")(**ZOO["flux"].call(), seed=0, sampler="stepwise", reward="shapes-drm")


@pytest.mark.parametrize("cap", [3, 4, 7])
@pytest.mark.parametrize("sampler", [rg.StepwiseSampling(3), rg.SVDD(3), rg.TwistedSMC(3)], ids=lambda s: s.name)
def test_a_cap_on_decodes_holds_with_the_last_one(guided: DiffusionPipeline, sampler: Any, cap: int) -> None:
    out = guided(
        "a red star", num_inference_steps=4, seed=0, sampler=sampler, reward=redness, budget=rg.Budget(decodes=cap)
    )
    assert out.ledger.decodes <= cap

"""Batches, prompts, callbacks, input images and latents."""

import inspect
from contextlib import closing
from typing import Any

import diffusers as df
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SD3CFGCutoffCallback, SDCFGCutoffCallback
from torch import Tensor

from rsm_guidance.core.transitions import Transition
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.engine.schedulers import refusal
from tests.pipelines.common.helpers import (
    CALLED_BACK,
    FEW,
    IMAGES,
    JUMPING,
    KINDS,
    ODE,
    batch,
    build,
    close,
    redness,
    run,
    thrice,
    under_guidance,
    unguided,
)
from tests.zoo import ZOO

# --- batches and prompts ---


@pytest.mark.parametrize("name", KINDS)
def test_inference_batch_consistent_and_single_identical(name: str) -> None:
    pipe = build(name)
    prompts = ["a cat", "very long " * 30]
    together = np.asarray(unguided(pipe, name, **batch(name, prompts)))
    assert len(together) == 2
    alone = np.asarray(run(pipe, name, **batch(name, prompts[:1])))
    assert close(together[0], alone[0], 2e-3)
    if name in FEW:
        assert len(under_guidance(pipe, name, **batch(name, prompts))) == 2


@pytest.mark.parametrize("name", KINDS)
def test_num_images_per_prompt(name: str) -> None:
    pipe = build(name)
    parameters = inspect.signature(type(pipe).__call__).parameters
    copies = next(n for n in ("num_images_per_prompt", "num_videos_per_prompt") if n in parameters)
    pair = batch(name, ["a cat", "a red dog"])
    del pair["generator"]  # one for all
    assert len(unguided(pipe, name, **{copies: 2})) == 2
    assert len(unguided(pipe, name, **pair, **{copies: 2})) == 4
    if name in FEW:
        assert len(under_guidance(pipe, name, **pair, **{copies: 2})) == 4


@pytest.mark.parametrize("name", [n for n in KINDS if n != "flux2_klein"])
def test_cfg(name: str) -> None:
    pipe = build(name)
    true = "true_cfg_scale" in ZOO[name].call()
    scale = "true_cfg_scale" if true else "guidance_scale"
    no = 0.0 if name == "zimage" else 1.0  # Z-Image adds what others multiply
    off, on = (unguided(pipe, name, **{scale: value}) for value in (no, 7.5))
    assert off.shape == on.shape
    embedded = name.startswith("flux")  # the scale is an input of the denoiser
    assert embedded or not np.array_equal(off, on)
    for value, evaluations in ((no, 1), (7.5, 1 if embedded else 2)):
        out = pipe(**ZOO[name].call() | {scale: value, "sampler": "none", "seed": 0, "output_type": "latent"})
        steps = out.ledger.denoiser_evaluations / evaluations
        assert steps == int(steps) and 1 <= steps <= 5


# The argument that takes each result of `encode_prompt`, for each of its calls; None for results that are made anew.
_POSITIVE_NEGATIVE = [("prompt_embeds", "negative_prompt_embeds")]
_POOLED = [("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")]
_MASKED = [("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")]
EMBEDDINGS: dict[str, list[tuple[str | None, ...]]] = {
    "sd15": _POSITIVE_NEGATIVE,
    "sd15_img2img": _POSITIVE_NEGATIVE,
    "sd15_inpaint": _POSITIVE_NEGATIVE,
    "sd15_controlnet": _POSITIVE_NEGATIVE,
    "sdxl": _POOLED,
    "sdxl_img2img": _POOLED,
    "sdxl_inpaint": _POOLED,
    "sd3": _POOLED,
    "sd3_img2img": _POOLED,
    "sd3_inpaint": _POOLED,
    "flux": [("prompt_embeds", "pooled_prompt_embeds", None)],
    "flux_kontext": [("prompt_embeds", "pooled_prompt_embeds", None)],
    "flux_fill": [("prompt_embeds", "pooled_prompt_embeds", None)],
    "flux2_klein": [("prompt_embeds", None), ("negative_prompt_embeds", None)],
    "chroma": [
        (
            "prompt_embeds",
            None,
            "prompt_attention_mask",
            "negative_prompt_embeds",
            None,
            "negative_prompt_attention_mask",
        )
    ],
    "pixart_alpha": _MASKED,
    "pixart_sigma": _MASKED,
    "sana": _MASKED,
    "lumina2": _MASKED,
    "qwenimage": [
        ("prompt_embeds", "prompt_embeds_mask"),
        ("negative_prompt_embeds", "negative_prompt_embeds_mask"),
    ],
    "zimage": _POSITIVE_NEGATIVE,
    "wan": _POSITIVE_NEGATIVE,
    "hidream": [
        (
            "prompt_embeds_t5",
            "negative_prompt_embeds_t5",
            "prompt_embeds_llama3",
            "negative_prompt_embeds_llama3",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        )
    ],
}


@pytest.mark.parametrize("name", list(EMBEDDINGS))
def test_encode_prompt_works_in_isolation(name: str) -> None:
    """A pipeline with text encoders alone encodes for one without; without a sampler our class is stock there too."""
    whole = build(name)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    stock_encode = whole.encode_prompt

    def encode(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return stock_encode(*args, **kwargs)

    whole.encode_prompt = encode
    reference = run(whole, name)
    del whole.encode_prompt
    assert len(calls) == len(EMBEDDINGS[name])
    text = {k for k in whole.components if k.startswith(("text_encoder", "tokenizer"))}
    encoder = type(whole)(**{k: v if k in text else None for k, v in whole.components.items()})
    call: dict[str, Any] = {"prompt": None}
    parameters = inspect.signature(type(whole).__call__).parameters
    if "negative_prompt" in parameters:
        call["negative_prompt"] = None
    for (args, kwargs), names in zip(calls, EMBEDDINGS[name], strict=True):
        with torch.no_grad():
            encoded = encoder.encode_prompt(*args, **kwargs)
        call |= {n: e for n, e in zip(names, encoded, strict=True) if n is not None}
    assert call.keys() <= parameters.keys()
    rest = type(whole)(**{k: None if k in text else v for k, v in whole.components.items()})
    rest.set_progress_bar_config(disable=True)
    assert np.array_equal(run(rest, name, **call), reference)
    assert np.array_equal(run(rest, name, **call, sampler="none"), reference)


# --- callbacks ---


@pytest.mark.parametrize("name", CALLED_BACK)
def test_callback_inputs(name: str) -> None:
    pipe = build(name)
    allowed = list(pipe._callback_tensor_inputs)
    seen: list[tuple[int, list[str]]] = []

    def watch(pipe: DiffusionPipeline, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert type(pipe).__qualname__.startswith("RewardGuided") and 0 <= index < pipe.num_timesteps
        seen.append((index, list(tensors)))
        return tensors

    def zero(pipe: DiffusionPipeline, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    reference = unguided(pipe, name)
    for inputs in (["latents"], allowed) if name in FEW else (allowed,):
        seen.clear()
        watched = unguided(pipe, name, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=inputs)
        assert np.array_equal(watched, reference)
        once = seen[: len(seen) // 2]
        assert once == seen[len(once) :] and [i for i, _ in once] == list(range(len(once))) and len(once) > 0
        assert all(names == inputs for _, names in once)
    if name != "zimage":  # which looks them up unchecked
        with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
            run(
                pipe, name, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["none_such"], sampler="none"
            )
    guidance: tuple[dict[str, Any], ...] = ({}, {"sampler": "none"})
    if refusal(pipe.scheduler) is None:
        guidance += ({"sampler": ODE},)
    for extra in guidance:
        changed = run(pipe, name, output_type="latent", callback_on_step_end=zero, **extra)
        assert torch.as_tensor(changed).abs().sum() == 0


@pytest.mark.parametrize("name", KINDS)
def test_callback_tensor_changes(name: str) -> None:
    """What a callback makes of the latents in the middle of a run is what the run goes on with."""
    pipe = build(name)

    def shrink(pipe: DiffusionPipeline, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": 0.5 * tensors["latents"]} if index == 0 else {}

    changed = unguided(pipe, name, callback_on_step_end=shrink)
    assert not np.array_equal(changed, run(pipe, name))
    if type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":  # whose steps our ode has to the bit
        assert np.array_equal(run(pipe, name, callback_on_step_end=shrink, sampler=ODE), changed)


@pytest.mark.parametrize("name", KINDS)
def test_callback_cfg(name: str) -> None:
    pipe = build(name)

    def increase(pipe: DiffusionPipeline, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale += 1.0
        return tensors

    scaled = unguided(pipe, name, guidance_scale=2.0, callback_on_step_end=increase)
    run(pipe, name, guidance_scale=2.0, callback_on_step_end=increase)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    if not name.startswith(("flux", "sana", "qwenimage", "wan")):  # which read the argument
        assert not np.array_equal(scaled, run(pipe, name, guidance_scale=2.0))


CUTOFFS: dict[str, type[PipelineCallback]] = {
    "sd15": SDCFGCutoffCallback,
    "sdxl": df.callbacks.SDXLCFGCutoffCallback,
    "sd3": SD3CFGCutoffCallback,
}


def cutoff(name: str) -> PipelineCallback:
    """diffusers' callback that switches guidance off from the third step on."""
    return CUTOFFS[name](cutoff_step_ratio=None, cutoff_step_index=1)


@pytest.mark.parametrize("name", list(CUTOFFS))
def test_pipeline_callbacks_are_stock_without_jumps(name: str) -> None:
    for callback in (cutoff(name), MultiPipelineCallbacks([cutoff(name)])):
        changed = thrice(name, callback_on_step_end=callback)
        assert not np.array_equal(changed, run(ZOO[name].build(), name))


@torch.no_grad()
@pytest.mark.parametrize("name", list(CUTOFFS))
def test_pipeline_callbacks_hold_after_a_jump(name: str) -> None:
    """A prediction depends on the level alone, not on how it was reached, also where a callback changes the run."""
    ode = Transition("ode")
    call = ZOO[name].call() | {"generator": torch.Generator().manual_seed(0), "callback_on_step_end": cutoff(name)}
    with closing(PipelineDenoiser(build(name), call)) as denoiser:
        states = [denoiser.initial()]
        for level in range(denoiser.steps):
            states.append(ode(denoiser.predict(states[-1], level), denoiser.schedule, level, level + 1).mean)
        for level in (3, 0, 2, 1):
            again = ode(denoiser.predict(states[level].clone(), level), denoiser.schedule, level, level + 1).mean
            assert torch.equal(again, states[level + 1]), level


@pytest.mark.parametrize("name", list(CUTOFFS))
def test_pipeline_callbacks_hold_under_a_sampler_that_jumps(name: str) -> None:
    pipe, call = build(name), ZOO[name].call() | {"seed": 0, "output_type": "np"}
    plain = pipe(**call, sampler=JUMPING, reward=redness)
    cut = pipe(**call, sampler=JUMPING, reward=redness, callback_on_step_end=cutoff(name))
    assert cut.ledger.denoiser_evaluations < plain.ledger.denoiser_evaluations, "no guidance from the third step on"
    assert not np.array_equal(cut.images, plain.images)


@torch.no_grad()
@pytest.mark.parametrize("name", list(CUTOFFS))
@pytest.mark.parametrize("several", [False, True])
def test_pipeline_callbacks_keep_the_prompt_of_every_row(name: str, several: bool) -> None:
    """diffusers' own keep the last row of the conditioning, for one image: with more they fail, or give all its prompt."""
    callback = MultiPipelineCallbacks([cutoff(name)]) if several else cutoff(name)
    prompts = ["a red cat", "two blue dogs, at night", "three green birds in a very old tree"]
    call = ZOO[name].call() | {"prompt": prompts, "callback_on_step_end": callback}
    with closing(PipelineDenoiser(build(name), call | {"generator": torch.Generator().manual_seed(0)})) as denoiser:
        x = torch.randn(6, *denoiser.initial().shape[1:], generator=torch.Generator().manual_seed(1))
        rows = torch.tensor([0, 1, 2, 2, 1, 0])
        for level in (3, 1):
            together = denoiser.predict(x, level, rows).x0
            for i in range(6):
                alone = denoiser.predict(x[i : i + 1].clone(), level, rows[i : i + 1]).x0
                assert close(alone[0], together[i], 1e-3)
        assert not close(together[0], together[5], 1e-3), "the latents differ"


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "sana", "wan", "sd15_inpaint", "sd3_inpaint"])
def test_callbacks_with_tensors_do_not_disturb_a_sampler_that_jumps(name: str) -> None:
    pipe = build(name)
    before = under_guidance(pipe, name)
    seen = []

    def watch(pipe: DiffusionPipeline, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert list(tensors) == inputs
        seen.append(index)
        return tensors

    inputs = list(pipe._callback_tensor_inputs)
    watched = under_guidance(pipe, name, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=inputs)
    assert np.array_equal(watched, before)
    assert seen


# --- input images and latents ---


@pytest.mark.parametrize("name", IMAGES)
def test_pt_np_pil_inputs_equivalent(name: str) -> None:
    pipe, base = build(name), ZOO[name].call()
    pictures = {k: base[k] for k in ("image", "mask_image") if k in base}
    arrays = {k: np.asarray(v, np.float32)[None] / 255 for k, v in pictures.items()}
    arrays = {k: v if v.ndim == 4 else v[..., None] for k, v in arrays.items()}
    tensors = {k: torch.from_numpy(v).movedim(-1, 1) for k, v in arrays.items()}
    reference = unguided(pipe, name)
    for given in (arrays, tensors):
        assert close(unguided(pipe, name, **given), reference, 1e-2)
        assert close(under_guidance(pipe, name, **given), under_guidance(pipe, name), 1e-2)


@pytest.mark.parametrize("name", ["sd15_img2img", "sdxl_img2img", "sd3_img2img"])
def test_latents_as_input_image(name: str) -> None:
    pipe = build(name)
    channels = pipe.vae.config.latent_channels
    latents = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    out = thrice(name, image=latents)
    assert not np.array_equal(out, run(pipe, name))
    under_guidance(pipe, name, image=latents)


@pytest.mark.parametrize("name", [n for n in KINDS if n != "sd3_img2img"])
def test_latents_input(name: str) -> None:
    pipe = build(name)
    start: list[Tensor] = []
    with closing(
        PipelineDenoiser(pipe, ZOO[name].call() | {"generator": torch.Generator().manual_seed(5)})
    ) as denoiser:
        start.append(denoiser.initial())
    if name == "flux2_klein":  # packs them itself
        start[0] = start[0].mT.reshape(1, 16, 8, 8)
    if hasattr(pipe.scheduler, "init_noise_sigma") and "inpaint" not in name:
        start[0] = start[0] / pipe.scheduler.init_noise_sigma  # given latents are scaled once more
    out = unguided(pipe, name, latents=start[0])
    assert not np.array_equal(out, run(pipe, name)), "they are used"


@pytest.mark.parametrize("name", ["sd15", "sd15_img2img", "sdxl"])
def test_multi_vae(name: str) -> None:
    widths = {"block_out_channels": (8, 8)}
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    torch.manual_seed(0)
    kinds = [
        df.AsymmetricAutoencoderKL(
            down_block_types=down,
            up_block_types=up,
            down_block_out_channels=(8, 8),
            up_block_out_channels=(8, 8),
            norm_num_groups=4,
        ),
        df.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        df.AutoencoderKL(**widths, down_block_types=down, up_block_types=up, norm_num_groups=4, latent_channels=4),
    ]
    reference = run(ZOO[name].build(), name)
    for vae in kinds:
        vae.eval()
        out = thrice(name, lambda pipe, vae=vae: pipe.register_modules(vae=vae))
        assert out.shape == reference.shape and not np.array_equal(out, reference)
        pipe = build(name)
        pipe.register_modules(vae=vae)
        under_guidance(pipe, name)

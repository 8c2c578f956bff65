"""Tiny, randomly initialised diffusers pipelines, one per family, built in code and offline.

They paint nothing, but run the stock code of their class, and the denoiser heeds latents, timestep and prompt.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers as df
import torch
from diffusers import DiffusionPipeline
from torch import nn

from tests.zoo import families, parts


@dataclass(frozen=True)
class Specimen:
    """One family: how to build a tiny pipeline of it, and the keyword arguments of one small stock call."""

    name: str
    build: Callable[[], DiffusionPipeline]
    call: Callable[[], dict[str, Any]]


def _awaken(denoiser: nn.Module) -> None:
    """Let every layer pass on the variance of its input.

    As initialised, layers shrink it, a ControlNet's last ones to zero: prompts and images would have next to no effect.
    """
    for layer in denoiser.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)


def _build(make: Callable[[], DiffusionPipeline]) -> DiffusionPipeline:
    """The pipeline that `make` puts together: always the same one, silent and in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = make()
        for name, module in pipe.components.items():
            if isinstance(module, nn.Module):
                module.eval()
            if name in ("unet", "controlnet", "transformer"):
                _awaken(module)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def specimen(name: str, make: Callable[[], DiffusionPipeline], **call: Any) -> Specimen:
    """A specimen whose call is never shared between two uses; without a prompt where that is None."""
    given = {k: v for k, v in {"prompt": "a cat", **call}.items() if k != "prompt" or v is not None}
    return Specimen(name, partial(_build, make), partial(copy.deepcopy, given))


SIZE: dict[str, Any] = {"num_inference_steps": 4, "height": 32, "width": 32}
TEXT: dict[str, Any] = {**SIZE, "max_sequence_length": 48}
EDIT: dict[str, Any] = {"num_inference_steps": 4, "image": parts.picture(), "strength": 0.75}
FILL: dict[str, Any] = {**SIZE, **EDIT, "mask_image": parts.mask()}
PLAIN: dict[str, Any] = {**TEXT, "clean_caption": False, "use_resolution_binning": False}

ZOO: dict[str, Specimen] = {
    found.name: found
    for found in (
        specimen("sd15", lambda: df.StableDiffusionPipeline(**families.sd15()), guidance_scale=5.0, **SIZE),
        specimen(
            "sd15_img2img", lambda: df.StableDiffusionImg2ImgPipeline(**families.sd15()), guidance_scale=5.0, **EDIT
        ),
        specimen(
            "sd15_inpaint", lambda: df.StableDiffusionInpaintPipeline(**families.sd15()), guidance_scale=5.0, **FILL
        ),
        specimen(
            "sd15_inpaint9",
            lambda: df.StableDiffusionInpaintPipeline(**families.sd15(in_channels=9)),
            guidance_scale=5.0,
            **FILL | {"strength": 1.0},
        ),
        specimen("sd15_controlnet", families.sd15_controlnet, image=parts.picture(), guidance_scale=5.0, **SIZE),
        specimen(
            "sd15_ip_adapter", families.sd15_ip_adapter, ip_adapter_image=parts.picture(), guidance_scale=5.0, **SIZE
        ),
        specimen(
            "sd15_lcm",
            lambda: df.StableDiffusionPipeline(
                **families.sd15(df.LCMScheduler(**parts.betas()), time_cond_proj_dim=16)
            ),
            guidance_scale=5.0,
            **SIZE,
        ),
        specimen("sdxl", lambda: df.StableDiffusionXLPipeline(**families.sdxl()), guidance_scale=5.0, **SIZE),
        specimen(
            "sdxl_img2img", lambda: df.StableDiffusionXLImg2ImgPipeline(**families.sdxl()), guidance_scale=5.0, **EDIT
        ),
        specimen(
            "sdxl_inpaint", lambda: df.StableDiffusionXLInpaintPipeline(**families.sdxl()), guidance_scale=5.0, **FILL
        ),
        specimen(
            "sdxl_turbo",
            lambda: df.StableDiffusionXLPipeline(
                **families.sdxl(df.EulerAncestralDiscreteScheduler(**parts.betas() | {"timestep_spacing": "trailing"}))
            ),
            guidance_scale=0.0,
            **SIZE | {"num_inference_steps": 2},
        ),
        specimen("sd3", lambda: df.StableDiffusion3Pipeline(**families.sd3()), guidance_scale=3.0, **TEXT),
        specimen(
            "sd3_img2img",
            lambda: df.StableDiffusion3Img2ImgPipeline(**families.sd3()),
            guidance_scale=3.0,
            **TEXT | EDIT,
        ),
        specimen(
            "sd3_inpaint",
            lambda: df.StableDiffusion3InpaintPipeline(**families.sd3()),
            guidance_scale=3.0,
            **TEXT | FILL,
        ),
        specimen("flux", lambda: df.FluxPipeline(**families.flux()), guidance_scale=3.5, **TEXT),
        specimen(
            "flux_schnell", lambda: df.FluxPipeline(**families.flux(False, parts.flow())), guidance_scale=0.0, **TEXT
        ),
        specimen(
            "flux_kontext",
            lambda: df.FluxKontextPipeline(**families.flux()),
            image=parts.picture(),
            guidance_scale=3.5,
            max_area=32 * 32,
            _auto_resize=False,
            **TEXT,
        ),
        # Latents, the masked image's latents and the mask, each packed: 16 + 16 + 16 channels.
        specimen(
            "flux_fill",
            lambda: df.FluxFillPipeline(**families.flux(channels=48)),
            guidance_scale=30.0,
            **TEXT | FILL | {"strength": 1.0},
        ),
        specimen(
            "flux2_klein",
            families.flux2_klein,
            guidance_scale=4.0,
            **TEXT | {"max_sequence_length": 24},
        ),
        specimen("chroma", families.chroma, guidance_scale=5.0, **TEXT),
        specimen(
            "pixart_alpha",
            lambda: df.PixArtAlphaPipeline(**families.pixart(df.DPMSolverMultistepScheduler(**parts.betas()))),
            guidance_scale=4.5,
            **PLAIN,
        ),
        specimen(
            "pixart_sigma",
            lambda: df.PixArtSigmaPipeline(**families.pixart(parts.ddim())),
            guidance_scale=4.5,
            **PLAIN,
        ),
        specimen("sana", families.sana, guidance_scale=4.5, complex_human_instruction=None, **PLAIN),
        specimen("qwenimage", families.qwenimage, negative_prompt=" ", true_cfg_scale=4.0, **TEXT),
        specimen(
            "qwenimage_edit",
            families.qwenimage_edit,
            image=parts.picture(),
            negative_prompt=" ",
            true_cfg_scale=4.0,
            **TEXT,
        ),
        specimen("zimage", families.zimage, guidance_scale=3.0, **TEXT),
        specimen(
            "lumina2", families.lumina2, guidance_scale=4.0, system_prompt="", **TEXT | {"height": 64, "width": 64}
        ),
        specimen("hidream", families.hidream, guidance_scale=3.0, **TEXT),
        specimen("wan", families.wan, guidance_scale=5.0, num_frames=5, **TEXT),
    )
}

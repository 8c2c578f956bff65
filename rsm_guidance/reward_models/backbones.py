"""What each denoiser family is called with when a reward model asks it about noisy latents, conditional branch only.

One entry per denoiser class; a test compares each with what the stock pipeline passes to its denoiser.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from rsm_guidance.engine.families import stock_call_of
from rsm_guidance.reward_models.backbone import denoiser_of

Texts = dict[str, Any]
"""Encoded prompts: per name one entry per prompt, a tensor each ([L, D], [D] or a mask [L])."""
Grid = tuple[int, int]


@dataclass(frozen=True)
class Backbone:
    """A denoiser family.

    Attributes:
        blocks: names of the module (lists) that hold its blocks, in the order they run.
        encode: pipeline and prompts to text features by name, each [B, ...] or a list of B.
        call: pipeline, latents, timesteps [B] in [0, 1000], texts (batched) and grid to the denoiser's arguments.
        packed: latents are tokens [B, S, C], not planes [B, C, H, W].
    """

    blocks: tuple[str, ...]
    encode: Callable[[DiffusionPipeline, list[str]], dict[str, Any]]
    call: Callable[[DiffusionPipeline, Tensor, Tensor, Texts, Grid], dict[str, Any]]
    packed: bool = False


def _stable_diffusion_text(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Any]:
    embeds, _ = pipe.encode_prompt(prompts, pipe._execution_device, 1, False)
    return {"encoder_hidden_states": embeds}


def _unet(pipe: DiffusionPipeline, x: Tensor, t: Tensor, texts: Texts, grid: Grid) -> dict[str, Any]:
    arguments = {"sample": x, "timestep": t, "encoder_hidden_states": texts["encoder_hidden_states"]}
    width = pipe.unet.config.time_cond_proj_dim
    if width is not None:  # distilled on the guidance scale: judge without guidance
        weight = torch.zeros(len(x))
        arguments["timestep_cond"] = pipe.get_guidance_scale_embedding(weight, embedding_dim=width).to(x)
    return arguments


def _sdxl_text(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Any]:
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "text_embeds": pooled}


def _sdxl(pipe: DiffusionPipeline, x: Tensor, t: Tensor, texts: Texts, grid: Grid) -> dict[str, Any]:
    height, width = (side * pipe.vae_scale_factor for side in x.shape[-2:])
    ids = [height, width, 0, 0, height, width]  # original size, crop, target size
    if pipe.config.get("requires_aesthetics_score"):
        ids = [height, width, 0, 0, 6.0]  # the refiner's default score stands where the target size was
    added = {"text_embeds": texts["text_embeds"], "time_ids": x.new_tensor(ids).expand(len(x), -1)}
    return _unet(pipe, x, t, texts, grid) | {"added_cond_kwargs": added}


def _sd3_text(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Any]:
    embeds, _, pooled, _ = pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _sd3(pipe: DiffusionPipeline, x: Tensor, t: Tensor, texts: Texts, grid: Grid) -> dict[str, Any]:
    return {"hidden_states": x, "timestep": t, **texts}


def _flux_text(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Any]:
    embeds, pooled, _ = pipe.encode_prompt(prompts, None)
    return {"encoder_hidden_states": embeds, "pooled_projections": pooled}


def _flux(pipe: DiffusionPipeline, x: Tensor, t: Tensor, texts: Texts, grid: Grid) -> dict[str, Any]:
    guided = pipe.transformer.config.guidance_embeds
    return {
        "hidden_states": x,
        "timestep": t.to(x.dtype) / 1000,
        "guidance": torch.full((len(x),), 3.5, device=x.device) if guided else None,  # the pipeline's default
        "txt_ids": x.new_zeros(texts["encoder_hidden_states"].shape[1], 3),
        "img_ids": pipe._prepare_latent_image_ids(len(x), *grid, x.device, x.dtype),
        **texts,
    }


def _masked_text(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Any]:
    clean = _default(pipe, "clean_caption")
    embeds, mask, _, _ = pipe.encode_prompt(prompts, do_classifier_free_guidance=False, clean_caption=clean)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def _default(pipe: DiffusionPipeline, argument: str) -> Any:
    """What the pipeline's call takes when an argument is left out."""
    return inspect.signature(stock_call_of(type(pipe))).parameters[argument].default


def _sana_text(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Any]:
    instruction, clean = _default(pipe, "complex_human_instruction"), _default(pipe, "clean_caption")
    embeds, mask, _, _ = pipe.encode_prompt(prompts, False, clean_caption=clean, complex_human_instruction=instruction)
    return {"encoder_hidden_states": embeds, "encoder_attention_mask": mask}


def _pixart(pipe: DiffusionPipeline, x: Tensor, t: Tensor, texts: Texts, grid: Grid) -> dict[str, Any]:
    added: dict[str, Tensor | None] = {"resolution": None, "aspect_ratio": None}
    if pipe.transformer.use_additional_conditions:
        height, width = (side * pipe.vae_scale_factor for side in x.shape[-2:])
        added = {
            "resolution": x.new_tensor([height, width]).expand(len(x), -1),
            "aspect_ratio": x.new_tensor([height / width]).expand(len(x), -1),
        }
    return {"hidden_states": x, "timestep": t, "added_cond_kwargs": added, **texts}


def _sana(pipe: DiffusionPipeline, x: Tensor, t: Tensor, texts: Texts, grid: Grid) -> dict[str, Any]:
    return {"hidden_states": x, "timestep": t * pipe.transformer.config.timestep_scale, **texts}


def _qwen_text(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Any]:
    encoded = [pipe.encode_prompt([p]) for p in prompts]  # one by one, for their own lengths
    return {"encoder_hidden_states": [embeds[0] for embeds, _ in encoded]}


def _qwen(pipe: DiffusionPipeline, x: Tensor, t: Tensor, texts: Texts, grid: Grid) -> dict[str, Any]:
    lengths = [len(e) for e in texts["encoder_hidden_states"]]
    embeds = nn.utils.rnn.pad_sequence(list(texts["encoder_hidden_states"]), batch_first=True)
    places = torch.arange(embeds.shape[1], device=x.device)
    mask = places[None] < torch.tensor(lengths, device=x.device)[:, None]
    return {
        "hidden_states": x,
        "timestep": t.to(x.dtype) / 1000,
        "encoder_hidden_states": embeds,
        "encoder_hidden_states_mask": None if bool(mask.all()) else mask.long(),
        "img_shapes": [[(1, *grid)]] * len(x),
    }


def _z_image_text(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, Any]:
    embeds, _ = pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False)  # a copy: it templates its list
    return {"cap_feats": embeds}


def _z_image(pipe: DiffusionPipeline, x: Tensor, t: Tensor, texts: Texts, grid: Grid) -> dict[str, Any]:
    return {"x": list(x.unsqueeze(2).unbind(0)), "t": (1000 - t) / 1000, "cap_feats": list(texts["cap_feats"])}


_UNET = ("down_blocks", "mid_block", "up_blocks")
_TABLE: dict[str, Backbone] = {
    "UNet2DConditionModel": Backbone(_UNET, _stable_diffusion_text, _unet),
    "SD3Transformer2DModel": Backbone(("transformer_blocks",), _sd3_text, _sd3),
    "FluxTransformer2DModel": Backbone(
        ("transformer_blocks", "single_transformer_blocks"), _flux_text, _flux, packed=True
    ),
    "PixArtTransformer2DModel": Backbone(("transformer_blocks",), _masked_text, _pixart),
    "SanaTransformer2DModel": Backbone(("transformer_blocks",), _sana_text, _sana),
    "QwenImageTransformer2DModel": Backbone(("transformer_blocks",), _qwen_text, _qwen, packed=True),
    "ZImageTransformer2DModel": Backbone(("layers",), _z_image_text, _z_image),
}
_SDXL = Backbone(_UNET, _sdxl_text, _sdxl)


def backbone_of(pipe: DiffusionPipeline) -> Backbone:
    """The family entry of a pipeline's denoiser.

    Raises:
        ValueError: for a denoiser that no reward model can be built on yet.
    """
    denoiser = denoiser_of(pipe)
    name = type(denoiser).__name__
    if name == "UNet2DConditionModel" and denoiser.config.addition_embed_type == "text_time":
        return _SDXL
    if name not in _TABLE:
        raise ValueError(
            f"a reward model can be built on {', '.join(_TABLE)}; {type(pipe).__name__} has a {name}: use a reward "
            "function, which judges decoded images"
        )
    return _TABLE[name]

"""How a reward model's backbone is conditioned on prompts: as the stock pipeline does it, without guidance.

A call of the pipeline is recorded (`engine.replay`), for each prompt and size of latents once; the text encoders run then,
the denoiser does not.  Of pipelines that start from images the text-to-image sibling is recorded where there is one.
Others are shown blank images.
"""

import inspect
from collections.abc import Mapping
from contextlib import closing
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.engine.arguments import NotReplayable
from rsm_guidance.engine.families import stock_call_of, traits_of
from rsm_guidance.engine.replay import Replay
from rsm_guidance.reward_models.backbone import denoiser_of
from rsm_guidance.reward_models.blocks import Grid

_CACHED_BYTES = 512 * 2**20  # of conditioning
_AT_ONCE = 64  # prompts that are recorded together
_TASKS = ("Img2Img", "Inpaint", "ControlNet", "Kontext")
_BLANK_WORDS = ("Img2Img", "Inpaint", "Fill", "ControlNet", "ImageEdit")


class Conditioning:
    """The denoiser's arguments for prompts, each recorded once."""

    def __init__(self, pipe: DiffusionPipeline, max_sequence_length: int = 0) -> None:
        self._max_sequence_length = max_sequence_length
        self._pipes = [p for p in (_sibling(pipe), pipe) if p is not None]
        self._recorded: dict[tuple[Any, ...], Replay] = {}
        self._bytes = 0
        self._encoders: object = None

    def arguments(self, latents: Tensor, timesteps: Tensor, prompts: list[str], grid: Grid) -> dict[str, Any]:
        """What the denoiser is called with, by name.

        Args:
            latents: [B, ...], in the scale of the denoiser's input.
            timesteps: [B], in [0, 1000].
            prompts: B prompts.
            grid: rows and columns of the image's tokens.

        Raises:
            UsageError: for latents of another family.
        """
        unique = list(dict.fromkeys(prompts))
        rows = torch.tensor([unique.index(p) for p in prompts], device=latents.device)
        replay = self._replay(unique, tuple(latents.shape[1:]), grid)
        args, kwargs = replay.arguments(latents, timesteps, rows)
        names = list(inspect.signature(type(denoiser_of(replay.pipe)).forward).parameters)[1:]
        return dict(zip(names, args, strict=False)) | kwargs

    def recorded(self, prompts: list[str], shape: tuple[int, ...], grid: Grid) -> list[Replay]:
        """The recording of each prompt, for latents of a shape [...] and a grid of the image's tokens."""
        self._replay(prompts, shape, grid)
        return [self._recorded[p, shape, grid] for p in prompts]

    def remember(self, replays: Mapping[str, Replay], grid: Grid) -> None:
        """Use recordings of prompts, of one row each, that were made elsewhere."""
        if self._bytes > _CACHED_BYTES:
            self._recorded.clear()
            self._bytes = 0
        self._encoders = _state_of_encoders(self._pipes[-1])
        for prompt, replay in replays.items():
            old = self._recorded.get((prompt, replay.shape, grid))
            self._bytes += replay.nbytes - (0 if old is None else old.nbytes)
            self._recorded[prompt, replay.shape, grid] = replay

    def _replay(self, prompts: list[str], shape: tuple[int, ...], grid: Grid) -> Replay:
        """The recording of prompts for latents of a shape."""
        missing = [p for p in prompts if (p, shape, grid) not in self._recorded]
        encoders = _state_of_encoders(self._pipes[-1])
        if encoders != self._encoders or (missing and self._bytes > _CACHED_BYTES):
            self._recorded.clear()
            self._encoders, self._bytes, missing = encoders, 0, prompts
        self._record(missing, shape, grid)
        parts = [self._recorded[p, shape, grid] for p in prompts]
        try:
            return Replay.joined(parts)
        except NotReplayable:  # texts that were padded to the longest of other batches
            self._record(prompts, shape, grid, len(prompts))
            return Replay.joined([self._recorded[p, shape, grid] for p in prompts])

    def _record(self, prompts: list[str], shape: tuple[int, ...], grid: Grid, at_once: int = _AT_ONCE) -> None:
        for start in range(0, len(prompts), at_once):
            chunk = prompts[start : start + at_once]
            replay = self._recording(chunk, shape, grid)
            for i, prompt in enumerate(chunk):
                old = self._recorded.get((prompt, shape, grid))
                row = replay.pick([i])
                self._bytes += row.nbytes - (0 if old is None else old.nbytes)
                self._recorded[prompt, shape, grid] = row

    def _recording(self, prompts: list[str], shape: tuple[int, ...], grid: Grid) -> Replay:
        """A new recording, with the first pipeline that works on latents of the shape."""
        found: tuple[int, ...] = ()
        for pipe in self._pipes:
            for guidance in _unguided(pipe):
                call = _call(pipe, prompts, shape, grid, self._max_sequence_length) | guidance
                with closing(PipelineDenoiser(pipe, call)) as denoiser:
                    found = tuple(denoiser.initial().shape[1:])
                    if found != shape:
                        break
                    replay = Replay.record(denoiser, outputs=False)
                    if replay.evaluations_per_row == 1:
                        return replay
        if found != shape:
            form, channels = ("[B, S, C]", found[-1]) if len(found) == 2 else ("[B, C, H, W]", found[0])
            raise UsageError(
                f"this reward model scores latents {form} with {channels} channels; got [B, {', '.join(map(str, shape))}], "
                "another latent space: use a reward model trained on the generator's family"
            )
        raise UsageError(
            f"{type(self._pipes[-1]).__name__} cannot be called without guidance, as a reward model needs it"
        )


def _sibling(pipe: DiffusionPipeline) -> DiffusionPipeline | None:
    """A text-to-image pipeline over the same modules, for one that starts from images; None if there is none."""
    stock = next((c for c in type(pipe).__mro__ if c.__module__.startswith("diffusers.")), type(pipe))
    name = stock.__name__
    for task in _TASKS:
        name = name.replace(task, "")
    cls = None if name == stock.__name__ else getattr(diffusers, name, None)
    if cls is None:
        return None
    parameters = inspect.signature(cls.__init__).parameters
    parts = {n: part for n, part in pipe.components.items() if n in parameters}
    settings = {n: v for n in ("requires_safety_checker", "force_zeros_for_empty_prompt")
                if n in parameters and (v := pipe.config.get(n)) is not None}  # fmt: skip
    return cls(**parts, **settings)


def _unguided(pipe: DiffusionPipeline) -> list[dict[str, Any]]:
    """Arguments that may switch classifier-free guidance off; the first under which a level is one evaluation does.

    Where the scale is an input of the denoiser it keeps its default.
    """
    traits = traits_of(pipe)
    parameters = inspect.signature(stock_call_of(type(pipe))).parameters
    guided = traits.negatives or hasattr(type(pipe), "do_classifier_free_guidance")
    if traits.true_cfg:
        return [{"true_cfg_scale": 1.0}]
    if "guidance_scale" not in parameters or not guided:
        return [{}]
    return [{"guidance_scale": 1.0}, {"guidance_scale": 0.0}]


def _call(
    pipe: DiffusionPipeline, prompts: list[str], shape: tuple[int, ...], grid: Grid, max_sequence_length: int
) -> dict[str, Any]:
    """A call of two steps for prompts and latents of a shape, the least that shows how the denoiser is told its level."""
    parameters = inspect.signature(stock_call_of(type(pipe))).parameters
    height, width = _pixels(pipe, shape, grid)
    blank = Image.new("RGB", (width, height), (127, 127, 127))
    settings: dict[str, Any] = {
        "height": height,
        "width": width,
        "max_area": height * width,
        "_auto_resize": False,
        "use_resolution_binning": False,
        "strength": 1.0,
        "mask_image": Image.new("L", (width, height), 255),
        "generator": torch.Generator().manual_seed(0),
    }
    if max_sequence_length:
        settings["max_sequence_length"] = max_sequence_length
    if len(shape) == 4:
        settings["num_frames"] = 1 + (shape[1] - 1) * pipe.vae_scale_factor_temporal
    if any(word in type(pipe).__name__ for word in _BLANK_WORDS):
        settings |= {"image": blank, "control_image": blank}
    if getattr(denoiser_of(pipe).config, "encoder_hid_dim_type", None) == "ip_image_proj":
        settings["ip_adapter_image"] = [blank] * len(denoiser_of(pipe).encoder_hid_proj.image_projection_layers)
    call = {name: value for name, value in settings.items() if name in parameters}
    drawn = [torch.Generator().manual_seed(0) for _ in prompts]  # pictures are encoded alike whatever the batch
    return call | {"prompt": prompts, "num_inference_steps": 2, "generator": drawn}


def _pixels(pipe: DiffusionPipeline, shape: tuple[int, ...], grid: Grid) -> tuple[int, int]:
    """Height and width of the images that latents of a shape decode to."""
    scale = int(getattr(pipe, "vae_scale_factor", None) or pipe.vae_scale_factor_spatial)
    rows, columns = (2 * grid[0], 2 * grid[1]) if len(shape) == 2 else shape[-2:]  # packed two by two
    return rows * scale, columns * scale


def _state_of_encoders(pipe: DiffusionPipeline) -> tuple[object, ...]:
    """What changes when the words of a pipeline change their meaning: textual inversion, an adapter, training."""
    state: list[object] = []
    for name, part in pipe.components.items():
        if name.startswith("tokenizer") and hasattr(part, "__len__"):
            state.append(len(part))
        elif name.startswith("text_encoder") and isinstance(part, nn.Module):
            state += [(id(p), p._version) for p in part.parameters() if not p.is_inference()]
    return tuple(state)

"""Preferences on disk, ready to be batched: latents, and what the denoiser is given for a prompt.

Text encoders run once for each prompt, before training; what they made lies in the cache beside the latents.  Thus they can
leave the accelerator, and a run that resumes sees the same embeddings to the bit.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from rsm_guidance.core.errors import UsageError
from rsm_guidance.data.preferences import Buckets, Encoder, PreferenceData, PreferenceFiles, cached_latents
from rsm_guidance.data.preferences.read import read_preferences
from rsm_guidance.engine.arguments import NotReplayable
from rsm_guidance.engine.encode import encode_images
from rsm_guidance.engine.replay import Replay
from rsm_guidance.io.fingerprint import fingerprint
from rsm_guidance.io.names import preference_location
from rsm_guidance.reward_models import DiffusionRewardModel
from rsm_guidance.reward_models.blocks import Grid
from rsm_guidance.training.reward_model.config import DataConfig, RewardConfig

_PROBES = ("a", "one red square and two blue circles")
_OWN = ("first", "second", "source_latents", "prompt", "probability", "weight", "index", "bucket", "scores")
_PIXELS_PER_TOKEN = 2  # latents along the side of a packed token


def collate(items: list[dict[str, Any]], epoch: int) -> dict[str, Any]:
    """A batch of preferences: latents `first` and `second` [B, ...], numbers [B], and lists of what has a length of its own."""
    batch: dict[str, Any] = {
        name: torch.stack([item[name] for item in items]) for name in ("first", "second", "probability", "weight")
    }
    batch["pair"] = [int(item["index"]) for item in items]
    batch["scores"] = [item["scores"] for item in items]
    batch["prompt"] = [item["prompt"] for item in items]
    batch["embeddings"] = [{k: v for k, v in item.items() if k not in _OWN} for item in items]
    batch["bucket"], batch["epoch"] = items[0]["bucket"], epoch
    return batch


class PromptEmbeddings:
    """What the denoiser is given for prompts, as tensors that can be kept, and put back where they were.

    Args:
        drm: the reward model, whose pipeline encodes prompts.
        latents: one image's latents [1, ...], for their shape.
        grid: rows and columns of its tokens.
    """

    def __init__(self, drm: DiffusionRewardModel, latents: Tensor, grid: Grid) -> None:
        self._conditioning = drm.conditioning
        self._shape, self._grid = tuple(latents.shape[1:]), grid
        self._templates: dict[tuple[tuple[int, ...], Grid], Replay] = {}
        short, long = self._conditioning.recorded(list(_PROBES), self._shape, grid)
        first, second = short.kept(), long.kept()
        self.names = sorted(n for n in first.keys() & second.keys() if not _same(first[n], second[n]))
        try:
            Replay.joined([short, long])
            self.usable = first.keys() == second.keys() and bool(self.names)
        except NotReplayable:  # texts are padded to the longest of a batch
            self.usable = False

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """Tensors [B, ...] of prompts [B], by their place in the denoiser's call."""
        kept = [replay.kept() for replay in self._conditioning.recorded(prompts, self._shape, self._grid)]
        return {name: torch.stack([row[name] for row in kept]) for name in self.names}

    def prepare(self, shape: tuple[int, ...], grid: Grid) -> None:
        """Record what does not depend on the prompt, for latents of a shape; text encoders are asked for the last time."""
        (template,) = self._conditioning.recorded(list(_PROBES[:1]), shape, grid)
        self._templates[shape, grid] = template

    def put_back(
        self, prompts: list[str], tensors: list[dict[str, Tensor]], shape: tuple[int, ...], grid: Grid
    ) -> None:
        """Let the reward model use the tensors of prompts; those of latents of another shape are prepared first."""
        template = self._templates[shape, grid]
        like = template.kept()
        replays = {
            prompt: template.keeping({name: tensor.to(like[name]) for name, tensor in own.items()})
            for prompt, own in zip(prompts, tensors, strict=True)
        }
        self._conditioning.remember(replays, grid)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a, b))


class PreparedData:
    """Training and held-out pairs of a configuration, encoded.

    Attributes:
        train: pairs to learn from.
        held_out: pairs to measure with; None if there are none.
        embeddings: gives the prompts' embeddings back; None where text encoders run while training.
        grids: rows and columns of image tokens, by bucket.
    """

    def __init__(self, drm: DiffusionRewardModel, config: RewardConfig, progress: Callable[[str], Any]) -> None:
        data = config.data
        buckets = buckets_of(drm, data)
        sizes = buckets.sizes
        self.grids = [_grid(drm, size) for size in sizes]
        self.embeddings = _embeddings(drm, sizes[0], self.grids[0]) if data.embeddings else None
        encoder = Encoder(
            _name(drm, self.embeddings), lambda images: encode_images(drm.pipe, images), self.embeddings, buckets
        )
        made = preference_location(data.path, config.cache, config.seed)
        train, held_out = files_of(replace(data, path=made), config.seed)
        self.train = cached_latents(train, encoder, config.cache, progress=progress("encoding pairs"))
        self.held_out: PreferenceData | None = None
        if held_out is not None:
            self.held_out = cached_latents(
                held_out, encoder, config.cache, progress=progress("encoding held-out pairs")
            )
        if self.embeddings is not None:
            for bucket in {*self.train.groups, *(self.held_out.groups if self.held_out else ())}:
                latents = _latents_of(drm, sizes[bucket])
                self.embeddings.prepare(tuple(latents.shape[1:]), self.grids[bucket])
            _to_cpu(drm.pipe)


def files_of(data: DataConfig, seed: int) -> tuple[PreferenceFiles, PreferenceFiles | None]:
    """What a configuration trains on, and what it holds out, unread."""

    def read(path: str, split: str | None) -> PreferenceFiles:
        return read_preferences(
            path,
            split,
            data.format,
            seed=seed,
            min_confidence=data.min_confidence,
            test_fraction=data.held_out_fraction,
        )

    if data.held_out is not None or data.held_out_split is not None:
        return read(data.path, data.split), read(data.held_out or data.path, data.held_out_split)
    whole = read(data.path, data.split)
    if whole.split or not data.held_out_fraction:
        return whole, None
    parts = read(data.path, "train"), read(data.path, "test")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # rows that cannot be read are told when they are encoded
        if any(next(iter(part), None) is None for part in parts):
            return whole, None
    return parts


def buckets_of(drm: DiffusionRewardModel, data: DataConfig) -> Buckets:
    """The sizes to which images are scaled.

    Raises:
        UsageError: for a side that the pipeline's autoencoder and patches do not divide.
    """
    side = data.side or drm.image_size
    step = data.step or (side if data.max_ratio == 1 else max(1, side // 8))
    buckets = Buckets(side, step, data.max_ratio)
    try:
        for size in buckets.sizes:
            drm.inputs(_latents_of(drm, size), 0.0, ["a"], _grid(drm, size))
    except (RuntimeError, ValueError) as error:
        raise UsageError(
            f"images of {size[0]} x {size[1]} pixels do not suit {type(drm.pipe).__name__}; set data.side and data.step to "
            f"multiples of what its autoencoder and patches need ({str(error).splitlines()[0]})"
        ) from error
    return buckets


@torch.no_grad()
def _latents_of(drm: DiffusionRewardModel, size: tuple[int, int]) -> Tensor:
    """Latents [1, ...] of a grey image of a width and height."""
    return encode_images(drm.pipe, torch.full((1, 3, size[1], size[0]), 0.5))


def _grid(drm: DiffusionRewardModel, size: tuple[int, int]) -> Grid:
    latents = _latents_of(drm, size)
    if latents.ndim > 3:
        return drm.grid(latents)
    patch = _PIXELS_PER_TOKEN * drm.pipe.vae_scale_factor
    return size[1] // patch, size[0] // patch


def _embeddings(drm: DiffusionRewardModel, size: tuple[int, int], grid: Grid) -> PromptEmbeddings | None:
    found = PromptEmbeddings(drm, _latents_of(drm, size), grid)
    return found if found.usable else None


def _name(drm: DiffusionRewardModel, embeddings: PromptEmbeddings | None) -> str:
    """The name of what encodes: hashes of the weights that take part."""
    pipe = drm.pipe
    parts = [type(pipe).__name__, fingerprint(pipe.vae), str(pipe.vae.dtype)]
    if embeddings is not None:
        encoders = {
            n: p for n, p in pipe.components.items() if n.startswith("text_encoder") and isinstance(p, nn.Module)
        }
        parts += [f"{name} {fingerprint(part)} {part.dtype}" for name, part in sorted(encoders.items())]
        parts += embeddings.names
    return " ".join(parts)


def _to_cpu(pipe: Any) -> None:
    """Take what has done its work off the accelerator."""
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and (name.startswith("text_encoder") or name == "vae"):
            part.to("cpu")

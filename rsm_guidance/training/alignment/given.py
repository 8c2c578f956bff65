"""Images that are given: groups with rewards to learn from in place of samples, and captioned images as an anchor."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import ImageOps
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.random import derive_seed, generator_of
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.data.preferences import ImageSource, read_preferences
from rsm_guidance.data.preferences.problems import BadRow
from rsm_guidance.engine import encode_images
from rsm_guidance.engine.replay import Replay
from rsm_guidance.io.files import read_prompt_rows
from rsm_guidance.training.alignment.collector import Share, prompts_of
from rsm_guidance.training.alignment.conditions import Conditions
from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.experience import Experience
from rsm_guidance.training.alignment.rows import Rows, noised

_AT_ONCE = 8  # images that are encoded together


@dataclass(frozen=True)
class Group:
    """Images of a prompt and what they are worth."""

    prompt: str
    images: tuple[ImageSource, ...]
    rewards: tuple[float, ...]


def read_groups(path: Path, size: int) -> list[Group]:
    """Groups of `size` images with rewards.

    Args:
        path: JSON lines with "prompt", "images" (paths, from the file's folder) and "rewards"; or, for groups of 2, any format of
            `data.preferences`, where an image is worth the probability that it is preferred.
        size: of a group.

    Raises:
        UsageError: for files that cannot be read, and groups of another size.
    """
    rows = read_prompt_rows(path) if path.suffix == ".jsonl" else []
    if not (rows and "images" in rows[0]):
        if size != 2:
            raise UsageError(
                f"groups of {size} images come from JSON lines with 'prompt', 'images' and 'rewards'; {path} has none, and pairs "
                "are groups of 2 (rollout.group)"
            )
        return [
            Group(p.prompt, (p.first, p.second), (p.probability, 1 - p.probability)) for p in read_preferences(path)
        ]
    return [_group(row, path, number, size) for number, row in enumerate(rows, 1)]


def _group(row: dict[str, Any], path: Path, line: int, size: int) -> Group:
    images, rewards = row.get("images"), row.get("rewards")
    if not isinstance(images, list) or not isinstance(rewards, list) or not len(images) == len(rewards) == size:
        raise UsageError(
            f"{path}, line {line}: a group has {size} 'images' (rollout.group) and as many 'rewards'; got "
            f"{json.dumps(images)[:80]} and {json.dumps(rewards)[:80]}"
        )
    if not all(isinstance(r, int | float) and abs(r) < float("inf") for r in rewards):
        raise UsageError(f"{path}, line {line}: rewards must be finite numbers; got {rewards}")
    return Group(row["prompt"], tuple(ImageSource(path.parent / str(i)) for i in images), tuple(map(float, rewards)))


def read_captioned(path: Path) -> list[Group]:
    """Captioned images of JSON lines with "prompt" and "image" (a path, from the file's folder).

    Raises:
        UsageError: for files that cannot be read.
    """
    rows = read_prompt_rows(path)
    lacking = next((n for n, row in enumerate(rows, 1) if not isinstance(row.get("image"), str)), None)
    if lacking is not None:
        raise UsageError(f"{path}, line {lacking}: an image of the anchor needs 'prompt' and 'image'")
    return [Group(row["prompt"], (ImageSource(path.parent / row["image"]),), (0.0,)) for row in rows]


@dataclass
class Latents:
    """Images as latents of the pipeline's own size, each encoded once.

    Attributes:
        conditions: of the pipeline's call.
    """

    conditions: Conditions
    _known: dict[str, Tensor] = field(default_factory=dict, init=False)
    _size: tuple[int, int] | None = field(default=None, init=False)

    def __call__(self, images: Sequence[ImageSource]) -> Tensor:
        """Latents [R, ...].

        Raises:
            UsageError: for an image that cannot be read.
        """
        missing = [image for image in images if image.identity() not in self._known]
        for start in range(0, len(missing), _AT_ONCE):
            chunk = missing[start : start + _AT_ONCE]
            pixels = torch.stack([self._pixels(image) for image in chunk])
            for image, latent in zip(chunk, encode_images(self.conditions.stock.pipe, pixels), strict=True):
                self._known[image.identity()] = latent
        return torch.stack([self._known[image.identity()] for image in images])

    def _pixels(self, image: ImageSource) -> Tensor:
        if self._size is None:
            stock = self.conditions.stock
            with torch.no_grad():
                height, width = stock.decode(stock.initial()).shape[-2:]
            self._size = width, height
        try:
            fitted = ImageOps.fit(image.load(), self._size)
        except BadRow as error:
            raise UsageError(f"cannot read the image {image.path}: {error}") from error
        data = torch.frombuffer(bytearray(fitted.tobytes()), dtype=torch.uint8)
        return data.view(self._size[1], self._size[0], 3).permute(2, 0, 1).float() / 255


@dataclass(frozen=True)
class GivenGroups:
    """Groups in place of rollouts; called as `collector.Collector` is.

    Attributes:
        config: of the training.
        groups: all of them.
        latents: of images.
        share: of this process.
    """

    config: AlignConfig
    groups: Sequence[Group]
    latents: Latents
    share: Share = Share()

    def __call__(self, epoch: int) -> tuple[Experience, Replay]:
        """The groups of an epoch as samples, and the recording of their prompts."""
        numbers = prompts_of(len(self.groups), self.config.prompts_per_epoch, self.config.seed, epoch)
        mine = self.share.of(numbers)
        chosen, size = [self.groups[n] for n in numbers[mine]], self.config.rollout.group
        replay = self.latents.conditions.replay([g.prompt for g in chosen])
        x0 = self.latents([image for g in chosen for image in g.images])
        rows = torch.arange(len(chosen)).repeat_interleave(size)
        rewards = torch.tensor([r for g in chosen for r in g.rewards], dtype=torch.float64)[:, None]
        nothing = torch.zeros(len(rows), 0)
        levels, seeds = torch.zeros(len(rows), 1).long(), torch.arange(size).repeat(len(chosen))
        return Experience(
            {"x0": x0, "row": rows}, rewards[:, None], rows + mine.start, seeds, levels, rewards, nothing, nothing
        ), replay


@dataclass(frozen=True)
class DataAnchor:
    """Captioned images whose flow-matching loss is added to that of the samples (DDRL).

    Attributes:
        config: of the training.
        images: all of them.
        latents: of images.
        schedule: the levels.
        share: of this process.
    """

    config: AlignConfig
    images: Sequence[Group]
    latents: Latents
    schedule: NoiseSchedule
    share: Share = Share()

    def __call__(self, step: int, count: int) -> tuple[Rows, Replay]:
        """As many rows as an update has, of images drawn for it, and the recording of their captions."""
        seed = derive_seed(self.config.seed, "anchor", step, self.share.number)
        draw = generator_of(seed, "images")
        few = min(max(count, 1), self.config.prompts_per_epoch)
        chosen = [self.images[i] for i in torch.randint(len(self.images), (few,), generator=draw).tolist()]
        x0 = self.latents([g.images[0] for g in chosen])
        place = torch.arange(count) % few
        rows = {"x0": x0[place], "row": place, "sample": torch.arange(count)}
        levels = torch.randint(self.schedule.steps, (count,), generator=draw)
        return noised(rows, levels, self.schedule, seed), self.latents.conditions.replay([g.prompt for g in chosen])

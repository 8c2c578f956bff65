"""Colour histograms: the intersection of those of the image and of a reference (Swain and Ballard, 1991), per channel.

A value between two bins counts for both, by its distance to each, so that the histogram has a gradient.
"""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.io.files import read_image
from rsm_guidance.rewards.builtin import BuiltInReward


@dataclass(frozen=True)
class ColorHistogram(BuiltInReward):
    """Scores in [0, 1]; 1 where both have the same histograms.

    Attributes:
        image: file of the reference; None for the images of a column `reference` (paths).
        bins: of a channel.
    """

    image: Path | None = None
    bins: int = 16

    name = "color-histogram"
    about = "how alike the colours are to those of a reference image"
    needs = "a reference: image=PATH, or a column of paths"
    range = (0.0, 1.0)
    differentiable = True

    def __post_init__(self) -> None:
        if not 2 <= self.bins <= 256:
            raise UsageError(f"color-histogram: bins must be 2 to 256; got {self.bins}")

    @property
    def requires(self) -> tuple[str, ...]:
        return ("reference",) if self.image is None else ()

    def load(self) -> "ColorHistogram":
        if self.image is not None:
            self.reference(self.image)
        return self

    def check(self, prompts: list[str], columns: dict[str, list[Any]]) -> None:
        for path in columns.get("reference", ()):
            if not isinstance(path, str | Path) or not Path(path).is_file():
                raise UsageError(f"color-histogram: the column 'reference' must hold image files; {path!r} is none")

    def scores(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        paths = columns.get("reference", [self.image] * len(images))
        wanted = torch.stack([self.reference(Path(path)) for path in paths]).to(images.device)
        return torch.minimum(histogram(images, self.bins), wanted).sum(-1).mean(-1)

    def reference(self, path: Path) -> Tensor:
        """Histograms [3, bins] of a file."""
        return _of_file(path, self.bins)


@functools.lru_cache(maxsize=256)
def _of_file(path: Path, bins: int) -> Tensor:
    return histogram(read_image(path), bins)[0]


def histogram(images: Tensor, bins: int) -> Tensor:
    """Shares [B, 3, bins] of the values of images [B, 3, H, W] in [0, 1] at `bins` evenly spaced ones."""
    places = images.flatten(2) * (bins - 1)
    shares = [(1 - (places - k).abs()).clamp(min=0).mean(-1) for k in range(bins)]  # [B, 3] each: little memory
    return torch.stack(shares, -1)

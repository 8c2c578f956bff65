"""JPEG compressibility (DDPO, arXiv 2305.13301): minus the size of the image as a JPEG file."""

import io
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.rewards.builtin import BuiltInReward
from rsm_guidance.rewards.images import to_uint8


@dataclass(frozen=True)
class Compressibility(BuiltInReward):
    """Minus kilobytes (1000 bytes); "-1 * compressibility" is the incompressibility of the paper.

    Attributes:
        quality: of the JPEG file, 1 to 95.
    """

    quality: int = 95

    name = "compressibility"
    about = "minus the kilobytes of the image as a JPEG file"
    range = (-inf, 0.0)

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 95:
            raise UsageError(f"compressibility: quality must be 1 to 95; got {self.quality}")

    def scores(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        return torch.tensor([-self.kilobytes(image) for image in to_uint8(images).numpy()])

    def kilobytes(self, image: Any) -> float:
        """Size of uint8 [H, W, 3] as a file."""
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=self.quality)
        return file.tell() / 1000

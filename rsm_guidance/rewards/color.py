"""A colour: minus the mean squared distance of all pixels to it.  Smooth and free, so that samplers can be tried with it."""

from dataclasses import dataclass
from typing import Any

import torch
from PIL import ImageColor
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.rewards.builtin import BuiltInReward


@dataclass(frozen=True)
class Color(BuiltInReward):
    """Scores in [-1, 0]; 0 for an image of that colour alone.

    Attributes:
        color: a name or hexadecimal value, as Pillow has it, such as red or "#ff0000".
    """

    color: str = "red"

    name = "color"
    about = "how close all pixels are to one colour"
    range = (-1.0, 0.0)
    differentiable = True

    def __post_init__(self) -> None:
        try:
            ImageColor.getrgb(self.color)
        except ValueError as error:
            raise UsageError(f'color: {self.color!r} is no colour; use a name or "#rrggbb"') from error

    def scores(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        wanted = torch.tensor(ImageColor.getrgb(self.color)[:3], device=images.device) / 255
        return -(images - wanted.view(3, 1, 1)).square().mean((1, 2, 3))

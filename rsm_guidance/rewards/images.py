"""Image preparation of published reward models in differentiable torch, equal to what their own processors do.

Pillow resizes 8-bit images in two passes, along rows and then along columns, with weights of 22 bits, and rounds after each
to 8 bits.  So does `shortest_side`, exactly; gradients pass the rounding unchanged.  The weights are of Keys's cubic kernel
with a = -1/2, widened when an image shrinks.
"""

import functools

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
_UNIT = 1 << 22  # Pillow's weights are whole numbers of this part


def eight_bit(images: Tensor) -> Tensor:
    """Values clamped to [0, 1] and rounded to the 256 of an image file; gradients pass the rounding."""
    clamped = images.clamp(0, 1)
    return clamped + ((clamped * 255).round() / 255 - clamped).detach()


def shortest_side(images: Tensor, side: int, rounded_crop: bool = False) -> Tensor:
    """Resize the shortest side as Pillow does, and crop the centre: [B, 3, side, side].

    Args:
        images: [B, 3, H, W] in [0, 1].
        side: in pixels.
        rounded_crop: where the margin is odd, round half of it to even, as torchvision does, and not down.
    """
    height, width = images.shape[-2:]
    short = min(height, width)
    new_height, new_width = int(side * height / short), int(side * width / short)
    exact = (
        torch.float32 if images.device.type == "mps" else torch.float64
    )  # which mps lacks: a level off, now and then
    levels = 255 * eight_bit(images).to(exact)
    levels = _stretched(levels, new_width)
    levels = _stretched(levels.mT, new_height).mT
    margins = (new_height - side, new_width - side)
    top, left = (round(m / 2) if rounded_crop else m // 2 for m in margins)
    return (levels / 255).to(images.dtype)[..., top : top + side, left : left + side]


def _stretched(levels: Tensor, size: int) -> Tensor:
    """Levels 0 to 255 [..., L] resized along their last axis to [..., size], rounded and clamped."""
    if levels.shape[-1] == size:
        return levels
    weights = torch.from_numpy(_weights(levels.shape[-1], size)).to(levels)
    new = (levels + (levels.round() - levels).detach()) @ weights.T / _UNIT
    clamped = new.clamp(0, 255)
    return clamped + ((new + 0.5).floor().clamp(0, 255) - clamped).detach()


@functools.lru_cache(maxsize=64)
def _weights(length: int, size: int) -> np.ndarray:
    """Pillow's weights [size, length] of bicubic resampling, in units of 2**-22."""
    scale = length / size
    reach = max(scale, 1.0)
    centre = (np.arange(size)[:, None] + 0.5) * scale
    place = np.arange(length)[None]
    low = np.maximum((centre - 2 * reach + 0.5).astype(int), 0)
    high = np.minimum((centre + 2 * reach + 0.5).astype(int), length)
    distance = np.abs((place - centre + 0.5) / reach)
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    kernel = np.where(distance < 1, near, np.where(distance < 2, far, 0.0)) * ((place >= low) & (place < high))
    share = kernel / kernel.sum(1, keepdims=True) * _UNIT
    return np.trunc(share + np.copysign(0.5, share))


def longest_side(images: Tensor, side: int) -> Tensor:
    """Resize the longest side of 8-bit images and pad with zeros around: [B, 3, side, side].

    Resizing is of float tensors, bicubic with antialiasing, so nothing is rounded or clamped after it.
    """
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    new_height, new_width = round(height * scale), round(width * scale)
    images = eight_bit(images)
    if (height, width) != (new_height, new_width):
        images = interpolate(images, (new_height, new_width), mode="bicubic", antialias=True, align_corners=False)
    down, across = side - new_height, side - new_width
    return pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))


def standardized(images: Tensor, mean: tuple[float, ...] = OPENAI_MEAN, std: tuple[float, ...] = OPENAI_STD) -> Tensor:
    """(images - mean) / std, by channel."""
    shift, scale = (torch.tensor(v, device=images.device, dtype=images.dtype).view(3, 1, 1) for v in (mean, std))
    return (images - shift) / scale


def to_uint8(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] to uint8 [B, H, W, 3] on the CPU, rounded as image files are."""
    return (images.detach().cpu().float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)

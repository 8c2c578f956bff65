"""Image preparation of published reward models in differentiable torch, equal to what their own processors do.

Pillow resizes 8-bit images in two passes, along rows and then along columns, each rounded to 8 bits.  So do
`shortest_side`; gradients pass the rounding unchanged.  Antialiased bicubic interpolation of torch has Pillow's kernel.
"""

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)


def eight_bit(images: Tensor) -> Tensor:
    """Values clamped to [0, 1] and rounded to the 256 of an image file; gradients pass the rounding."""
    clamped = images.clamp(0, 1)
    return clamped + ((clamped * 255).round() / 255 - clamped).detach()


def resized(images: Tensor, height: int, width: int) -> Tensor:
    """Images [B, 3, H, W] by antialiased bicubic interpolation, overshoot kept."""
    if images.shape[-2:] == (height, width):
        return images
    return interpolate(images, (height, width), mode="bicubic", antialias=True, align_corners=False)


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
    images = eight_bit(resized(eight_bit(images), height, new_width))
    images = eight_bit(resized(images, new_height, new_width))
    margins = (new_height - side, new_width - side)
    top, left = (round(m / 2) if rounded_crop else m // 2 for m in margins)
    return images[..., top : top + side, left : left + side]


def longest_side(images: Tensor, side: int) -> Tensor:
    """Resize the longest side of 8-bit images and pad with zeros around: [B, 3, side, side].

    Resizing is of float tensors, so nothing is rounded or clamped after it.
    """
    height, width = images.shape[-2:]
    scale = side / max(height, width)
    new_height, new_width = round(height * scale), round(width * scale)
    images = resized(eight_bit(images), new_height, new_width)
    down, across = side - new_height, side - new_width
    return pad(images, (across // 2, across - across // 2, down // 2, down - down // 2))


def standardized(
    images: Tensor, mean: tuple[float, ...] = OPENAI_MEAN, std: tuple[float, ...] = OPENAI_STD
) -> Tensor:
    """(images - mean) / std, by channel."""
    shift, scale = (torch.tensor(v, device=images.device, dtype=images.dtype).view(3, 1, 1) for v in (mean, std))
    return (images - shift) / scale


def to_uint8(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] to uint8 [B, H, W, 3] on the CPU, rounded as image files are."""
    return (images.detach().cpu().float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)

"""The verifier of the shapes world as a reward, graded or strict; not differentiable."""

import torch
from torch import Tensor

from rsm_guidance.shapes.verify import verify


def to_uint8(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] to uint8 [B, H, W, 3], rounded as diffusers does."""
    return (images.detach().cpu().float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


def shapes_verifier(images: Tensor, prompts: list[str]) -> Tensor:
    """Graded agreement of each image with its caption.

    Raises:
        ValueError: if a caption is not of the shapes grammar.
    """
    pairs = zip(to_uint8(images).numpy(), prompts, strict=True)
    return torch.tensor([verify(image, prompt).score for image, prompt in pairs], dtype=torch.float64)


def shapes_correct(images: Tensor, prompts: list[str]) -> Tensor:
    """1 where an image shows exactly what its caption says, else 0; errors as in `shapes_verifier`."""
    pairs = zip(to_uint8(images).numpy(), prompts, strict=True)
    return torch.tensor([float(verify(image, prompt).correct) for image, prompt in pairs], dtype=torch.float64)

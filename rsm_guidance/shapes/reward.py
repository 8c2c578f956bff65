"""The verifier of the shapes world as a reward, graded or strict; not differentiable."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.shapes.render import IMAGE_SIZE
from rsm_guidance.shapes.verify import verify


def to_uint8(images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] to uint8 [B, H, W, 3], rounded as diffusers does."""
    return (images.detach().cpu().float() * 255).round().clamp(0, 255).byte().permute(0, 2, 3, 1)


@dataclass(frozen=True)
class VerifierReward:
    """The verifier as a `Reward`: graded agreement of each image with its caption, or, `strict`, 1 where all of it is right.

    Raises:
        UsageError: if a caption is not of the shapes grammar.
    """

    name: str
    strict: bool
    differentiable: bool | None = False
    requires: tuple[str, ...] = ()
    share: float = 0.0
    image_size: int = IMAGE_SIZE
    reads_prompt: bool = True

    def __call__(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        found = [verify(image, p) for image, p in zip(to_uint8(images).numpy(), prompts, strict=True)]
        return torch.tensor([float(v.correct) if self.strict else v.score for v in found], dtype=torch.float64)


shapes_verifier = VerifierReward("shapes_verifier", strict=False)
shapes_correct = VerifierReward("shapes_correct", strict=True)

"""CLIP score (arXiv 2104.08718): the cosine of the embeddings of image and prompt, unscaled and unclipped.

It depends on the backbone; the default is OpenAI's ViT-L/14.
"""

from dataclasses import dataclass

from torch import Tensor

from rsm_guidance.rewards.clip import ClipReward


@dataclass(frozen=True)
class ClipScore(ClipReward):
    """Cosine in [-1, 1] under any `CLIPModel`; prompts over its token limit are cut."""

    name = "clip-score"
    about = "cosine of CLIP's embeddings of image and prompt"
    needs = "a download of openai/clip-vit-large-patch14, or any folder of a CLIPModel"
    range = (-1.0, 1.0)

    def batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.similarity(images, prompts)

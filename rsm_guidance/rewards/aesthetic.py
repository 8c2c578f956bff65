"""The LAION aesthetic predictor v2: linear layers on the unit image embedding of CLIP ViT-L/14.  It reads no prompt."""

import functools
from dataclasses import dataclass
from math import inf
from typing import Any

from torch import Tensor, nn

from rsm_guidance.rewards.builtin import ModelReward
from rsm_guidance.rewards.checkpoints import checkpoint_file, pretrained_strictly, read_tensors
from rsm_guidance.rewards.clip import CLIP_L, embedded_images, image_side
from rsm_guidance.rewards.images import shortest_side, standardized
from rsm_guidance.rewards.linear_head import linear_head

_FILES = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth", "aesthetic-model.safetensors")


@dataclass(frozen=True)
class Aesthetic(ModelReward):
    """Scores of about 1 to 10, as people rated pictures; the reward that is over-optimised most easily.

    Attributes:
        model: file, folder or hub id of the head ("sac+logos+ava1-l14-linearMSE.pth", under that name or as its mirror has it).
        clip: folder or hub id of the CLIP model.
    """

    model: str = "trl-lib/ddpo-aesthetic-predictor"
    clip: str = CLIP_L

    name = "aesthetic"
    about = "how people rate pictures without a prompt (LAION aesthetic predictor v2)"
    needs = "downloads of its head and of openai/clip-vit-large-patch14"
    range = (-inf, inf)
    differentiable = True

    @functools.cached_property
    def network(self) -> nn.Module:
        from transformers import CLIPModel

        path = checkpoint_file(self.model, _FILES)
        head = linear_head(read_tensors(path), path)
        clip: Any = pretrained_strictly(CLIPModel.from_pretrained, self.clip, self.precision)
        return nn.ModuleDict({"clip": clip, "head": head.to(self.precision)}).eval().requires_grad_(False)

    def batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        network: Any = self.network
        pixels = standardized(shortest_side(images, image_side(network["clip"])))
        scores: Tensor = network["head"](embedded_images(network["clip"], pixels).to(self.precision))
        return scores

"""HPS v2 and v2.1 (arXiv 2306.09341): a CLIP ViT-H-14 tuned on the rankings of HPD v2; the cosine.

The checkpoint is in open_clip's layout.  Images are resized by their longest side, as float tensors with antialiasing (which
torchvision does by default since 0.17), and padded with zeros.
"""

import functools
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from rsm_guidance.rewards.checkpoints import checkpoint_file, read_tensors
from rsm_guidance.rewards.clip import CLIP_H, ClipReward, image_side, open_clip_model, tokenizer_of
from rsm_guidance.rewards.images import longest_side, standardized

_FILES = {"v2.0": "HPS_v2_compressed", "v2.1": "HPS_v2.1_compressed"}


@dataclass(frozen=True)
class HPSv2(ClipReward):
    """Cosine in [-1, 1], in practice .2 to .4 (benchmarks print 100 times that).

    Attributes:
        model: file, folder or hub id of the checkpoint.
        version: which of the two published checkpoints a folder or repository is read for.
    """

    model: str = "xswu/HPSv2"
    version: Literal["v2.0", "v2.1"] = "v2.1"

    name = "hpsv2"
    about = "human preference score v2.1 or v2.0"
    needs = "downloads of xswu/HPSv2 and the tokenizer of its CLIP-H"
    range = (-1.0, 1.0)

    @functools.cached_property
    def words(self) -> Any:
        return tokenizer_of(self.tokenizer or (CLIP_H if self.model == HPSv2.model else None), self.model, CLIP_H)

    @functools.cached_property
    def network(self) -> nn.Module:
        stem = _FILES[self.version]
        path = checkpoint_file(self.model, (f"{stem}.pt", f"{stem}.safetensors", "model.safetensors"))
        return open_clip_model(read_tensors(path), self.words, self.precision, path)

    def prepared(self, images: Tensor) -> Tensor:
        return standardized(longest_side(images, image_side(self.network)))

    def batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        return self.similarity(images, prompts)

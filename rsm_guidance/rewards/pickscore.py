"""PickScore v1 (arXiv 2305.01569): a CLIP-H tuned on the choices of Pick-a-Pic users; exp(logit scale) times the cosine."""

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rsm_guidance.rewards.clip import CLIP_H, ClipReward, tokenizer_of


@dataclass(frozen=True)
class PickScore(ClipReward):
    """Scores of about 16 to 26, as published; differences are log-odds of being chosen."""

    model: str = "yuvalkirstain/PickScore_v1"

    name = "pickscore"
    about = "which image users of Pick-a-Pic would choose"
    needs = "downloads of yuvalkirstain/PickScore_v1 and the tokenizer of its CLIP-H"
    range = (-100.0, 100.0)

    @functools.cached_property
    def words(self) -> Any:
        return tokenizer_of(self.tokenizer or (CLIP_H if self.model == PickScore.model else None), self.model, CLIP_H)

    def batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        scale: Any = self.network.logit_scale
        return scale.float().exp() * self.similarity(images, prompts)

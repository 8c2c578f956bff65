"""Reward heads: features of a backbone to outputs, one design per file."""

from typing import Protocol

from torch import Tensor, nn

from rsm_guidance.reward_models.heads.conv import ConvHead
from rsm_guidance.reward_models.heads.paper import PaperHead
from rsm_guidance.reward_models.heads.pool import PoolHead
from rsm_guidance.reward_models.heads.query import QueryHead


class Head(Protocol):
    """Features [B, rows * columns, dim], and their rows and columns, to outputs [B, N].

    Attributes:
        reads_prediction: whether the features are what the denoiser predicts, and not tokens of its blocks.
    """

    reads_prediction: bool

    def __call__(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor: ...


HEADS: dict[str, type[nn.Module]] = {"conv": ConvHead, "drm": PaperHead, "query": QueryHead, "pool": PoolHead}

__all__ = ["HEADS", "ConvHead", "Head", "PaperHead", "PoolHead", "QueryHead"]

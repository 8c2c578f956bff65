"""Reward heads: what reads a denoiser's features, one head a file."""

from rsm_guidance.reward_models.heads.base import Features, Head, Widths
from rsm_guidance.reward_models.heads.conv import ConvHead
from rsm_guidance.reward_models.heads.drm import DRMHead
from rsm_guidance.reward_models.heads.pool import PoolHead
from rsm_guidance.reward_models.heads.query import QueryHead

HEADS: dict[str, type[Head]] = {"conv": ConvHead, "drm": DRMHead, "query": QueryHead, "pool": PoolHead}

__all__ = ["HEADS", "ConvHead", "DRMHead", "Features", "Head", "PoolHead", "QueryHead", "Widths"]

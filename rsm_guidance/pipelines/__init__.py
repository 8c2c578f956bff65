"""Reward-guided diffusers pipeline classes, and where the shims for `custom_pipeline=` lie.

`RewardGuided<Name>` exists here for every pipeline class `<Name>` that diffusers exports.
"""

from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

from rsm_guidance.pipelines.auto import RewardGuidedPipeline
from rsm_guidance.pipelines.guided import GuidedPipelineOutput, reward_guided

RewardGuidedStableDiffusion3Pipeline = reward_guided(StableDiffusion3Pipeline)

_PREFIX = "RewardGuided"
_SHIMS = (Path(__file__).parent / "shims", Path(__file__).parents[2] / "pipelines")  # in a wheel; in a checkout


def __getattr__(name: str) -> Any:
    base = getattr(diffusers, name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
    if not (isinstance(base, type) and issubclass(base, DiffusionPipeline)):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return reward_guided(base)


def custom_pipeline(family: str) -> str:
    """Path of a family's shim, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=..., trust_remote_code=True)`.

    Raises:
        ValueError: for a family without a shim, naming those there are.
    """
    for folder in _SHIMS:
        if (folder / family / "pipeline.py").is_file():
            return str(folder / family)
    known = sorted({p.parent.name for folder in _SHIMS for p in folder.glob("*/pipeline.py")})
    raise ValueError(f"there is no custom pipeline {family!r}; choose one of {', '.join(known)}")


__all__ = [
    "GuidedPipelineOutput",
    "RewardGuidedPipeline",
    "RewardGuidedStableDiffusion3Pipeline",
    "custom_pipeline",
    "reward_guided",
]

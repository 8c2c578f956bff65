"""Reward-guided diffusers pipeline classes, and where the shims for `custom_pipeline=` lie.

`RewardGuided<Name>` exists here for every pipeline class `<Name>` that diffusers exports.  diffusers is loaded when the first
class is used.
"""

import importlib
from pathlib import Path
from typing import Any

from rsm_guidance.core.errors import UsageError

_MODULES = {"RewardGuidedPipeline": "auto", "GuidedPipelineOutput": "guided", "reward_guided": "guided"}
_PREFIX = "RewardGuided"
_SHIMS = (Path(__file__).parent / "shims", Path(__file__).parents[2] / "pipelines")  # in a wheel; in a checkout


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    base = _exported(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"{__name__}.guided").reward_guided(base)


def _exported(name: str) -> Any:
    """The pipeline class that diffusers exports under a name, or None."""
    import diffusers

    found = getattr(diffusers, name, None)
    return found if isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline) else None


def custom_pipeline(family: str) -> str:
    """Path of a family's shim, for `DiffusionPipeline.from_pretrained(..., custom_pipeline=..., trust_remote_code=True)`.

    Raises:
        UsageError: for a family without a shim, naming those there are.
    """
    for folder in _SHIMS:
        if (folder / family / "pipeline.py").is_file():
            return str(folder / family)
    known = sorted({p.parent.name for folder in _SHIMS for p in folder.glob("*/pipeline.py")})
    raise UsageError(f"there is no custom pipeline {family!r}; choose one of {', '.join(known)}")


__all__ = [  # noqa: F822 - most are loaded by `__getattr__`
    "GuidedPipelineOutput",
    "RewardGuidedPipeline",
    "RewardGuidedStableDiffusion3Pipeline",
    "custom_pipeline",
    "reward_guided",
]

"""rsm-guidance: reward guidance for diffusion and flow pipelines, with the diffusion model itself as the reward model.

Public names are loaded when they are first used (PEP 562), so that importing the package costs nothing; `__init__.pyi` tells
type checkers what they are.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "rsm_guidance.core.ledger": ("Budget", "Ledger"),
    "rsm_guidance.core.transitions": ("CPS", "DDIM", "GLASS", "ODE", "FlowSDE", "SchedulerSteps", "Transition"),
    "rsm_guidance.pipelines": (
        "GuidedPipelineOutput",
        "RewardGuidedPipeline",
        "RewardGuidedStableDiffusion3Pipeline",
        "custom_pipeline",
        "reward_guided",
    ),
    "rsm_guidance.reward_models": ("DiffusionRewardModel",),
    "rsm_guidance.rewards": ("Composite", "Term", "resolve_reward"),
    "rsm_guidance.samplers": (
        "SAMPLERS",
        "SVDD",
        "Backtracking",
        "BestOfN",
        "Demon",
        "FKSteering",
        "Funnel",
        "Lidar",
        "Monitor",
        "NoiseOptimization",
        "NoiseSearch",
        "PsiSampler",
        "RewardGradient",
        "RollingSelection",
        "StepwiseSampling",
        "TreeSampling",
        "TreeSearch",
        "TwistedSMC",
        "Unguided",
        "make_sampler",
        "parse_sampler",
    ),
    "rsm_guidance.values": ("Lookahead", "Smoothed", "Tweedie"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "shapes":
        return importlib.import_module("rsm_guidance.shapes")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


__all__ = [*_HOME, "shapes"]  # noqa: PLE0604 - the table above is the list

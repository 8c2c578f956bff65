"""Samplers: one search or guidance method per file; `SAMPLERS` names them."""

from dataclasses import fields
from typing import Any

from rsm_guidance.core.transitions import Transition
from rsm_guidance.samplers.base import Interrupted, Problem, Progress, Sampler, SamplerOutput
from rsm_guidance.samplers.best_of_n import BestOfN
from rsm_guidance.samplers.fk_steering import FKSteering
from rsm_guidance.samplers.funnel import Funnel
from rsm_guidance.samplers.lidar import Lidar
from rsm_guidance.samplers.reward_gradient import RewardGradient
from rsm_guidance.samplers.rolling import RollingSelection
from rsm_guidance.samplers.rollout import Unguided
from rsm_guidance.samplers.smc import TwistedSMC
from rsm_guidance.samplers.stepwise import StepwiseSampling
from rsm_guidance.samplers.svdd import SVDD

SAMPLERS: dict[str, type[Sampler]] = {
    cls.name: cls
    for cls in (
        Unguided,
        BestOfN,
        StepwiseSampling,
        SVDD,
        RollingSelection,
        Funnel,
        FKSteering,
        TwistedSMC,
        RewardGradient,
        Lidar,
    )
}


def make_sampler(name: str, **options: Any) -> Sampler:
    """A sampler by name, with options that are fields of its dataclass.

    Raises:
        ValueError: for an unknown name or an option the sampler does not have.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    cls: Any = SAMPLERS[name]
    known = {f.name for f in fields(cls)}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(f"the sampler {name!r} has no option {unknown[0]!r}; it takes {', '.join(sorted(known))}")
    sampler: Sampler = cls(**options)
    return sampler


__all__ = [
    "SAMPLERS",
    "SVDD",
    "BestOfN",
    "FKSteering",
    "Funnel",
    "Interrupted",
    "Lidar",
    "Problem",
    "Progress",
    "RewardGradient",
    "RollingSelection",
    "Sampler",
    "SamplerOutput",
    "StepwiseSampling",
    "Transition",
    "TwistedSMC",
    "Unguided",
    "make_sampler",
]

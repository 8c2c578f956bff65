"""Samplers: one search or guidance method per file; `SAMPLERS` names them."""

from dataclasses import fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from rsm_guidance.core.transitions import Transition
from rsm_guidance.samplers.backtracking import Backtracking
from rsm_guidance.samplers.base import Interrupted, Problem, Progress, Sampler, SamplerOutput
from rsm_guidance.samplers.best_of_n import BestOfN
from rsm_guidance.samplers.demon import Demon
from rsm_guidance.samplers.fk_steering import FKSteering
from rsm_guidance.samplers.funnel import Funnel
from rsm_guidance.samplers.lidar import Lidar
from rsm_guidance.samplers.monitor import Monitor, Watch
from rsm_guidance.samplers.noise_optimization import NoiseOptimization
from rsm_guidance.samplers.noise_search import NoiseSearch
from rsm_guidance.samplers.psi import CrankNicolson, PsiSampler
from rsm_guidance.samplers.reward_gradient import RewardGradient
from rsm_guidance.samplers.rolling import RollingSelection
from rsm_guidance.samplers.rollout import Unguided
from rsm_guidance.samplers.smc import TwistedSMC
from rsm_guidance.samplers.stepwise import StepwiseSampling
from rsm_guidance.samplers.svdd import SVDD
from rsm_guidance.samplers.tree.methods import TreeSampling, TreeSearch

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
        Demon,
        Backtracking,
        NoiseSearch,
        NoiseOptimization,
        PsiSampler,
        TreeSampling,
        TreeSearch,
    )
}


def make_sampler(name: str, **options: Any) -> Sampler:
    """A sampler by name, with options that are fields of its dataclass.

    Raises:
        ValueError: for an unknown name, an option the sampler does not have, or a value of the wrong type.
    """
    if name not in SAMPLERS:
        raise ValueError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    cls: Any = SAMPLERS[name]
    known = {f.name for f in fields(cls)}
    unknown = sorted(options.keys() - known)
    if unknown:
        raise ValueError(f"the sampler {name!r} has no option {unknown[0]!r}; it takes {', '.join(sorted(known))}")
    hints = get_type_hints(cls)
    options = {option: tuple(value) if isinstance(value, list) else value for option, value in options.items()}
    for option, value in options.items():
        if not _fits(value, hints[option]):
            raise ValueError(
                f"the sampler {name!r} cannot take {option}={value!r}: it must be {_described(hints[option])}"
            )
    sampler: Sampler = cls(**options)
    return sampler


def _fits(value: object, hint: Any) -> bool:
    """Whether a value is of an annotated type; whole numbers are numbers, truth values are not."""
    if get_origin(hint) in (Union, UnionType):
        return any(_fits(value, h) for h in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str)  # which, the sampler knows better
    if get_origin(hint) is tuple:
        inside = get_args(hint)
        return isinstance(value, tuple) and len(value) == len(inside) and all(map(_fits, value, inside))
    if hint in (int, float):
        return isinstance(value, int | hint) and not isinstance(value, bool)
    return isinstance(value, hint)


def _described(hint: Any) -> str:
    """A type in words."""
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_described, get_args(hint)))
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(repr, get_args(hint)))
    if get_origin(hint) is tuple:
        return "[" + ", ".join(map(_described, get_args(hint))) + "]"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    return words.get(hint) or f"a {hint.__name__}"


def parse_sampler(text: str, **options: Any) -> Sampler:
    """A sampler from "name:field=value:field=value", such as "stepwise:trajectories=2:transition=cps 0.8".

    Values are YAML; a transition is its kind, and its noise (or, of glass, its inner levels) after a space.
    """
    name, *settings = text.split(":")
    for setting in settings:
        field, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"{setting!r} in {text!r} sets nothing; write field=value")
        try:
            options[field.strip()] = parse_transition(value) if field == "transition" else yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"cannot read {value!r} in {text!r}") from error
    return make_sampler(name.strip(), **options)


def parse_transition(text: str) -> Transition:
    """A transition from its kind and, after a space, its noise (or, of glass, its inner levels)."""
    kind, _, number = text.strip().partition(" ")
    try:
        if not number:
            return Transition(kind)  # type: ignore[arg-type]
        return Transition("glass", inner=int(number)) if kind == "glass" else Transition(kind, float(number))  # type: ignore[arg-type]
    except ValueError as error:
        raise ValueError(f"cannot read the transition {text!r}: {error}") from error


__all__ = [
    "SAMPLERS",
    "SVDD",
    "Backtracking",
    "BestOfN",
    "CrankNicolson",
    "Demon",
    "FKSteering",
    "Funnel",
    "Interrupted",
    "Lidar",
    "Monitor",
    "NoiseOptimization",
    "NoiseSearch",
    "Problem",
    "Progress",
    "PsiSampler",
    "RewardGradient",
    "RollingSelection",
    "Sampler",
    "SamplerOutput",
    "StepwiseSampling",
    "Transition",
    "TreeSampling",
    "TreeSearch",
    "TwistedSMC",
    "Unguided",
    "Watch",
    "make_sampler",
    "parse_sampler",
    "parse_transition",
]

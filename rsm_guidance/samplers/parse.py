"""Samplers by name: `SAMPLERS`, with options from keywords or from text."""

from typing import Any

from rsm_guidance.core.errors import UsageError
from rsm_guidance.io.config import check_options, read_options
from rsm_guidance.samplers.backtracking import Backtracking
from rsm_guidance.samplers.best_of_n import BestOfN
from rsm_guidance.samplers.demon import Demon
from rsm_guidance.samplers.fk_steering import FKSteering
from rsm_guidance.samplers.funnel import Funnel
from rsm_guidance.samplers.kernel import Sampler
from rsm_guidance.samplers.lidar import Lidar
from rsm_guidance.samplers.noise_optimization import NoiseOptimization
from rsm_guidance.samplers.noise_search import NoiseSearch
from rsm_guidance.samplers.psi import PsiSampler
from rsm_guidance.samplers.reward_gradient import RewardGradient
from rsm_guidance.samplers.rolling import RollingSelection
from rsm_guidance.samplers.smc import TwistedSMC
from rsm_guidance.samplers.stepwise import StepwiseSampling
from rsm_guidance.samplers.svdd import SVDD
from rsm_guidance.samplers.tree.methods import TreeSampling, TreeSearch
from rsm_guidance.samplers.unguided import Unguided

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
        UsageError: for an unknown name, an option the sampler does not have, or a value of the wrong type.
    """
    if name not in SAMPLERS:
        raise UsageError(f"unknown sampler {name!r}; choose one of {', '.join(SAMPLERS)}")
    cls: Any = SAMPLERS[name]
    sampler: Sampler = cls(**check_options(cls, options, f"the sampler {name!r}"))
    return sampler


def parse_sampler(text: str, **options: Any) -> Sampler:
    """A sampler from "name:field=value:field=value", such as "stepwise:trajectories=2:transition=cps 0.8".

    Values are YAML, in which a field of a nested configuration is a mapping, "psi:initial={chains: 3}"; a transition is its
    name and number.  A colon inside quotes or brackets ends no field.

    Raises:
        UsageError: as in `make_sampler`, or for text that sets nothing or cannot be read.
    """
    name, given = read_options(text)
    return make_sampler(name, **(options | given))

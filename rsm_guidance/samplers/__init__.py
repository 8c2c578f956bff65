"""Samplers: one search or guidance method a file; `run` drives them all, `SAMPLERS` names them."""

from rsm_guidance.core.transitions import Transition, parse_transition
from rsm_guidance.samplers.backtracking import Backtracking
from rsm_guidance.samplers.best_of_n import BestOfN
from rsm_guidance.samplers.demon import Demon
from rsm_guidance.samplers.fk_steering import FKSteering
from rsm_guidance.samplers.funnel import Funnel
from rsm_guidance.samplers.kernel import Info, Kernel, Particles, Result, Sampler, SamplerOutput, State
from rsm_guidance.samplers.lidar import Lidar
from rsm_guidance.samplers.monitor import Monitor, Watch
from rsm_guidance.samplers.noise_optimization import NoiseOptimization
from rsm_guidance.samplers.noise_search import NoiseSearch
from rsm_guidance.samplers.parse import SAMPLERS, make_sampler, parse_sampler
from rsm_guidance.samplers.psi import CrankNicolson, PsiSampler
from rsm_guidance.samplers.reward_gradient import RewardGradient
from rsm_guidance.samplers.rolling import RollingSelection
from rsm_guidance.samplers.run import run
from rsm_guidance.samplers.smc import TwistedSMC
from rsm_guidance.samplers.stepwise import StepwiseSampling
from rsm_guidance.samplers.svdd import SVDD
from rsm_guidance.samplers.task import Progress, Task
from rsm_guidance.samplers.tree.methods import TreeSampling, TreeSearch
from rsm_guidance.samplers.unguided import Unguided

__all__ = [
    "SAMPLERS",
    "SVDD",
    "Backtracking",
    "BestOfN",
    "CrankNicolson",
    "Demon",
    "FKSteering",
    "Funnel",
    "Info",
    "Kernel",
    "Lidar",
    "Monitor",
    "NoiseOptimization",
    "NoiseSearch",
    "Particles",
    "Progress",
    "PsiSampler",
    "Result",
    "RewardGradient",
    "RollingSelection",
    "Sampler",
    "SamplerOutput",
    "State",
    "StepwiseSampling",
    "Task",
    "Transition",
    "TreeSampling",
    "TreeSearch",
    "TwistedSMC",
    "Unguided",
    "Watch",
    "make_sampler",
    "parse_sampler",
    "parse_transition",
    "run",
]

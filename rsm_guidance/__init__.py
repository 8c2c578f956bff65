"""rsm-guidance: reward guidance for diffusion and flow pipelines, with the diffusion model itself as the judge."""

from rsm_guidance import _quiet  # noqa: F401, I001 - before anything that imports diffusers
from rsm_guidance import shapes
from rsm_guidance.core.ledger import Budget, Ledger
from rsm_guidance.core.transitions import Transition
from rsm_guidance.pipelines import (
    GuidedPipelineOutput,
    RewardGuidedPipeline,
    RewardGuidedStableDiffusion3Pipeline,
    custom_pipeline,
    reward_guided,
)
from rsm_guidance.rewards import Composite, Term
from rsm_guidance.samplers import (
    SAMPLERS,
    SVDD,
    Backtracking,
    BestOfN,
    Demon,
    FKSteering,
    Funnel,
    Lidar,
    Monitor,
    NoiseOptimization,
    NoiseSearch,
    PsiSampler,
    RewardGradient,
    RollingSelection,
    StepwiseSampling,
    TreeSampling,
    TreeSearch,
    TwistedSMC,
    Unguided,
    make_sampler,
    parse_sampler,
)
from rsm_guidance.values import DiffusionRewardModel, Lookahead, Smoothed, Tweedie, load_judge

__version__ = "0.1.0"

__all__ = [
    "SAMPLERS",
    "SVDD",
    "Backtracking",
    "BestOfN",
    "Budget",
    "Composite",
    "Demon",
    "DiffusionRewardModel",
    "FKSteering",
    "Funnel",
    "GuidedPipelineOutput",
    "Ledger",
    "Lidar",
    "Lookahead",
    "Monitor",
    "NoiseOptimization",
    "NoiseSearch",
    "PsiSampler",
    "RewardGradient",
    "RewardGuidedPipeline",
    "RewardGuidedStableDiffusion3Pipeline",
    "RollingSelection",
    "Smoothed",
    "StepwiseSampling",
    "Term",
    "Transition",
    "TreeSampling",
    "TreeSearch",
    "Tweedie",
    "TwistedSMC",
    "Unguided",
    "custom_pipeline",
    "load_judge",
    "make_sampler",
    "parse_sampler",
    "reward_guided",
    "shapes",
]

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
from rsm_guidance.samplers import SAMPLERS, BestOfN, StepwiseSampling, Unguided, make_sampler
from rsm_guidance.values import DiffusionRewardModel, load_judge

__version__ = "0.1.0"

__all__ = [
    "SAMPLERS",
    "BestOfN",
    "Budget",
    "DiffusionRewardModel",
    "GuidedPipelineOutput",
    "Ledger",
    "RewardGuidedPipeline",
    "RewardGuidedStableDiffusion3Pipeline",
    "StepwiseSampling",
    "Transition",
    "Unguided",
    "custom_pipeline",
    "load_judge",
    "make_sampler",
    "reward_guided",
    "shapes",
]

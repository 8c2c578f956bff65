"""The diffusion reward model."""

from rsm_guidance.reward_models.backbone import load_backbone
from rsm_guidance.reward_models.config import Adaptation, DRMConfig
from rsm_guidance.reward_models.hub import load_reward_model
from rsm_guidance.reward_models.model import DiffusionRewardModel, LatentScorer
from rsm_guidance.reward_models.value import DRMValue

__all__ = [
    "Adaptation",
    "DRMConfig",
    "DRMValue",
    "DiffusionRewardModel",
    "LatentScorer",
    "load_backbone",
    "load_reward_model",
]

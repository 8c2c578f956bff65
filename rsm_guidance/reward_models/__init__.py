"""The diffusion reward model."""

from rsm_guidance.reward_models.backbone import load_backbone
from rsm_guidance.reward_models.config import Adaptation, DRMConfig
from rsm_guidance.reward_models.ensemble import NoiseEnsemble
from rsm_guidance.reward_models.heads import HEADS
from rsm_guidance.reward_models.hub import load_reward_model
from rsm_guidance.reward_models.levels import LevelTable, level_table, noised
from rsm_guidance.reward_models.model import DiffusionRewardModel
from rsm_guidance.reward_models.outputs import OUTPUTS, RewardOutput
from rsm_guidance.reward_models.scorer import LatentScorer
from rsm_guidance.reward_models.value import DRMValue

__all__ = [
    "HEADS",
    "OUTPUTS",
    "Adaptation",
    "DRMConfig",
    "DRMValue",
    "DiffusionRewardModel",
    "LatentScorer",
    "LevelTable",
    "NoiseEnsemble",
    "RewardOutput",
    "level_table",
    "load_backbone",
    "load_reward_model",
    "noised",
]

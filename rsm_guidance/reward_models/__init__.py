"""The diffusion reward model."""

from rsm_guidance.reward_models.model import DiffusionRewardModel, DRMConfig, load_backbone

__all__ = ["DRMConfig", "DiffusionRewardModel", "load_backbone"]

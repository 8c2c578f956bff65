"""The diffusion reward model."""

from rsm_guidance.values.drm.model import DiffusionRewardModel, DRMConfig, load_backbone

__all__ = ["DRMConfig", "DiffusionRewardModel", "load_backbone"]

"""What trains reward models on preferences."""

from rsm_guidance.training.reward_model.losses import MIN_PREFERENCE, bradley_terry_loss, pairs_won

__all__ = ["MIN_PREFERENCE", "bradley_terry_loss", "pairs_won"]

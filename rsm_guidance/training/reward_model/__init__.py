"""What trains reward models on preferences."""

from rsm_guidance.reward_models.levels import LevelTable, level_table, noised
from rsm_guidance.training.reward_model.levels import LEVEL_LAWS
from rsm_guidance.training.reward_model.losses import (
    LOSSES,
    MIN_PREFERENCE,
    NEEDS_ORDINAL,
    PairLabel,
    PairLoss,
    bradley_terry_loss,
    informs,
    pairs_won,
    weighted_mean,
)

__all__ = [
    "LEVEL_LAWS",
    "LOSSES",
    "MIN_PREFERENCE",
    "NEEDS_ORDINAL",
    "LevelTable",
    "PairLabel",
    "PairLoss",
    "bradley_terry_loss",
    "informs",
    "level_table",
    "noised",
    "pairs_won",
    "weighted_mean",
]

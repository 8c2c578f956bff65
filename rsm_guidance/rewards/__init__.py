"""Rewards of finished images; `REWARDS` names the built-in ones."""

from rsm_guidance.rewards.base import (
    FunctionReward,
    RewardError,
    RowReward,
    ScoreDistribution,
    as_reward,
    check_rows,
    checked_scores,
    crashed_in_reward,
    name_of,
    scored,
)
from rsm_guidance.rewards.compose import Composite, Term
from rsm_guidance.rewards.registry import REWARDS, built_in, is_sum, parts_of, resolve_reward

__all__ = [
    "REWARDS",
    "Composite",
    "FunctionReward",
    "RewardError",
    "RowReward",
    "ScoreDistribution",
    "Term",
    "as_reward",
    "built_in",
    "check_rows",
    "checked_scores",
    "crashed_in_reward",
    "is_sum",
    "name_of",
    "parts_of",
    "resolve_reward",
    "scored",
]

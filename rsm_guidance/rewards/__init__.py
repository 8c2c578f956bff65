"""Rewards on finished images; `REWARDS` names the built-in ones."""

from rsm_guidance.core.denoiser import Reward
from rsm_guidance.rewards.base import RewardError, checked_scores, import_object, judged, name_of
from rsm_guidance.rewards.compose import Composite, Term
from rsm_guidance.rewards.shapes import shapes_correct, shapes_verifier

REWARDS: dict[str, Reward] = {"shapes-verifier": shapes_verifier, "shapes-correct": shapes_correct}

__all__ = [
    "REWARDS",
    "Composite",
    "RewardError",
    "Term",
    "checked_scores",
    "import_object",
    "judged",
    "name_of",
    "shapes_correct",
    "shapes_verifier",
]

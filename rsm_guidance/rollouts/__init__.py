"""Recorded runs of a denoiser, for samplers and trainers alike."""

from rsm_guidance.rollouts.collect import collect, follow, take, trajectories, walk
from rsm_guidance.rollouts.record import Label, Rollout, Step
from rsm_guidance.rollouts.siblings import Siblings, branches, candidates, completed

__all__ = [
    "Label",
    "Rollout",
    "Siblings",
    "Step",
    "branches",
    "candidates",
    "collect",
    "completed",
    "follow",
    "take",
    "trajectories",
    "walk",
]

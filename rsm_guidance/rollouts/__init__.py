"""Recorded runs of a denoiser, for samplers and trainers alike."""

from rsm_guidance.rollouts.collect import collect, follow, take, trajectories, walk
from rsm_guidance.rollouts.record import Label, Rollout, Step

__all__ = ["Label", "Rollout", "Step", "collect", "follow", "take", "trajectories", "walk"]

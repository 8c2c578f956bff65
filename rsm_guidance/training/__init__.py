"""What trains models: one loop, its data, optimisers and resumable state; nothing here names a world or a model."""

from rsm_guidance.training.data import Batches
from rsm_guidance.training.loop import LoopConfig, fit
from rsm_guidance.training.optim import adamw, cosine, cosine_cycles

__all__ = ["Batches", "LoopConfig", "adamw", "cosine", "cosine_cycles", "fit"]

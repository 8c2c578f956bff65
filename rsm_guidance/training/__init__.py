"""What trains models: one loop, its data, optimisers and resumable state; nothing here names a world or a model.

Names are loaded when they are first used, so that configurations can be read without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rsm_guidance.training.data import Batches
    from rsm_guidance.training.loop import LoopConfig, fit
    from rsm_guidance.training.optim import adamw, cosine, cosine_cycles

_MODULES = {
    "Batches": "rsm_guidance.training.data",
    "LoopConfig": "rsm_guidance.training.loop",
    "adamw": "rsm_guidance.training.optim",
    "cosine": "rsm_guidance.training.optim",
    "cosine_cycles": "rsm_guidance.training.optim",
    "fit": "rsm_guidance.training.loop",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


__all__ = ["Batches", "LoopConfig", "adamw", "cosine", "cosine_cycles", "fit"]

"""`DRMConfig`: what a diffusion reward model is made of."""

import math
from dataclasses import dataclass
from typing import Literal

from rsm_guidance.core.contracts import UsageError

Adaptation = Literal["frozen", "lora", "full"]
SHAPES_BACKBONE = "shapes"


@dataclass(frozen=True)
class DRMConfig:
    """What a DRM is made of; the fields of a checkpoint's config.json.

    Attributes:
        backbone: hub id, folder or packaged name of the pipeline whose denoiser is the backbone.
        blocks: number of the denoiser's blocks kept, from the input.
        taps: names of the blocks whose features the head reads; empty for the last one kept.
        score_mean, score_deviation: of the head's outputs for finished images that it was not trained on.  A score is the
            output less the mean, over the deviation: Bradley-Terry fixes neither.
        adaptation: "frozen" (head only, modules shared with the pipeline), "lora" or "full" (all kept blocks tuned).
        lora_rank: rank (and alpha) of the LoRA.
        head_width: width of the reward head.
    """

    backbone: str = SHAPES_BACKBONE
    blocks: int = 4
    adaptation: Adaptation = "full"
    lora_rank: int = 16
    head_width: int = 64
    taps: tuple[str, ...] = ()
    score_mean: float = 0.0
    score_deviation: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", tuple(self.taps))
        if self.adaptation not in ("frozen", "lora", "full"):
            raise UsageError(f"unknown adaptation {self.adaptation!r}; choose frozen, lora or full")
        if self.lora_rank < 1 or self.head_width < 1:
            raise UsageError(f"lora_rank and head_width must be positive; got {self.lora_rank} and {self.head_width}")
        if not (math.isfinite(self.score_mean) and 0 < self.score_deviation < math.inf):
            raise UsageError(
                "score_mean must be finite and score_deviation positive; got "
                f"{self.score_mean} and {self.score_deviation}"
            )

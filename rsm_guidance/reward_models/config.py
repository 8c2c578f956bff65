"""`DRMConfig`: what a diffusion reward model is made of."""

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", tuple(self.taps))
        if self.adaptation not in ("frozen", "lora", "full"):
            raise UsageError(f"unknown adaptation {self.adaptation!r}; choose frozen, lora or full")
        for name in ("blocks", "lora_rank", "head_width"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1; got {getattr(self, name)}")

"""`DRMConfig`: what a diffusion reward model is made of."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.reward_models.outputs import KINDS, OutputKind

Adaptation = Literal["frozen", "lora", "last-blocks", "full"]
HeadName = Literal["conv", "drm", "query", "pool"]
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
        adaptation: "frozen" (head only, modules shared with the pipeline), "lora", "last-blocks" (the last `tuned_blocks` kept
            ones tuned) or "full" (the whole kept part tuned).
        tuned_blocks: blocks tuned with "last-blocks".
        head: "conv" (ours), "drm" (the paper's), "query" or "pool"; see `reward_models.heads`.
        output: what the head says: "scalar", "gaussian" (mean and variance) or "ordinal" (probabilities of grades).
        grades: number of grades of an ordinal output.
        lora_rank: rank (and alpha) of the LoRA.
        head_width: width of the reward head.
    """

    backbone: str = SHAPES_BACKBONE
    blocks: int = 4
    adaptation: Adaptation = "full"
    lora_rank: int = 16
    head_width: int = 64
    taps: tuple[str, ...] = ()
    head: HeadName = "conv"
    output: OutputKind = "scalar"
    grades: int = 9
    tuned_blocks: int = 1
    score_mean: float = 0.0
    score_deviation: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", tuple(self.taps))
        choices = {"adaptation": get_args(Adaptation), "head": get_args(HeadName), "output": KINDS}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UsageError(f"unknown {name} {getattr(self, name)!r}; choose {', '.join(known)}")
        for name, least in (("blocks", 1), ("lora_rank", 1), ("head_width", 1), ("grades", 2), ("tuned_blocks", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} must be at least {least}; got {getattr(self, name)}")
        if self.head == "drm" and self.taps:
            raise UsageError("the head 'drm' reads what the cut backbone predicts, and no taps; leave them out")
        if not (math.isfinite(self.score_mean) and 0 < self.score_deviation < math.inf):
            raise UsageError(
                "score_mean must be finite and score_deviation positive; got "
                f"{self.score_mean} and {self.score_deviation}"
            )

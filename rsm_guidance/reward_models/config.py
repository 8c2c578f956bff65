"""`DRMConfig`: what a diffusion reward model is made of."""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from rsm_guidance.core.contracts import UsageError

Adaptation = Literal["frozen", "lora", "last-blocks", "full"]
HeadName = Literal["conv", "drm", "query", "pool"]
OutputName = Literal["scalar", "gaussian", "ordinal"]

SHAPES_BACKBONE = "shapes"
LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


@dataclass(frozen=True)
class DRMConfig:
    """What a DRM is made of; the fields of a checkpoint's config.json.

    Attributes:
        backbone: hub id, folder or packaged name of the pipeline whose denoiser is the backbone.
        blocks: number of the denoiser's blocks kept, from the input.
        adaptation: "frozen" (head only, modules shared with the pipeline), "lora", "last-blocks" (the last `tuned_blocks`
            of those kept, and the output layers if the head reads them) or "full" (all kept blocks tuned).
        lora_rank: rank of the LoRA.
        head_width: width of the reward head.
        taps: names of the blocks whose features the head reads; empty for the last one kept.
        head: name in `heads.HEADS`.
        output: name in `outputs.OUTPUTS`.
        ratings: values of the classes of an ordinal output, rising.
        text_taps: names of the blocks whose text tokens the head "query" reads besides.
        queries, attention_heads, norm_eps: learned queries, attention heads and RMSNorm epsilon of the head "query".
        dropout: of the heads "drm" and "query".
        tuned_blocks: of the adaptation "last-blocks".
        lora_alpha: the LoRA is scaled by lora_alpha / lora_rank; 0 for lora_rank.
        lora_targets: names, or ends of names, of the layers that have a LoRA.
        image_levels: noise levels sigma in [0, 1] at which images, and latents that are clean, are scored; the mean over
            them is the score.  Empty for the clean latents.
        image_draws: noises per level.
        score_mean, score_std: scores are (raw - score_mean) / score_std.
        max_sequence_length: tokens of a prompt, where the pipeline asks; 0 for its default.
        half_precision: weights are saved in half precision, rounded; otherwise exactly.
        denoiser: class of the denoiser, checked when a checkpoint is loaded; empty for any.
    """

    backbone: str = SHAPES_BACKBONE
    blocks: int = 4
    adaptation: Adaptation = "full"
    lora_rank: int = 16
    head_width: int = 64
    taps: tuple[str, ...] = ()
    head: HeadName = "conv"
    output: OutputName = "scalar"
    ratings: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    text_taps: tuple[str, ...] = ()
    queries: int = 4
    attention_heads: int = 8
    norm_eps: float = 1e-6
    dropout: float = 0.0
    tuned_blocks: int = 1
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] = LORA_TARGETS
    image_levels: tuple[float, ...] = ()
    image_draws: int = 1
    score_mean: float = 0.0
    score_std: float = 1.0
    max_sequence_length: int = 0
    half_precision: bool = False
    denoiser: str = ""

    def __post_init__(self) -> None:
        _set_kinds(self)
        for name, choices in (("adaptation", Adaptation), ("head", HeadName), ("output", OutputName)):
            if getattr(self, name) not in get_args(choices):
                raise UsageError(f"unknown {name} {getattr(self, name)!r}; choose {', '.join(get_args(choices))}")
        for name in ("lora_rank", "head_width", "queries", "attention_heads", "tuned_blocks", "image_draws"):
            if not getattr(self, name) >= 1:
                raise UsageError(f"{name} must be positive; got {getattr(self, name)}")
        if len(self.ratings) < 2 or any(a >= b for a, b in zip(self.ratings, self.ratings[1:], strict=False)):
            raise UsageError(f"ratings must rise, and be two or more; got {list(self.ratings)}")
        if any(not 0 <= level <= 1 for level in self.image_levels):
            raise UsageError(f"image_levels lie in [0, 1], from data to noise; got {list(self.image_levels)}")
        if not (math.isfinite(self.score_mean) and math.isfinite(self.score_std) and self.score_std > 0):
            raise UsageError(
                f"scores need a finite mean and a positive deviation; got {self.score_mean}, {self.score_std}"
            )
        if self.text_taps and self.head != "query":
            raise UsageError(f"the head {self.head!r} reads no text tokens; drop text_taps, or take the head 'query'")
        if self.taps and self.head == "drm":
            raise UsageError("the head 'drm' reads the denoiser's output layers; drop taps, or take another head")

    @property
    def channels(self) -> int:
        """Numbers that the head gives per sample."""
        return {"scalar": 1, "gaussian": 2, "ordinal": len(self.ratings)}[self.output]


_NAMES, _NUMBERS = ("taps", "text_taps", "lora_targets"), ("ratings", "image_levels")


def _set_kinds(config: DRMConfig) -> None:
    """Make lists tuples; refuse values of other kinds, such as one name where a list of names belongs."""
    for field in fields(config):
        value, kind = getattr(config, field.name), field.type
        if field.name in (*_NAMES, *_NUMBERS):
            wanted: Any = str if field.name in _NAMES else int | float
            if not isinstance(value, list | tuple) or not all(isinstance(v, wanted) for v in value):
                what = "names" if field.name in _NAMES else "numbers"
                raise UsageError(f"{field.name} must be a list of {what}; got {value!r}")
            object.__setattr__(config, field.name, tuple(value))
        elif kind in (int, float, bool, str):
            number = kind is float and isinstance(value, int)
            if not (isinstance(value, kind) or number) or isinstance(value, bool) != (kind is bool):  # type: ignore[arg-type]
                raise UsageError(f"{field.name} must be of type {getattr(kind, '__name__', kind)}; got {value!r}")

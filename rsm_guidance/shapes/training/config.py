"""Configurations of the trainings of the shapes world: plain types, so that the command line reads them without torch."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rsm_guidance.core.errors import UsageError

if TYPE_CHECKING:
    from rsm_guidance.core.transitions import GaussianTransition


_MOST_PROMPTS = 1_000_000


@dataclass(frozen=True)
class GroupConfig:
    """How branch groups are made.

    Attributes:
        siblings: K children per prompt.
        steps: denoising steps of the trajectories.
        guidance_scale: classifier-free guidance.
        transition: stochastic transition, the one that will be used in sampling, as text.
        batch_size: prompts per batch; all prompts of a batch branch at one level.
        autocast: run the generator in bfloat16 autocast, which is faster on a GPU, and on a CPU that computes in it.
    """

    siblings: int = 4
    steps: int = 12
    guidance_scale: float = 3.0
    transition: str = "cps 0.9"
    batch_size: int = 48
    autocast: bool = True

    def __post_init__(self) -> None:
        for name, least in (("siblings", 2), ("steps", 2), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"{name} of groups must be at least {least}; got {getattr(self, name)}")
        if not math.isfinite(self.guidance_scale):
            raise UsageError(f"guidance_scale must be a finite number; got {self.guidance_scale}")

    @property
    def gaussian(self) -> "GaussianTransition":
        """The transition.

        Raises:
            ValueError: if children cannot be drawn from it.
        """
        from rsm_guidance.core.transitions import GaussianTransition, parse_transition, require_gaussian  # loads torch

        transition = parse_transition(self.transition)
        require_gaussian(transition, "children are drawn from one Gaussian", noisy=True)
        assert isinstance(transition, GaussianTransition)
        return transition


@dataclass(frozen=True)
class ShapesRewardConfig:
    """Training of a diffusion reward model on the shapes world.

    Attributes:
        out: folder for data, training state, the model and its report.
        pipeline: folder of the generator, "shapes" for the embedded one; it is the backbone too. Another model of the
            shapes world: the verifier orders its samples.
        prompts: training captions, all of the training split.
        validation_prompts: held-out captions that decide when to stop.
        groups: how samples are generated.
        data: folder of generated groups; default `out`/data.
        blocks: blocks of the denoiser kept.
        adaptation: "frozen", "lora" or "full".
        lora_rank: rank of the LoRA.
        head: design of the reward head; see `reward_models.heads`.
        head_width: width of the reward head; default: the head's own.
        output: "ordinal" for a distribution over the verifier's scores, "scalar" for a score that only orders.
        taps: names of the blocks that the head reads; default: the last one kept.
        steps: optimiser updates.
        batch_groups: groups per update.
        lr: peak learning rate of the head and of a LoRA; a tuned trunk learns at a third of it.
        weight_decay: AdamW weight decay.
        sibling_weight: weight of the sibling pairs' loss against that of the re-noised pairs.
        object_weight: weight of the auxiliary per-token prediction of what the finished image holds; none with a frozen
            backbone, which it could not teach.
        value_weight: weight of the cross-entropy of the score that a latent ends in; 0 for none, as a scalar model needs.
        completions: of a latent that several finished samples come from, how many the mean score is of that it learns; default
            all.
        init_from: folder or hub id of a finished reward model, whose tensors are taken over where names and shapes are the same;
            not for going on with an interrupted run.
        evaluate_every: updates between validations; the best checkpoint by mean accuracy is kept.
        seed: of data and training.
    """

    out: Path = Path("drm")
    pipeline: str = "shapes"
    prompts: int = 7200
    validation_prompts: int = 480
    groups: GroupConfig = field(default_factory=GroupConfig)
    data: Path | None = None
    blocks: int = 4
    adaptation: Literal["frozen", "lora", "full"] = "full"
    lora_rank: int = 16
    head: Literal["conv", "query", "pool"] = "conv"
    head_width: int | None = None
    output: Literal["scalar", "ordinal"] = "ordinal"
    taps: tuple[str, ...] = ()
    steps: int = 2200
    batch_groups: int = 12
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    sibling_weight: float = 1.0
    object_weight: float = 1.0
    value_weight: float = 1.0
    completions: int | None = None
    init_from: str | None = None
    evaluate_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("prompts", "validation_prompts", "steps", "batch_groups", "evaluate_every", "blocks", "lora_rank")
        for name in (*counts, "head_width", "completions"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("lr", "weight_decay", "sibling_weight", "object_weight", "value_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UsageError(f"{name} must be a finite number of at least 0; got {getattr(self, name)}")
        if self.output == "scalar" and self.value_weight:
            raise UsageError("a scalar model learns no values; set value_weight: 0, or output: ordinal")
        for name in ("prompts", "validation_prompts"):
            if getattr(self, name) > _MOST_PROMPTS:
                raise UsageError(
                    f"{name} are held in memory and must be at most {_MOST_PROMPTS}; got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class VAEConfig:
    """Training of the autoencoder.

    Attributes:
        steps: updates.
        batch_size: images per update.
        lr: peak learning rate, reached after a warm-up; from there a half cosine leads to 0.
        kl_weight: weight of the KL divergence of the latents from a unit Gaussian.
        seed: of data and training.
        save_every: updates between saved states.
        autocast: compute in bfloat16, which is faster on a GPU, and on a CPU that computes in it.
    """

    steps: int = 1000
    batch_size: int = 24
    lr: float = 2e-3
    kl_weight: float = 1e-5
    seed: int = 0
    save_every: int = 200
    autocast: bool = True


@dataclass(frozen=True)
class BaseConfig:
    """Training of the base model.

    The learning rate warms up to `lr` and falls along a half cosine to 0 at the first step of `restarts`; from there,
    and from each later one, another such cycle follows.

    Attributes:
        steps: updates.
        restarts: steps at which a cycle of the learning rate begins.
        restart_lr: peak of these cycles, as a share of `lr`.
        batch_size: scenes per update.
        scenes: number of scenes, rendered once.
        lr: peak learning rate.
        aux_weight: weight of the per-token object prediction.
        drop_caption: share of empty captions (classifier-free guidance).
        zero_tokens: share of steps, with a quarter of the batch, trained with the 256 zero tokens that stock SD3 puts for a
            missing third text encoder.
        ema_decay: of the averaged weights.
        seed: of data and training.
        save_every: updates between saved states.
    """

    steps: int = 10_800
    restarts: tuple[int, ...] = (4000, 6600)
    restart_lr: float = 0.7
    batch_size: int = 64
    scenes: int = 48_000
    lr: float = 2e-3
    aux_weight: float = 0.3
    drop_caption: float = 0.1
    zero_tokens: float = 0.06
    ema_decay: float = 0.998
    seed: int = 0
    save_every: int = 500

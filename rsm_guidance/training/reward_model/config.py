"""Configuration of `rsm-guidance train reward`: plain types, so that the command line reads it without torch.

What is not said here comes from the pipeline: the size of images, the table of noise levels.
"""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from rsm_guidance.core.errors import UsageError


@dataclass(frozen=True)
class DataConfig:
    """Preferences.

    Attributes:
        path: table or folder of preferences (`rsm-guidance data check` reads the same), or the name of a packaged set.
        split: a published split, or "train" by prompt; default: everything that is not held out.
        format: name of the format, where it should not be recognised.
        min_confidence: rows below it are left out, of formats that state a confidence.
        held_out: other data to evaluate on; default: some prompts of `path`.
        held_out_split: split of the held-out data, where they have several.
        held_out_fraction: expected share of the prompts that are held out, where `held_out` is not given; 0 for none.
        side: images are scaled to this side, in pixels; default: the model's own.
        step: sides of images that are not square are multiples of it; default: an eighth of `side`.
        max_ratio: of the longer side of an image to the shorter one; 1 crops all to squares.
        cache: folder of latents and prompt embeddings; default: `out`/cache.
        embeddings: keep prompt embeddings on disk, so that text encoders leave the accelerator before training.
    """

    path: str = ""
    split: str | None = None
    format: str | None = None
    min_confidence: float | None = None
    held_out: str | None = None
    held_out_split: str | None = None
    held_out_fraction: float = 0.05
    side: int | None = None
    step: int | None = None
    max_ratio: float = 1.0
    cache: Path | None = None
    embeddings: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.held_out_fraction < 1:
            raise UsageError(f"data.held_out_fraction must lie in [0, 1); got {self.held_out_fraction}")
        _require_positive(self, "data.", "side", "step")


@dataclass(frozen=True)
class ModelConfig:
    """The reward model, as in `DiffusionRewardModel.from_pipeline`.

    Attributes:
        blocks: blocks of the denoiser kept, from the input; default: up to the last tap, without taps seven eighths.
        taps: names of the blocks whose features the head reads; default: the last one kept.
        text_taps: names of the blocks whose text tokens the head "query" reads besides.
        adaptation: what is trained besides the head.
        lora_rank, lora_alpha: of the LoRA, which is scaled by lora_alpha / lora_rank; lora_alpha 0 for lora_rank.
        lora_targets: names, or ends of names, of the layers that have a LoRA; default: those of the attention.
        tuned_blocks: blocks that are tuned with "last-blocks".
        head: design of the reward head; see `reward_models.heads`.
        head_width: width of the reward head; default: the head's own, with "drm" the 256 of its code.
        queries, dropout: of the head "query"; "drm" has a dropout, too.
        output: what the head says; default: what the loss needs, else a score.
        ratings: values of the classes of an ordinal output, rising.
        image_levels, image_draws: noise levels at which finished images are scored, and noises for each; default: as they are.
        max_sequence_length: tokens of a prompt, where the pipeline asks; 0 for its default.
    """

    blocks: int | None = None
    taps: tuple[str, ...] = ()
    text_taps: tuple[str, ...] = ()
    adaptation: Literal["frozen", "lora", "last-blocks", "full"] = "lora"
    lora_rank: int = 16
    lora_alpha: float = 0.0
    lora_targets: tuple[str, ...] | None = None
    tuned_blocks: int = 1
    head: Literal["conv", "drm", "query", "pool"] = "conv"
    head_width: int | None = None
    queries: int = 4
    dropout: float = 0.0
    output: Literal["scalar", "gaussian", "ordinal"] | None = None
    ratings: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    image_levels: tuple[float, ...] = ()
    image_draws: int = 1
    max_sequence_length: int = 0

    def __post_init__(self) -> None:
        _require_positive(self, "model.", "blocks", "lora_rank", "head_width", "tuned_blocks", "queries", "image_draws")


@dataclass(frozen=True)
class NoiseConfig:
    """The level to which both images of a pair are noised.

    Attributes:
        law: of the level; see `training.reward_model.levels`.
        mean, std: of the logit-normal law; a positive mean prefers cleaner levels.
        a, b: of the beta law; b > a prefers cleaner levels.
        same: whether both images of a pair get the same noise; by default each has its own, as in the paper's code.
    """

    law: Literal["uniform", "uniform-sigma", "logit-normal", "beta"] = "uniform"
    mean: float = 0.0
    std: float = 1.0
    a: float = 1.0
    b: float = 2.0
    same: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.std < math.inf):
            raise UsageError(f"noise.mean must be finite and noise.std positive; got {self.mean} and {self.std}")
        _require_positive(self, "noise.", "a", "b")

    @property
    def constants(self) -> dict[str, float]:
        """Those of the law."""
        known = {"logit-normal": ("mean", "std"), "beta": ("a", "b")}.get(self.law, ())
        return {name: getattr(self, name) for name in known}


_CONSTANTS = {
    "margin": ("margin",),
    "win-tie": ("margin",),
    "thurstone": ("noise", "floor"),
    "fidelity": ("noise", "floor"),
}
_ORDINAL = ("ordinal", "oprm")


@dataclass(frozen=True)
class LossConfig:
    """What the scores of a pair are trained for.

    Attributes:
        name: of the loss; see `training.reward_model.losses`. "soft" is Bradley and Terry's for labels that may be soft.
        margin: of "margin" (default 1) and "win-tie" (default 3).
        noise, floor: variance of a score, noise * sigma^2 + floor, of "thurstone" and "fidelity" (default 2 and 0.05).
        ratings: dimension of the data's scores that the loss "ordinal" reads.
        ties: "soft" lets the loss use what it can make of ties, "skip" leaves them out.
    """

    name: Literal["bradley-terry", "margin", "soft", "win-tie", "thurstone", "fidelity", "ordinal", "oprm"] = "soft"
    margin: float | None = None
    noise: float | None = None
    floor: float | None = None
    ratings: str | None = None
    ties: Literal["soft", "skip"] = "soft"

    def __post_init__(self) -> None:
        for name in ("margin", "noise", "floor"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"loss.{name} must be finite and not negative; got {value}")
            if value is not None and name not in _CONSTANTS.get(self.name, ()):
                users = [loss for loss, names in _CONSTANTS.items() if name in names]
                raise UsageError(f"the loss {self.name!r} has no {name}; {' and '.join(users)} have")
        if (self.ratings is None) == (self.name == "ordinal"):
            raise UsageError("the loss 'ordinal', and no other, reads loss.ratings: the name of a score in the data")

    @property
    def constants(self) -> dict[str, float]:
        """Those that are not left to the loss."""
        given = {name: getattr(self, name) for name in _CONSTANTS.get(self.name, ())}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule.

    Attributes:
        lr: peak learning rate of the head.
        trunk_lr: of what is tuned of the backbone; default: `lr`.
        weight_decay: of matrices.
        betas: of the moments.
        schedule: after the warm-up.
        warmup: updates over which the rate rises from 0.
        max_grad_norm: where gradients are clipped.
    """

    lr: float = 1e-4
    trunk_lr: float | None = None
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = 0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(self, "optimizer.", "lr", "trunk_lr", "max_grad_norm")
        if self.weight_decay < 0 or self.warmup < 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(
                "optimizer.weight_decay and optimizer.warmup must not be negative, and betas lie in [0, 1); got "
                f"{self.weight_decay}, {self.warmup} and {list(self.betas)}"
            )


@dataclass(frozen=True)
class RewardConfig:
    """Training of a diffusion reward model on preferences.

    Attributes:
        out: folder of the reward model and of its training.
        pipeline: hub id, folder or packaged name of the pipeline whose denoiser becomes the reward model.
        dtype: of the pipeline's weights; what is trained is float32.
        precision: of computing: "no" (float32), "bf16" or "fp16" (mixed), by accelerate.
        data: the preferences.
        model: the reward model.
        noise: levels of the pairs.
        loss: what scores are trained for.
        optimizer: AdamW and its schedule.
        steps: updates; default: `epochs`.
        epochs: passes over the data, where `steps` is not given.
        batch_size: pairs per update, over all processes.
        micro_batch: pairs per forward pass of a process; default all at once. Gradients accumulate.
        gradient_checkpointing: compute activations again in the backward pass, to save memory.
        ema_decay: of averaged weights, which are evaluated and saved; null for none.
        evaluate_every: updates between evaluations on held-out pairs; also at the first and last update.
        evaluation_levels: noise levels (sigma) at which held-out pairs are compared; the first decides nothing more than
            the others: the best model is the one of the highest mean accuracy.
        evaluation_pairs: held-out pairs of evaluations during training; the last one takes all.
        save_every: updates between saved states; also at the last update.
        keep: saved states that are kept.
        resume: "auto" goes on from the last saved state in `out`, if there is one; "never" starts afresh; or the folder of
            a state.
        init_from: folder or hub id of a finished reward model to start from; not for going on with an interrupted run.
        report_to: trackers of accelerate by name, such as "tensorboard"; they must be installed.
        project: name of the run for trackers.
        push_to_hub: repository on the hub (org/name) that the finished model is uploaded to; the token is read from the
            environment.
        private: whether that repository is private, if it is made.
        workers: processes that read data.
        seed: of initial weights, order, levels and noise.
    """

    out: Path = Path("drm")
    pipeline: str = "shapes"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    precision: Literal["no", "bf16", "fp16"] = "no"
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 16
    micro_batch: int | None = None
    gradient_checkpointing: bool = False
    ema_decay: float | None = None
    evaluate_every: int = 250
    evaluation_levels: tuple[float, ...] = (0.05, 0.4, 0.7)
    evaluation_pairs: int = 512
    save_every: int = 250
    keep: int = 2
    resume: str = "auto"
    init_from: str | None = None
    report_to: tuple[str, ...] = ()
    project: str = "rsm-guidance"
    push_to_hub: str | None = None
    private: bool = False
    workers: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        _require_positive(
            self, "", "steps", "epochs", "batch_size", "micro_batch", "evaluate_every", "evaluation_pairs", "save_every",
            "keep",
        )  # fmt: skip
        if self.workers < 0:
            raise UsageError(f"workers must not be negative; got {self.workers}")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UsageError(f"ema_decay must lie in [0, 1); got {self.ema_decay}")
        if not self.evaluation_levels or not all(0 <= level <= 1 for level in self.evaluation_levels):
            raise UsageError(f"evaluation_levels are noise levels in [0, 1]; got {list(self.evaluation_levels)}")
        if self.loss.name in _ORDINAL and self.output != "ordinal":
            raise UsageError(f"the loss {self.loss.name!r} needs model.output=ordinal; got {self.output}")
        if self.push_to_hub is not None and self.push_to_hub.count("/") != 1:
            raise UsageError(f"push_to_hub names a repository as org/name; got {self.push_to_hub!r}")

    @property
    def cache(self) -> Path:
        """Folder of latents and embeddings."""
        return self.data.cache or self.out / "cache"

    @property
    def output(self) -> Literal["scalar", "gaussian", "ordinal"]:
        """What the head says."""
        return self.model.output or ("ordinal" if self.loss.name in _ORDINAL else "scalar")

    def require_data(self) -> None:
        """Raise a UsageError if it says not what to train on."""
        if not self.data.path:
            raise UsageError("there is nothing to train on; name a table or folder of preferences as data.path")


def _require_positive(config: Any, prefix: str, *names: str) -> None:
    known = {f.name for f in fields(config)}
    for name in names:
        value = getattr(config, name)
        if name in known and value is not None and not 0 < value < math.inf:
            raise UsageError(f"{prefix}{name} must be positive; got {value}")

"""Configuration of `rsm-guidance train align`: plain types, so that the command line reads it without torch.

One method is one point: an estimator of value, how credits become advantages, a form of loss, a time weight, trust regions.
Points that have no meaning are refused here, with the reason; `presets` has the published ones.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rsm_guidance.core.errors import UsageError
from rsm_guidance.training.alignment.rules import require_meaning
from rsm_guidance.training.alignment.settings import (
    AdvantageConfig,
    EstimatorConfig,
    FormConfig,
    RolloutConfig,
    TimeConfig,
    TrustConfig,
    require_positive,
)


@dataclass(frozen=True)
class MethodConfig:
    """Where a configuration comes from; it goes to the model card.

    Attributes:
        paper: title or name, and arXiv number.
        source: what of the paper its constants were taken from.
        ours: what is not the paper's.
    """

    paper: str = ""
    source: Literal["", "code", "text", "notes", "summary"] = ""
    ours: str = ""


@dataclass(frozen=True)
class OldConfig:
    """An older policy and how it follows: after s updates, old <- d old + (1 - d) policy, d = clamp(start + slope (s - after), 0, cap).

    With rollout.policy = old it is the one that samples, and moves before each epoch; the average of trust.proximal = ema
    moves after each update.

    Attributes:
        start, slope, cap: of the decay d; all 0 for a copy of the policy.
        after: updates before the slope begins.
    """

    start: float = 0.0
    slope: float = 0.0
    cap: float = 0.0
    after: int = 0

    def __post_init__(self) -> None:
        if not (0 <= self.start <= self.cap < 1 and self.slope >= 0 and self.after >= 0):
            raise UsageError(
                f"old.start, cap and slope must obey 0 <= start <= cap < 1 and slope, after >= 0; got {self.start}, {self.cap}, "
                f"{self.slope} and {self.after}"
            )

    def decay(self, update: int) -> float:
        """d after so many updates."""
        return min(self.start + self.slope * max(update - self.after, 0), self.cap)


@dataclass(frozen=True)
class LoraConfig:
    """What is trained: a LoRA scaled by alpha / rank.

    Attributes:
        rank, alpha: alpha 0 for rank.
        targets: names, or ends of names, of layers; default: those of the attention.
        init: a finished LoRA file to start from; not for going on with an interrupted run.
    """

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] | None = None
    init: Path | None = None

    def __post_init__(self) -> None:
        require_positive(self, "lora.", "rank")
        if not 0 <= self.alpha < math.inf:
            raise UsageError(f"lora.alpha must not be negative; got {self.alpha}")


@dataclass(frozen=True)
class AlignOptimizerConfig:
    """AdamW.

    Attributes:
        lr, weight_decay, betas: as in torch.
        warmup: updates over which the rate rises from 0.
        max_grad_norm: where gradients are clipped.
    """

    lr: float = 3e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    warmup: int = 0
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "optimizer.", "lr", "max_grad_norm")
        if self.weight_decay < 0 or self.warmup < 0 or not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(
                "optimizer.weight_decay and optimizer.warmup must not be negative, and betas lie in [0, 1); got "
                f"{self.weight_decay}, {self.warmup} and {list(self.betas)}"
            )


@dataclass(frozen=True)
class CallConfig:
    """What every call of the pipeline is given; null for its own defaults.

    Attributes:
        height, width, num_frames: of images and videos.
        max_sequence_length: tokens of a prompt.
        negative_prompt: of classifier-free guidance.
    """

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    max_sequence_length: int | None = None
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        require_positive(self, "call.", "height", "width", "num_frames", "max_sequence_length")


@dataclass(frozen=True)
class EvaluationConfig:
    """What is measured on the way, with the stock pipeline and the averaged weights.

    Attributes:
        prompts: text or JSONL file; default: those that a packaged model carries, else the first ones trained on.
        count: prompts.
        images: per prompt, from seeds of their own; diversity is measured among them.
        every: epochs between two evaluations; the first is of the base model.
        steps, guidance: of the pipeline's call; null for the pipeline's own, or those of the rollouts for the guidance.
        batch: images at once.
        pictures: images of the grid.
        patience: evaluations in a row in which the rewards rise while the gold reward stays below its best, after which
            training stops; null for no stop.
    """

    prompts: Path | None = None
    count: int = 32
    images: int = 2
    every: int = 10
    steps: int | None = None
    guidance: float | None = None
    batch: int = 32
    pictures: int = 16
    patience: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "evaluation.", "count", "images", "every", "steps", "batch", "pictures", "patience")


@dataclass(frozen=True)
class AlignConfig:
    """Fine-tuning of a pipeline by rewards.

    Attributes:
        method: where the configuration comes from.
        required: settings, by dotted name, that the paper leaves open; `read_align` asks for them, and the card names them.
        out: folder of the LoRA and of its training.
        pipeline: hub id, folder or packaged name.
        call: what every call of the pipeline is given.
        prompts: text or JSONL file of prompts.
        rewards: what is maximised, by name, folder or `package.module:object`.
        reward_weights: of their advantages in the sum; default 1 each.
        reward_sign: sign of all values of the rewards, where it is known; `estimator.ratio` needs it.
        gold: an independent reward that is only watched.
        reward_batch: images a reward scores at once; default: as many as are decoded.
        rollout, estimator, advantage, form, time, trust, old, lora, optimizer: see their own documentation.
        prompts_per_epoch: prompts for which samples are made before updating.
        updates_per_epoch: updates from these samples.
        micro_batch: rows per forward pass; default all at once. Gradients accumulate.
        epochs: rounds of samples and updates.
        ema_decay: of averaged weights, which are evaluated and saved; null for none.
        evaluation: see its own documentation.
        rollout_batch: latents per forward pass of rollouts; fewer where memory runs out.
        gradient_checkpointing: activations are computed again on the way back.
        dtype: of the pipeline's weights; the LoRA is float32.
        precision: mixed precision of computing, as in accelerate.
        save_every: epochs between saved states; `keep` of them are kept.
        resume: "auto" to go on with the last state in `out`, "never", or a state's folder.
        report_to: trackers of accelerate, such as tensorboard or wandb, which call the run `project`.
        push_to_hub: repository that the finished LoRA is uploaded to, `private` or not.
        seed: of everything.
    """

    method: MethodConfig = field(default_factory=MethodConfig)
    required: tuple[str, ...] = ()
    out: Path = Path("aligned")
    pipeline: str = "shapes"
    call: CallConfig = field(default_factory=CallConfig)
    prompts: Path | None = None
    rewards: tuple[str, ...] = ("shapes-drm",)
    reward_weights: tuple[float, ...] | None = None
    reward_sign: Literal["positive", "negative"] | None = None
    gold: str | None = None
    reward_batch: int | None = None
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    estimator: EstimatorConfig = field(default_factory=EstimatorConfig)
    advantage: AdvantageConfig = field(default_factory=AdvantageConfig)
    form: FormConfig = field(default_factory=FormConfig)
    time: TimeConfig = field(default_factory=TimeConfig)
    trust: TrustConfig = field(default_factory=TrustConfig)
    old: OldConfig = field(default_factory=OldConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    optimizer: AlignOptimizerConfig = field(default_factory=AlignOptimizerConfig)
    prompts_per_epoch: int = 48
    updates_per_epoch: int = 1
    micro_batch: int | None = None
    epochs: int = 100
    ema_decay: float | None = 0.9
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    rollout_batch: int = 64
    gradient_checkpointing: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    precision: Literal["no", "bf16", "fp16"] = "no"
    save_every: int = 10
    keep: int = 1
    resume: str = "auto"
    report_to: tuple[str, ...] = ()
    project: str = "rsm-guidance"
    push_to_hub: str | None = None
    private: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(
            self, "", "reward_batch", "prompts_per_epoch", "updates_per_epoch", "micro_batch", "epochs", "rollout_batch",
            "save_every", "keep",
        )  # fmt: skip
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise UsageError(f"ema_decay must lie in [0, 1); got {self.ema_decay}")
        if not self.rewards:
            raise UsageError("there is nothing to maximise; name at least one of rewards")
        if self.reward_weights is not None and len(self.reward_weights) != len(self.rewards):
            raise UsageError(f"reward_weights gives {len(self.reward_weights)} weights for {len(self.rewards)} rewards")
        require_meaning(self)

    @property
    def weight(self) -> str:
        """The time weight, or the plain one of the form."""
        return self.time.weight or ("flow-grpo" if self.form.family == "reverse" else "uniform")

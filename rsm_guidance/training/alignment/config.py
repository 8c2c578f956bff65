"""Configuration of `rsm-guidance train align`: plain types, so that the command line reads it without torch.

One method is one point: an estimator of value, how credits become advantages, a form of loss, a time weight, trust regions.
Points that have no meaning are refused here, with the reason; `presets` has the published ones.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rsm_guidance.core.errors import UsageError
from rsm_guidance.training.alignment.rules import require_meaning
from rsm_guidance.training.alignment.settings import (
    AdvantageConfig,
    AlignOptimizerConfig,
    EstimatorConfig,
    FormConfig,
    LoraConfig,
    MethodConfig,
    OldConfig,
    RolloutConfig,
    TimeConfig,
    TrustConfig,
    require_positive,
)


@dataclass(frozen=True)
class AlignConfig:
    """Fine-tuning of a pipeline by rewards.

    Attributes:
        method: where the configuration comes from.
        required: settings, by dotted name, that the paper leaves open; `read_align` asks for them, and the card names them.
        out: folder of the LoRA and of its training.
        pipeline: hub id, folder or packaged name.
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
        seed: of everything.
    """

    method: MethodConfig = field(default_factory=MethodConfig)
    required: tuple[str, ...] = ()
    out: Path = Path("aligned")
    pipeline: str = "shapes"
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
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "", "reward_batch", "prompts_per_epoch", "updates_per_epoch", "micro_batch", "epochs")
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

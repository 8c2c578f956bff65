"""Trains a diffusion reward model on the shapes world: `rsm-guidance train reward`.

What it is trained for is in `training.objective`; the loop is `rsm_guidance.training`.
"""

import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rsm_guidance.core.random import generator_of
from rsm_guidance.io.files import write_json
from rsm_guidance.reward_models import DiffusionRewardModel, load_backbone
from rsm_guidance.reward_models.model import Adaptation
from rsm_guidance.shapes.scenes import Caption, caption_set, random_caption
from rsm_guidance.shapes.training.groups import BranchGroups, GroupConfig, generate_groups
from rsm_guidance.shapes.training.hard_negatives import Renders, render_hard_negatives
from rsm_guidance.shapes.training.objective import Preferences
from rsm_guidance.shapes.training.report import report_accuracy, validation_accuracy
from rsm_guidance.training import Batches, LoopConfig, adamw, cosine, fit
from rsm_guidance.training.loop import Metrics
from rsm_guidance.training.optim import freeze_unreached

_TUNED_TRUNK = 0.33  # learning rate of a tuned trunk, as a share of the head's
_EMA_DECAY = 0.995


@dataclass(frozen=True)
class RewardTrainConfig:
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
        head_width: width of the reward head.
        steps: optimiser updates.
        batch_groups: groups per update.
        lr: peak learning rate of the head and of a LoRA; a tuned trunk learns at a third of it.
        weight_decay: AdamW weight decay.
        sibling_weight: weight of the sibling pairs' loss against that of the re-noised pairs.
        object_weight: weight of the auxiliary per-token prediction of what the finished image holds; none with a frozen
            backbone, which it could not teach.
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
    adaptation: Adaptation = "full"
    lora_rank: int = 16
    head_width: int = 64
    steps: int = 2200
    batch_groups: int = 12
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    sibling_weight: float = 1.0
    object_weight: float = 1.0
    evaluate_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "validation_prompts", "steps", "batch_groups", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.groups.siblings < 2:
            raise ValueError(f"a preference needs at least 2 siblings; got {self.groups.siblings}")


@dataclass(frozen=True)
class RewardData:
    """Branch groups to train on, to stop by and to report, and rendered hard negatives of the training captions."""

    train: BranchGroups
    validation: BranchGroups
    reported: BranchGroups
    renders: Renders


def train_reward(config: RewardTrainConfig) -> dict[str, Any]:
    """Generate data, train, keep the best checkpoint by held-out accuracy, and write model, report and plot.

    Resumes where it was interrupted.  Returns the report.
    """
    out = Path(config.out)
    pipe = load_backbone(config.pipeline)
    pipe.set_progress_bar_config(disable=True)
    data = reward_data(pipe, config)
    objective = build_objective(pipe, data, config)
    trunk_lr = config.lr * (_TUNED_TRUNK if config.adaptation == "full" else 1.0)
    modules = [(objective.drm.head, config.lr), (objective.drm.trunk, trunk_lr)]
    if objective.objects is not None:
        modules.append((objective.objects, config.lr))
    optimizer = adamw(modules, config.weight_decay)
    history = fit(
        objective,
        optimizer,
        cosine(optimizer, config.steps),
        Batches(range(len(data.train)), config.batch_groups, config.seed),
        LoopConfig("reward model", config.steps, config.evaluate_every, config.seed, _EMA_DECAY),
        out / "state",
        lambda past: keep_best(objective.drm, data.validation, past, out / "model"),
    )
    best = DiffusionRewardModel.from_pretrained(str(out / "model"), pipe=pipe)
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    report: dict[str, Any] = {"config": settings | {"groups": config.groups.described()}, "history": history}
    report |= report_accuracy(best, data.reported, out / "accuracy.png")
    write_json(out / "report.json", report)
    return report


def reward_data(pipe: DiffusionPipeline, config: RewardTrainConfig) -> RewardData:
    """Generate, or read, what the configuration asks for."""
    captions = caption_set(config.prompts, config.seed, held_out=False)
    folder = Path(config.data or Path(config.out) / "data")
    train = generate_groups(pipe, captions, config.groups, folder / "train", config.seed, "training samples")
    # small batches, so that siblings lie at many levels
    small = replace(config.groups, batch_size=min(12, config.groups.batch_size))
    held_out = validation_captions(config.validation_prompts)
    samples = generate_groups(pipe, held_out, small, folder / "validation", config.seed, "validation samples")
    renders = render_hard_negatives(pipe, captions, config.seed)
    return RewardData(train, samples.every_other(0), samples.every_other(1), renders)


def build_objective(pipe: DiffusionPipeline, data: RewardData, config: RewardTrainConfig) -> Preferences:
    """An untrained reward model and its objective; what the scores do not depend on is frozen."""
    torch.manual_seed(config.seed)
    drm = DiffusionRewardModel.from_pipeline(
        pipe,
        blocks=config.blocks,
        adaptation=config.adaptation,
        lora_rank=config.lora_rank,
        head_width=config.head_width,
        backbone=config.pipeline,
    )
    with torch.no_grad():  # text features are kept, and round as their batch does: a resumed run is to find the same
        drm.score(data.train.finals[:, 0].float(), 0.0, data.train.prompts)
    object_weight = 0.0 if config.adaptation == "frozen" else config.object_weight
    objective = Preferences(drm, data.train, data.renders, config.sibling_weight, object_weight)
    freeze_unreached(objective, objective(torch.arange(1), generator_of("probe"))["loss"])
    return objective


def keep_best(drm: DiffusionRewardModel, groups: BranchGroups, past: list[Metrics], folder: Path) -> Metrics:
    """Accuracies on validation groups; saves the model if their mean is above those of the past."""
    accuracy = validation_accuracy(drm, groups)
    if accuracy["mean"] > max((entry["mean"] for entry in past), default=-1.0):
        drm.save_pretrained(folder)
    return accuracy


def validation_captions(count: int) -> list[Caption]:
    """Held-out captions for early stopping and the report; none shares its composition with the benchmark's set.

    They are of the three categories that have enough held-out compositions for that.
    """
    categories = ("counting", "position", "attribute_binding")
    evaluation = {c.spec.canonical() for c in caption_set(512, 0)}
    rng = random.Random("validation")
    chosen: dict[str, Caption] = {}
    while len(chosen) < count:
        caption = random_caption(rng.choice(categories), rng, held_out=True)
        if caption.spec.canonical() not in evaluation:
            chosen.setdefault(caption.text, caption)
    return list(chosen.values())

"""Trains a diffusion reward model on the shapes world: `rsm-guidance train shapes-reward`.

What it is trained for is in `training.objective`; the loop is `rsm_guidance.training`.
"""

import random
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.random import generator_of
from rsm_guidance.io.files import write_json
from rsm_guidance.reward_models import DiffusionRewardModel, load_backbone
from rsm_guidance.reward_models.checkpoint import checkpoint_folder, read_checkpoint
from rsm_guidance.shapes.scenes import Caption, caption_set, random_caption
from rsm_guidance.shapes.training.config import ShapesRewardConfig
from rsm_guidance.shapes.training.groups import BranchGroups, generate_groups
from rsm_guidance.shapes.training.hard_negatives import Renders, render_hard_negatives
from rsm_guidance.shapes.training.objective import RATINGS, Preferences
from rsm_guidance.shapes.training.report import report_accuracy, validation_accuracy
from rsm_guidance.training import Batches, LoopConfig, adamw, cosine, fit
from rsm_guidance.training.data import process_state
from rsm_guidance.training.loop import Metrics
from rsm_guidance.training.optim import freeze_unreached

_TUNED_TRUNK = 0.33  # learning rate of a tuned trunk, as a share of the head's
_EMA_DECAY = 0.995


@dataclass(frozen=True)
class RewardData:
    """Branch groups to train on, to stop by and to report, and rendered hard negatives of the training captions."""

    train: BranchGroups
    validation: BranchGroups
    reported: BranchGroups
    renders: Renders


def train_reward(config: ShapesRewardConfig) -> dict[str, Any]:
    """Generate data, train, keep the best checkpoint by held-out accuracy, and write model, report and plot.

    Resumes where it was interrupted.  Returns the report.
    """
    out = Path(config.out)
    _ = config.groups.gaussian  # refuses what children cannot be drawn from, before anything is loaded
    pipe = load_backbone(config.pipeline)
    pipe.set_progress_bar_config(disable=True)
    captions = validation_captions(config.validation_prompts)
    untrained(pipe, config)  # refuses what does not suit the denoiser, before anything is written
    if (out / "model").exists():  # of the run that goes on; damage is told before more work is done
        DiffusionRewardModel.from_pretrained(str(out / "model"), pipe=pipe)
    data = reward_data(pipe, config, captions)
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
    if process_state().is_main_process:
        standardise(best, data.validation)
        best.save_pretrained(out / "model")
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
    report: dict[str, Any] = {"config": settings, "history": history}
    report |= report_accuracy(best, data.reported, out / "accuracy.png")
    write_json(out / "report.json", report)
    return report


@torch.no_grad()
def standardise(drm: DiffusionRewardModel, groups: BranchGroups) -> None:
    """Give scores of finished samples mean 0 and deviation 1."""
    drm.drm_config = replace(drm.drm_config, score_mean=0.0, score_std=1.0)
    prompts = [p for p in groups.prompts for _ in range(groups.finals.shape[1])]
    scores = drm.score(groups.finals.flatten(0, 1).float(), 0.0, prompts)
    mean, deviation = float(scores.mean()), float(scores.std())
    drm.drm_config = replace(drm.drm_config, score_mean=mean, score_std=max(deviation, 1e-6))


def reward_data(pipe: DiffusionPipeline, config: ShapesRewardConfig, held_out: list[Caption]) -> RewardData:
    """Generate, or read, what the configuration asks for; validated on samples of held-out captions."""
    captions = caption_set(config.prompts, config.seed, held_out=False)
    folder = Path(config.data or Path(config.out) / "data")
    train = generate_groups(pipe, captions, config.groups, folder / "train", config.seed, "training samples")
    # small batches, so that siblings lie at many levels
    small = replace(config.groups, batch_size=min(12, config.groups.batch_size))
    samples = generate_groups(pipe, held_out, small, folder / "validation", config.seed, "validation samples")
    renders = render_hard_negatives(pipe, captions, config.seed)
    return RewardData(train, samples.every_other(0), samples.every_other(1), renders)


def untrained(pipe: DiffusionPipeline, config: ShapesRewardConfig) -> DiffusionRewardModel:
    """The reward model that a run begins with.

    Raises:
        UsageError: if the configuration does not suit the denoiser.
    """
    torch.manual_seed(config.seed)
    drm = DiffusionRewardModel.from_pipeline(
        pipe,
        blocks=config.blocks,
        adaptation=config.adaptation,
        lora_rank=config.lora_rank,
        head=config.head,
        head_width=config.head_width,
        output=config.output,
        ratings=RATINGS,
        taps=config.taps,
        backbone=config.pipeline,
        half_precision=True,
    )
    if config.init_from is not None:
        _start_from(drm, config.init_from)
    return drm


@torch.no_grad()
def _start_from(drm: DiffusionRewardModel, name: str) -> None:
    """Take over what a finished reward model has in common with a new one."""
    given = read_checkpoint(checkpoint_folder(name))[1]
    own = drm.own_tensors()
    common = [key for key in own if key in given and own[key].shape == given[key].shape]
    if not any(key.startswith("trunk.") for key in common):
        raise UsageError(f"the reward model {name} has no tensor of its trunk in common with this one, to start from")
    for key in common:
        own[key].copy_(given[key])


def build_objective(pipe: DiffusionPipeline, data: RewardData, config: ShapesRewardConfig) -> Preferences:
    """An untrained reward model and its objective; what the scores do not depend on is frozen."""
    drm = untrained(pipe, config)
    with torch.no_grad():  # text features are kept, and round as their batch does: a resumed run is to find the same
        one = data.train.finals[:1, 0].float()
        drm.conditioning.recorded(data.train.prompts, tuple(one.shape[1:]), drm.grid(one))
    object_weight = 0.0 if config.adaptation == "frozen" else config.object_weight
    objective = Preferences(
        drm, data.train, data.renders, config.sibling_weight, object_weight, config.value_weight, config.completions
    )
    freeze_unreached(objective, objective(torch.arange(1), generator_of("probe"))["loss"])
    return objective


def keep_best(drm: DiffusionRewardModel, groups: BranchGroups, past: list[Metrics], folder: Path) -> Metrics:
    """Accuracies on validation groups; saves the model if their mean is above those of the past."""
    accuracy = validation_accuracy(drm, groups)
    if accuracy["mean"] > max((entry["mean"] for entry in past), default=-1.0) and process_state().is_main_process:
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
    draws = 0
    while len(chosen) < count:
        draws += 1
        if draws > 1000 * (len(chosen) + 1):  # all that there are have come up many times
            raise UsageError(f"there are {len(chosen)} captions to validate with; got validation_prompts={count}")
        caption = random_caption(rng.choice(categories), rng, held_out=True)
        if caption.spec.canonical() not in evaluation:
            chosen.setdefault(caption.text, caption)
    return list(chosen.values())

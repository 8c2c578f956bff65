"""Trains a diffusion reward model on preferences: `rsm-guidance train reward`.

What is trained is in `objective`, how in `rsm_guidance.training.loop`.  `out` becomes the folder of the reward model: weights,
card, report and plot; beside them lie `checkpoint-STEP`, the states that an interrupted run goes on from.
"""

import inspect
import math
import sys
import time
import warnings
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.ledger import peak_memory
from rsm_guidance.core.random import generator_of
from rsm_guidance.data.preferences import PreferenceData
from rsm_guidance.engine.families import stock_call_of
from rsm_guidance.evaluation.preference.figures import PairScores, figures_of, scores_vary
from rsm_guidance.evaluation.preference.plots import draw_levels
from rsm_guidance.io.files import write_json, write_text
from rsm_guidance.reward_models import DiffusionRewardModel, load_backbone
from rsm_guidance.reward_models.checkpoint import (
    CONFIG,
    WEIGHTS,
    checkpoint_folder,
    read_checkpoint,
    read_tensors,
    require_fit,
    write_checkpoint,
)
from rsm_guidance.training.data import Batches, process_state
from rsm_guidance.training.loop import Metrics, fit, seeded
from rsm_guidance.training.optim import adamw, freeze_unreached
from rsm_guidance.training.reward_model.card import card_of
from rsm_guidance.training.reward_model.collate import PreparedData, collate
from rsm_guidance.training.reward_model.config import RewardConfig
from rsm_guidance.training.reward_model.evaluate import LEVELS, score_pairs
from rsm_guidance.training.reward_model.objective import PairObjective
from rsm_guidance.training.reward_model.run import loop_config, require_run, schedule_of
from rsm_guidance.training.runs import Journal, flat, push
from rsm_guidance.training.sharding import put, whole

_OF_ITS_OWN = ("backbone", "score_mean", "score_std", "half_precision", "denoiser", "image_levels", "image_draws")
REPORT, PLOT, LOG = "report.json", "accuracy.png", "log.jsonl"


def train_reward(config: RewardConfig) -> dict[str, Any]:
    """Encode the data, train, keep the best model by held-out accuracy, and write its card, report and plot.

    Goes on where it was interrupted, unless `config.resume` says otherwise.  Every process calls it.  Returns the report.

    Raises:
        UsageError: for settings, data and folders that do not work, where possible before anything is loaded.
    """
    state = process_state()
    resume = require_run(config, state.num_processes)
    pipe = load_backbone(config.pipeline, state.device, getattr(torch, config.dtype))
    pipe.set_progress_bar_config(disable=True)
    drm = build_model(pipe, config)
    begun = time.perf_counter()
    data = PreparedData(drm, config, lambda label: _progress(label, state.is_main_process))
    encoded = time.perf_counter()
    _require_ratings(data.train, config)
    objective = build_objective(drm, data, config)
    _tell_long_prompts(pipe, data.train, config.model.max_sequence_length)
    optimizer = adamw(
        [(drm.head, config.optimizer.lr), (drm.trunk, config.optimizer.trunk_lr or config.optimizer.lr)],
        config.optimizer.weight_decay,
        config.optimizer.betas,
    )
    batches = Batches(
        data.train, config.batch_size // state.num_processes, config.seed, config.workers, data.train.groups, collate
    )
    steps = config.steps or math.ceil(config.epochs * batches.per_epoch)
    keeper = _Keeper(objective, data.held_out, config, state)
    history = fit(
        objective,
        optimizer,
        schedule_of(optimizer, config, steps),
        batches,
        loop_config(config, data.train, steps),
        config.out,
        keeper if data.held_out is not None else None,
        Journal(config.out / LOG),
        resume,
    )
    cost = {
        "encoding_seconds": encoded - begun,
        "training_seconds": time.perf_counter() - encoded,
        "peak_memory_bytes": peak_memory(),
    }
    return _finish(objective, data, config, {"steps": steps, "history": history, "cost": cost}, state)


def build_model(pipe: DiffusionPipeline, config: RewardConfig) -> DiffusionRewardModel:
    """An untrained reward model, or the one of `init_from`; what is trained of it is float32.

    Raises:
        UsageError: if the model of `init_from` is made of something else.
    """
    backbone = str(Path(config.pipeline).resolve()) if Path(config.pipeline).is_dir() else config.pipeline
    chosen = config.model
    with seeded(generator_of("weights", config.seed), pipe.device):
        drm = DiffusionRewardModel.from_pipeline(
            pipe,
            output=config.output,
            **{
                name: value
                for name, value in asdict(config.model).items()
                if name != "output" and value is not None  # which the loss decides, too
            },
            backbone=backbone,
        )
    if config.init_from is not None:
        _start_from(drm, config.init_from)
    if chosen.adaptation == "full":
        drm.trunk.float()
    for parameter in drm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if config.gradient_checkpointing and chosen.adaptation != "frozen":
        drm.trunk.module.enable_gradient_checkpointing()
    return drm


def _start_from(drm: DiffusionRewardModel, name: str) -> None:
    """Copy the weights of a finished reward model."""
    folder = checkpoint_folder(name)
    config, tensors = read_checkpoint(folder)
    given, ours = asdict(config), asdict(drm.drm_config)
    for key in [key for key in given if key not in _OF_ITS_OWN]:
        of_lora = key.startswith("lora_") and ours["adaptation"] != "lora"
        matters = {"tuned_blocks": ours["adaptation"] == "last-blocks", "ratings": ours["output"] == "ordinal"}.get(
            key, not of_lora
        )
        if given[key] != ours[key] and matters:
            raise UsageError(
                f"cannot start from {name}: it was made with {key}={given[key]!r}, and here it is {ours[key]!r}"
            )
    _put(drm, tensors, folder)


def _save(drm: DiffusionRewardModel, folder: Path, state: PartialState) -> None:
    """Write a reward model, from all processes together."""
    tensors = whole(drm.own_tensors())
    if state.is_main_process:
        write_checkpoint(folder, drm.drm_config, tensors)


def _put(drm: DiffusionRewardModel, tensors: dict[str, Tensor], folder: Path) -> None:
    """Copy the tensors of a checkpoint folder into a reward model of the same kind, of which a process may hold a part."""
    own = drm.own_tensors()
    require_fit(tensors, own, str(folder))
    for key, tensor in own.items():
        put(tensor, tensors[key])


def _require_ratings(data: PreferenceData, config: RewardConfig) -> None:
    known = sorted({name for entry in data.entries for name in entry.scores})
    if config.loss.ratings is not None and config.loss.ratings not in known:
        raise UsageError(
            f"loss.ratings={config.loss.ratings!r} is no score of these data; they have {', '.join(known) or 'none'}"
        )


def build_objective(drm: DiffusionRewardModel, data: PreparedData, config: RewardConfig) -> PairObjective:
    """The objective; what the scores do not depend on is frozen."""
    objective = PairObjective(drm, config, data.embeddings, data.grids)
    probe = collate([data.train[0]], 0)
    freeze_unreached(objective, objective({**probe, "level": 0})["scores"].sum())
    return objective


class _Keeper:
    """Measures the model on held-out pairs, and keeps it in `out` if it is the best so far."""

    def __init__(
        self, objective: PairObjective, held_out: PreferenceData | None, config: RewardConfig, state: PartialState
    ) -> None:
        self._objective, self._held_out, self._config, self._state = objective, held_out, config, state
        self._told = False

    def __call__(self, past: list[Metrics]) -> Metrics:
        assert self._held_out is not None
        config = self._config
        scores = score_pairs(
            self._objective, self._held_out, config.evaluation_levels, _at_once(config), config.evaluation_pairs,
            self._state.num_processes, self._state.process_index,
        )  # fmt: skip
        figures = {level: figures_of(pairs) for level, pairs in scores.items()}
        metrics = {f"accuracy@{level:g}": _or(f["accuracy"], 0.5) for level, f in figures.items()}
        metrics |= {f"held_out_loss@{level:g}": _or(f["loss"], 0.0) for level, f in figures.items()}
        mean = sum(_or(f["accuracy"], 0.5) for f in figures.values()) / len(figures)
        metrics = {"mean_accuracy": mean, **metrics}
        if past:  # the first is of the model before training
            best = max((entry["mean_accuracy"] for entry in past[1:]), default=-1.0)
            if mean > best:
                _save(self._objective.drm, config.out, self._state)
            if not self._told and not any(scores_vary(pairs) for pairs in scores.values()):
                self._told = True
                warnings.warn(
                    "the scores of all held-out images are equal: nothing has been learnt; look at the learning rate, and "
                    "whether the images of a pair differ",
                    stacklevel=2,
                )
        return metrics


def _finish(
    objective: PairObjective,
    data: PreparedData,
    config: RewardConfig,
    told: dict[str, Any],
    state: PartialState,
) -> dict[str, Any]:
    """Measure the kept model, give its scores a scale, and write what tells of it."""
    drm = objective.drm.eval()
    if data.held_out is None:
        _save(drm, config.out, state)
    state.wait_for_everyone()
    _put(drm, read_tensors(config.out), config.out)
    pairs, measured = (data.held_out, "held-out pairs") if data.held_out else (data.train, "training pairs")
    limit = None if data.held_out else config.evaluation_pairs
    scores = score_pairs(
        objective, pairs, LEVELS, _at_once(config), limit, state.num_processes, state.process_index
    )  # fmt: skip
    clean = figures_of(scores[LEVELS[0]])
    if scores_vary(scores[LEVELS[0]]):
        mean, deviation = _or(clean["mean"], 0.0), _or(clean["deviation"], 1.0)
        drm.drm_config = replace(drm.drm_config, score_mean=mean, score_std=deviation)
    report = _report(config, data, scores, measured, drm) | told
    _save(drm, config.out, state)
    if state.is_main_process:
        levels = {level: figures_of(p) for level, p in scores.items()}
        draw_levels({measured: levels}, config.out / PLOT)
        write_json(config.out / REPORT, report)
        write_text(config.out / "README.md", card_of(config, report))
        if config.push_to_hub is not None:
            files = [CONFIG, WEIGHTS, "README.md", PLOT, REPORT]
            push(config.out, config.push_to_hub, config.private, files, "Reward model")
    state.wait_for_everyone()
    return report


def _report(
    config: RewardConfig,
    data: PreparedData,
    scores: dict[float, PairScores],
    measured: str,
    drm: DiffusionRewardModel,
) -> dict[str, Any]:
    def ties(part: PreferenceData | None) -> int:
        return sum(entry.probability == 0.5 for entry in part.entries) if part else 0

    levels: list[dict[str, Any]] = [{"sigma": level, **figures_of(pairs)} for level, pairs in scores.items()]
    warned = [] if any(scores_vary(p) for p in scores.values()) else ["the scores of all images are equal"]
    return {
        "config": flat(asdict(config)),
        "model": {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(drm.drm_config).items()},
        "data": {
            "pairs": len(data.train),
            "ties": ties(data.train),
            "skipped": {str(reason): count for reason, count in data.train.skipped.counts.items()},
            "held_out_pairs": len(data.held_out) if data.held_out else 0,
            "held_out_ties": ties(data.held_out),
        },
        "measured_on": measured,
        "levels": levels,
        "warnings": warned,
    }


def _tell_long_prompts(pipe: DiffusionPipeline, data: PreferenceData, chosen: int) -> None:
    """Say once how many prompts are cut off, by the tokenizer that takes the most; `chosen`: tokens asked for, 0 for none."""
    named = [part for name, part in pipe.components.items() if name.startswith("tokenizer") and part is not None]
    known = [t for t in named if 0 < getattr(t, "model_max_length", 0) < 100_000]
    if not known or not process_state().is_main_process:
        return
    tokenizer = max(known, key=lambda t: t.model_max_length)
    parameter = inspect.signature(stock_call_of(type(pipe))).parameters.get("max_sequence_length")
    asked = chosen or (parameter.default if parameter is not None else None) or tokenizer.model_max_length
    most = min(tokenizer.model_max_length, int(asked))
    places = {e.prompt: e.place for e in reversed(data.entries)}
    long = [p for p in places if len(tokenizer(p)["input_ids"]) > most]
    if long:
        few = "1 prompt has" if len(long) == 1 else f"{len(long)} prompts have"
        limit = f"more than {most} tokens, the first at {places[long[-1]]}"
        tqdm.write(f"note: {few} {limit}; the rest of them is cut off", file=sys.stderr)


def _progress(label: str, shown: bool) -> Any:
    bar = tqdm(desc=label, unit="shard", disable=not shown, leave=False)

    def told(done: int, met: int) -> None:
        bar.total = met
        bar.n = done
        bar.refresh()

    return told


def _at_once(config: RewardConfig) -> int:
    return config.micro_batch or config.batch_size


def _or(number: float | None, default: float) -> float:
    return default if number is None else float(number)

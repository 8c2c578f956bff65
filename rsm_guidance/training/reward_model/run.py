"""What is settled before a run: what cannot work is refused, and settings become those of the loop."""

import hashlib
import os
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from torch.optim.lr_scheduler import LRScheduler

from rsm_guidance.core.errors import UsageError
from rsm_guidance.data.preferences import PreferenceData
from rsm_guidance.training.loop import LoopConfig
from rsm_guidance.training.reward_model.config import RewardConfig
from rsm_guidance.training.runs import flat, require_trackers, resumed

_NO_MATTER = {
    "out", "epochs", "steps", "micro_batch", "evaluate_every", "evaluation_levels", "evaluation_pairs", "save_every", "keep",
    "resume", "report_to", "project", "push_to_hub", "private", "workers", "data.path", "data.held_out", "data.cache",
}  # fmt: skip
"""Settings that may change when a run goes on; the data are compared by what they hold."""


def require_run(config: RewardConfig, processes: int = 1) -> Path | None:
    """Refuse what cannot work before anything is loaded; returns the state to resume from, if one is named.

    Raises:
        UsageError: saying what.
    """
    config.require_data()
    if config.batch_size % processes:
        near = max(1, round(config.batch_size / processes)) * processes
        raise UsageError(
            f"batch_size={config.batch_size} pairs cannot be shared by {processes} processes; the nearest that can is {near}"
        )
    fsdp = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if fsdp and config.model.adaptation == "lora" and config.dtype != "float32":
        raise UsageError(
            f"FSDP takes weights of one precision, and a float32 LoRA on a {config.dtype} pipeline has two; set dtype: float32 "
            "(with precision: bf16), or launch without FSDP"
        )
    require_trackers(config.report_to)
    return resumed(config.resume, config.out)


def schedule_of(optimizer: torch.optim.Optimizer, config: RewardConfig, steps: int) -> LRScheduler:
    """The schedule of the learning rate, with its warm-up."""
    name = "constant_with_warmup" if config.optimizer.schedule == "constant" else config.optimizer.schedule
    warmup = config.optimizer.warmup
    found: LRScheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
    return found


def loop_config(config: RewardConfig, data: PreferenceData, steps: int) -> LoopConfig:
    """How the loop goes for a number of updates on training data."""
    settings = {k: v for k, v in flat(asdict(config)).items() if k not in _NO_MATTER}
    if config.optimizer.schedule != "constant":
        settings["steps"] = steps
    settings["training pairs"] = _digest(data)
    return LoopConfig(
        "reward model",
        steps,
        config.save_every,
        config.seed,
        config.ema_decay,
        config.optimizer.max_grad_norm,
        evaluate_every=config.evaluate_every,
        evaluate_first=True,
        micro_batch=config.micro_batch,
        precision=config.precision,
        keep=config.keep,
        settings=settings,
        report_to=config.report_to,
        project=config.project,
    )


def _digest(data: PreferenceData) -> str:
    told = hashlib.blake2b(digest_size=8)
    for e in data.entries:
        told.update(repr((e.prompt, e.tensors, e.probability, e.weight, e.bucket)).encode())
    return f"{len(data)} with digest {told.hexdigest()}"

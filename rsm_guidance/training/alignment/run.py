"""What is settled before a run: what cannot work is refused, and settings become those of the loop."""

import hashlib
from dataclasses import asdict
from pathlib import Path

from rsm_guidance.core.errors import UsageError
from rsm_guidance.data.prompts import PromptSet
from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.loop import LoopConfig
from rsm_guidance.training.runs import flat, require_trackers, resumed

_NO_MATTER = {
    "out", "epochs", "micro_batch", "rollout_batch", "reward_batch", "save_every", "keep", "resume", "report_to", "project",
    "push_to_hub", "private", "prompts", "gradient_checkpointing", "gold",
}  # fmt: skip
"""Settings that may change when a run goes on, beside those of the evaluation; prompts are compared by what they hold."""


def require_run(config: AlignConfig, processes: int = 1) -> Path | None:
    """Refuse what cannot work before anything is loaded; returns the state to resume from, if one is named.

    Raises:
        UsageError: saying what.
    """
    if config.prompts_per_epoch % processes:
        near = max(1, round(config.prompts_per_epoch / processes)) * processes
        raise UsageError(
            f"prompts_per_epoch={config.prompts_per_epoch} cannot be shared by {processes} processes; the nearest that can is {near}"
        )
    size = config.rollout.compared if config.form.whole_groups else 1
    if config.micro_batch is not None and config.micro_batch % size:
        near = max(1, round(config.micro_batch / size)) * size
        raise UsageError(
            f"micro_batch={config.micro_batch} rows cut groups of {size}, which the form {config.form.name!r} compares; the "
            f"nearest that does not is {near}"
        )
    require_trackers(config.report_to)
    return resumed(config.resume, config.out)


def loop_config(config: AlignConfig, prompts: PromptSet) -> LoopConfig:
    """How the loop goes; an epoch is `updates_per_epoch` of its steps."""
    updates = config.updates_per_epoch
    settings = {
        k: v
        for k, v in flat(asdict(config)).items()
        if k not in _NO_MATTER and not k.startswith(("evaluation.", "method.", "required"))
    }
    settings["prompts"] = _digest(prompts)
    size = config.rollout.compared if config.form.whole_groups else 1
    return LoopConfig(
        "alignment",
        config.epochs * updates,
        config.save_every * updates,
        config.seed,
        config.ema_decay,
        config.optimizer.max_grad_norm,
        evaluate_every=config.evaluation.every * updates,
        evaluate_first=True,
        micro_batch=None if config.micro_batch is None else config.micro_batch // size,
        precision=config.precision,
        keep=config.keep,
        settings=settings,
        report_to=config.report_to,
        project=config.project,
    )


def _digest(prompts: PromptSet) -> str:
    told = hashlib.blake2b(digest_size=8)
    told.update(repr((prompts.prompts, sorted(prompts.columns.items()))).encode())
    return f"{len(prompts.prompts)} with digest {told.hexdigest()}"

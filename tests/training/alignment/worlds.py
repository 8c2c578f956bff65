"""Presets with a value for what they leave open, and runs of seconds on tiny pipelines."""

import json
from pathlib import Path
from typing import Any

from torch import Tensor

from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.read import merge, preset, read_align

OPEN: dict[str, Any] = {
    "estimator.discount": 0.9,
    "advantage.absolute": 0.5,
    "reward_sign": "positive",
    "rollout.noise_slope": 0.5,
    "form.implicit_strength": 1.0,
    "form.temperature": 0.5,
    "form.levels": 4,
    "form.lowest": 0.5,
    "trust.clip": 0.1,
    "trust.gate": 0.1,
    "trust.gate_rewards": ["other"],
    "rollout.data": "groups.jsonl",
}
"""Values for what presets leave open."""


def nested(path: str, value: Any) -> dict[str, Any]:
    *outer, last = path.split(".")
    found: dict[str, Any] = {last: value}
    for name in reversed(outer):
        found = {name: found}
    return found


def chosen(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in preset(name).get("required", ()):
        found = merge(found, nested(path, OPEN[path]))
    return found


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    """Red minus the rest; of videos, of their mean frame."""
    flat = images.mean(1) if images.ndim == 5 else images
    return flat[:, 0].flatten(1).mean(1) - flat[:, 1:].flatten(1).mean(1)


def redness_above(images: Tensor, prompts: list[str]) -> Tensor:
    """The same, always positive."""
    return redness(images, prompts) + 2


REDNESS = f"{__name__}:redness"

SMALL: dict[str, Any] = {
    "rewards": [f"{__name__}:redness_above"],
    "prompts_per_epoch": 2,
    "epochs": 2,
    "updates_per_epoch": 1,
    "rollout": {"steps": 4, "group": 2, "guidance": None},
    "call": {"height": 32, "width": 32},
    "evaluation": {"count": 2, "images": 2, "every": 2, "steps": 2},
    "lora": {"rank": 2, "alpha": 2},
    "optimizer": {"lr": 1e-2},
    "ema_decay": 0.5,
}


def small(name: str, pipeline: Path, out: Path, **options: Any) -> AlignConfig:
    """A preset on a tiny pipeline in a folder."""
    prompts = out.parent / "prompts.txt"
    prompts.parent.mkdir(parents=True, exist_ok=True)
    prompts.write_text("a red thing\na blue thing\na green thing\n")
    given = {"pipeline": str(pipeline), "prompts": str(prompts), "out": str(out)}
    return read_align(name=name, options=merge(merge(merge(chosen(name), SMALL), given), options))


def log(out: Path) -> list[dict[str, Any]]:
    """The journal of a run, without what depends on the clock."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]

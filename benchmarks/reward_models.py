"""Compares reward models that differ in backbone adaptation and depth: `rsm-guidance benchmark judges`."""

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rsm_guidance.shapes.training.reward import RewardTrainConfig, train_reward

VARIANTS: dict[str, dict[str, Any]] = {
    "frozen, 4 blocks": {"adaptation": "frozen", "blocks": 4},
    "LoRA 16, 4 blocks": {"adaptation": "lora", "blocks": 4},
    "tuned, 2 blocks": {"adaptation": "full", "blocks": 2},
    "tuned, 3 blocks": {"adaptation": "full", "blocks": 3},
    "tuned, 4 blocks": {"adaptation": "full", "blocks": 4},
    "tuned, 5 blocks": {"adaptation": "full", "blocks": 5},
    "tuned, 4 blocks, without object prediction": {"adaptation": "full", "blocks": 4, "object_weight": 0.0},
}


@dataclass(frozen=True)
class JudgesBenchmark:
    """Trains every variant with the same data and number of updates.

    Attributes:
        out: folder for the variants and judges.json.
        train: common settings; `out`, `blocks` and `adaptation` are the variant's.
    """

    out: Path = Path("judges")
    train: RewardTrainConfig = field(default_factory=lambda: RewardTrainConfig(steps=400, evaluate_every=100))


def run_judges_benchmark(config: JudgesBenchmark) -> dict[str, Any]:
    """Train what is missing, and return validation accuracies per variant."""
    data = config.train.data or config.out / "data"
    result: dict[str, Any] = {"steps": config.train.steps, "variants": {}}
    for index, (label, settings) in enumerate(VARIANTS.items()):
        report: Any = train_reward(replace(config.train, out=config.out / f"{index}", data=data, **settings))
        result["variants"][label] = {k: report[k] for k in ("validation", "pair", "sibling")}
        partial = config.out / "judges.json.partial"
        partial.write_text(json.dumps(result, indent=1))
        os.replace(partial, config.out / "judges.json")
    return result


def judges_table(result: dict[str, Any]) -> str:
    """The comparison as a Markdown table."""
    lines = [f"| reward model ({result['steps']} updates) | pair accuracy | sibling accuracy |", "|---|---|---|"]
    for label, reports in result["variants"].items():
        v = reports["validation"]
        lines.append(f"| {label} | {v['pair']:.3f} | {v['sibling']:.3f} |")
    return "\n".join(lines)

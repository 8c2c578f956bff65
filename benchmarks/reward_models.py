"""Compares reward models that differ in backbone adaptation and depth.

    python -m benchmarks.reward_models --work runs/reward_models

Interrupted runs resume.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import script
from rsm_guidance.io.files import require_writable, write_json
from rsm_guidance.shapes.training.reward import ShapesRewardConfig, train_reward

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
class RewardModelsBenchmark:
    """Train every variant with the same data and number of updates, and compare their accuracies.

    Attributes:
        out: the JSON file of results.
        work: folder for data and variants.
        train: common settings; `out`, `blocks` and `adaptation` are the variant's.
    """

    out: Path = Path("benchmarks/results/reward_models.json")
    work: Path = Path("runs/reward_models")
    train: ShapesRewardConfig = field(default_factory=lambda: ShapesRewardConfig(steps=400, evaluate_every=100))


def run_reward_models_benchmark(config: RewardModelsBenchmark) -> dict[str, Any]:
    """Train what is missing, and return validation accuracies per variant; written after each."""
    require_writable(config.out)
    data = config.train.data or config.work / "data"
    result: dict[str, Any] = {"steps": config.train.steps, "variants": {}}
    for index, (label, settings) in enumerate(VARIANTS.items()):
        report = train_reward(replace(config.train, out=config.work / f"{index}", data=data, **settings))
        result["variants"][label] = {k: report[k] for k in ("validation", "pair", "sibling")}
        write_json(config.out, result)
    return result


def reward_models_table(result: dict[str, Any]) -> str:
    """The comparison as a Markdown table."""
    lines = [f"| reward model ({result['steps']} updates) | pair accuracy | sibling accuracy |", "|---|---|---|"]
    for label, reports in result["variants"].items():
        v = reports["validation"]
        lines.append(f"| {label} | {v['pair']:.3f} | {v['sibling']:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    script(RewardModelsBenchmark, run_reward_models_benchmark, reward_models_table)

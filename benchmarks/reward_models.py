"""What makes a judge of the shapes world: one choice of its training changed at a time.

    python -m benchmarks.reward_models --work runs/reward_models

Interrupted runs resume.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks import script
from rsm_guidance.evaluation.report.tables import table
from rsm_guidance.io.files import require_writable, write_json
from rsm_guidance.shapes.training.reward import ShapesRewardConfig, train_reward

VARIANTS: dict[str, dict[str, Any]] = {
    "tuned, 4 blocks": {},
    "order alone, no values": {"output": "scalar", "value_weight": 0.0},
    "values of one completion": {"completions": 1},
    "all 6 blocks": {"blocks": 6},
    "taps at blocks 2 and 4": {"taps": ("transformer_blocks.1", "transformer_blocks.3")},
    "head query": {"head": "query"},
    "frozen": {"adaptation": "frozen"},
    "head twice as wide": {"head_width": 128},
    "without object prediction": {"object_weight": 0.0},
    "LoRA 16": {"adaptation": "lora"},
    "2 blocks": {"blocks": 2},
}
SHOWN = (0.8, 0.6435, 0.3613, 0.0)  # levels of the correlations


@dataclass(frozen=True)
class RewardModelsBenchmark:
    """Train every variant with the same data and number of updates, and compare their accuracies.

    Attributes:
        out: the JSON file of results.
        work: folder for data and variants.
        train: common settings; what a variant changes is its own.
    """

    out: Path = Path("benchmarks/results/reward_models.json")
    work: Path = Path("runs/reward_models")
    train: ShapesRewardConfig = field(
        default_factory=lambda: ShapesRewardConfig(steps=200, batch_groups=8, evaluate_every=200)
    )


def run_reward_models_benchmark(config: RewardModelsBenchmark) -> dict[str, Any]:
    """Train what is missing, and return validation accuracies per variant; written after each."""
    require_writable(config.out)
    data = config.train.data or config.work / "data"
    result: dict[str, Any] = {"steps": config.train.steps, "variants": {}}
    for index, (label, settings) in enumerate(VARIANTS.items()):
        report = train_reward(replace(config.train, out=config.work / f"{index}", data=data, **settings))
        result["variants"][label] = {k: report[k] for k in ("validation", "pair", "sibling", "correlation")}
        write_json(config.out, result)
    return result


def reward_models_table(result: dict[str, Any]) -> str:
    """The comparison as a Markdown table."""
    head = [f"{result['steps']} updates", "pairs", "siblings", *(f"values at {level:.2f}" for level in SHOWN)]
    rows = []
    for label, reports in result["variants"].items():
        known = {round(c["sigma"], 3): c["correlation"] for c in reports["correlation"]}
        values = [known[min(known, key=lambda sigma: abs(sigma - level))] for level in SHOWN]
        numbers = [reports["validation"]["pair"], reports["validation"]["sibling"], *values]
        rows.append([label, *(f"{number:.3f}" for number in numbers)])
    return table(head, rows)


if __name__ == "__main__":
    script(RewardModelsBenchmark, run_reward_models_benchmark, reward_models_table)

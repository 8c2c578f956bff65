"""Which choices of a reward model matter: one changed at a time, on rendered preferences of the shapes world.

    python -m benchmarks.reward_training --work runs/reward_training

Interrupted runs resume.  Variants share encoded data, seed, order and noise.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from benchmarks import script
from rsm_guidance import shapes
from rsm_guidance.evaluation.report.tables import table
from rsm_guidance.io.files import require_writable, write_json
from rsm_guidance.training.reward_model.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    RewardConfig,
)
from rsm_guidance.training.reward_model.trainer import train_reward

MODEL = ModelConfig(blocks=4, adaptation="full")
SHOWN = (0.05, 0.4, 0.6, 0.85)

VARIANTS: dict[str, dict[str, Any]] = {
    "baseline: conv head, Bradley-Terry, whole trunk, uniform levels": {},
    "head: drm": {"model": replace(MODEL, head="drm")},
    "head: query": {"model": replace(MODEL, head="query")},
    "head: query, with text": {"model": replace(MODEL, head="query", text_taps=("transformer_blocks.3",))},
    "head: pool": {"model": replace(MODEL, head="pool")},
    "loss: margin 1": {"loss": LossConfig("margin")},
    "loss: win-tie 3": {"loss": LossConfig("win-tie")},
    "loss: thurstone": {"loss": LossConfig("thurstone")},
    "loss: thurstone, variance from the head": {
        "loss": LossConfig("thurstone", noise=0.0, floor=0.0),
        "model": replace(MODEL, output="gaussian"),
    },
    "loss: fidelity": {"loss": LossConfig("fidelity")},
    "loss: oprm": {"loss": LossConfig("oprm")},
    "adaptation: frozen": {"model": replace(MODEL, adaptation="frozen")},
    "adaptation: LoRA 16": {"model": replace(MODEL, adaptation="lora")},
    "adaptation: last block": {"model": replace(MODEL, adaptation="last-blocks")},
    "taps: blocks 2 and 4": {"model": replace(MODEL, taps=("transformer_blocks.1", "transformer_blocks.3"))},
    "taps: block 2, two kept": {"model": replace(MODEL, blocks=2)},
    "taps: block 6, all kept": {"model": replace(MODEL, blocks=6)},
    "levels: logit-normal": {"noise": NoiseConfig("logit-normal")},
    "levels: uniform in sigma": {"noise": NoiseConfig("uniform-sigma")},
    "levels: beta 1, 3 (cleaner)": {"noise": NoiseConfig("beta", a=1.0, b=3.0)},
    "backbone: random weights": {"pipeline": "random"},
}


@dataclass(frozen=True)
class RewardTrainingBenchmark:
    """Train every variant for as many updates, and compare held-out accuracies.

    Attributes:
        out: the JSON file of results.
        work: folder for data and variants.
        pairs: rendered pairs, of which a fifth of the prompts is held out.
        steps: updates.
        batch_size: pairs per update.
        seed: of everything.
    """

    out: Path = Path("benchmarks/results/reward_training.json")
    work: Path = Path("runs/reward_training")
    pairs: int = 2400
    steps: int = 150
    batch_size: int = 24
    seed: int = 0


def run_reward_training(config: RewardTrainingBenchmark) -> dict[str, Any]:
    """Train what is missing, and return accuracies by variant and noise level; written after each."""
    require_writable(config.out)
    common = RewardConfig(
        data=DataConfig(path=f"shapes:{config.pairs}", held_out_fraction=0.2, cache=config.work / "cache"),
        model=MODEL,
        optimizer=OptimizerConfig(lr=1.5e-3, trunk_lr=5e-4, weight_decay=0.05, schedule="cosine", warmup=15),
        steps=config.steps,
        batch_size=config.batch_size,
        ema_decay=0.97,
        evaluate_every=config.steps,
        save_every=config.steps,
        seed=config.seed,
    )
    result: dict[str, Any] = {"steps": config.steps, "pairs": config.pairs, "seed": config.seed, "variants": {}}
    for index, (label, changed) in enumerate(VARIANTS.items()):
        settings = dict(changed)
        if settings.get("pipeline") == "random":
            settings["pipeline"] = str(random_backbone(config.work / "random"))
        report = train_reward(replace(common, out=config.work / f"{index:02d}", **settings))
        result["held_out_pairs"] = report["data"]["held_out_pairs"]
        result["variants"][label] = {f"{e['sigma']:g}": e["accuracy"] for e in report["levels"]}
        write_json(config.out, result)
    return result


def random_backbone(folder: Path) -> Path:
    """The packaged pipeline with a denoiser that has learned nothing."""
    if not (folder / "model_index.json").exists():
        pipe = DiffusionPipeline.from_pretrained(shapes.model_path())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            pipe.transformer = type(pipe.transformer).from_config(pipe.transformer.config)
        pipe.save_pretrained(folder)
    return folder


def reward_training_table(result: dict[str, Any]) -> str:
    """The comparison as Markdown: accuracies with their binomial standard errors."""
    count = result["held_out_pairs"]

    def cell(accuracy: float) -> str:
        return f"{accuracy:.3f} ± {math.sqrt(accuracy * (1 - accuracy) / count):.3f}"

    head = ["variant", *(f"sigma {level:g}" for level in SHOWN)]
    rows = [[label, *(cell(found[f"{level:g}"]) for level in SHOWN)] for label, found in result["variants"].items()]
    return table(head, rows)


if __name__ == "__main__":
    script(RewardTrainingBenchmark, run_reward_training, reward_training_table)

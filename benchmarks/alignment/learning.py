"""How fast methods learn on the embedded model: rewards of held-out captions against processor seconds.

    python -m benchmarks.alignment.learning --out learning --methods flow-grpo step-grpo --reward shapes-drm --seconds 200

Every run starts from the same model, without classifier-free guidance, and has one thread; what is measured on the way is not
counted.  Runs that are in the folder are not made again; --draw makes the figure of docs/alignment.md of them.
"""

import json
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm import tqdm

from rsm_guidance.io.files import write_atomically, write_json
from rsm_guidance.reward_models import load_backbone
from rsm_guidance.training.alignment.evaluator import Evaluator
from rsm_guidance.training.alignment.read import merge, read_align
from rsm_guidance.training.alignment.trainer import build, optimise, read_prompts
from rsm_guidance.training.data import process_state
from rsm_guidance.training.loop import Metrics

COMMON: dict[str, Any] = {
    "gold": "shapes-correct",
    "prompts_per_epoch": 8,
    "updates_per_epoch": 1,
    "epochs": 10_000,
    "rollout": {"group": 12, "steps": 8, "guidance": 1.0},
    "evaluation": {"count": 96, "images": 2, "every": 3, "steps": 8, "batch": 96},
    "lora": {"rank": 32, "alpha": 64},
    "optimizer": {"lr": 2e-3},
    "ema_decay": 0.9,
    "rollout_batch": 96,
    "micro_batch": 96,
    "save_every": 10_000,
}
"""The same for all: samples (96 an epoch), rate, LoRA."""

SIBLINGS = {"group": 2, "children": [6] * 7}
METHODS: dict[str, dict[str, Any]] = {
    "flow-grpo": {},
    "step-grpo": {"rollout": SIBLINGS},
    "tempflow-grpo": {"rollout": {"group": 1, "children": [6] * 7}},
    "rsm-zeroth": {"rollout": {"group": 1, "children": [6, 6, 8, 10]}},
    "dense-grpo": {"rollout": {"calibrate": 0}},
    "ram": {"form": {"temperature": 0.2, "levels": 4}},
    "diffusion-nft": {"form": {"levels": 4}},
    "awm": {"form": {"levels": 4}},
}
"""What the sizes of this model ask for beside the presets; 84 children of single steps are about 96 samples."""


@dataclass(frozen=True)
class Config:
    """Methods, reward and budget.

    Attributes:
        out: folder.
        methods: presets of `METHODS`.
        reward: what is maximised; the strict verifier is always the gold reward.
        seconds: processor seconds of each run.
        seeds: one run each.
        draw: write this figure of all runs in the folder, and stop.
    """

    out: Path = Path("learning")
    methods: tuple[str, ...] = tuple(METHODS)
    reward: str = "shapes-verifier"
    seconds: float = 200.0
    seeds: tuple[int, ...] = (0, 1, 2)
    draw: Path | None = None


class Clock:
    """Measures at every evaluation what was spent before it, and ends the run with the budget."""

    def __init__(self, evaluator: Evaluator, seconds: float) -> None:
        self._evaluator, self._seconds = evaluator, seconds
        self._begun, self._aside = time.process_time(), 0.0
        self.curve: list[dict[str, float]] = []

    def __call__(self, past: list[Metrics]) -> Metrics:
        now = time.process_time()
        spent = now - self._begun - self._aside
        found = self._evaluator(past)
        self._aside += time.process_time() - now
        self.curve.append({"seconds": spent, "updates": float(self._evaluator.step), **found})
        self._evaluator.stopped = spent > self._seconds
        return found


def run(config: Config, method: str, seed: int) -> dict[str, Any]:
    """The curve of one run."""
    options = merge(COMMON, METHODS[method])
    folder = config.out / config.reward / f"{method}-{seed}"
    options = merge(options, {"rewards": [config.reward], "seed": seed, "out": str(folder)})
    chosen = read_align(name=method, options=options)
    pipe = load_backbone(chosen.pipeline)
    pipe.set_progress_bar_config(disable=True)
    prompts, evaluated = read_prompts(chosen)
    made = build(chosen, pipe, prompts, evaluated, process_state())
    clock = Clock(made.evaluator, config.seconds)
    with closing(made.conditions):
        optimise(made, prompts, clock)
    return {"method": method, "reward": config.reward, "seed": seed, "curve": clock.curve}


def draw(folder: Path, path: Path) -> None:
    """Gold reward against seconds, one panel for each reward that was trained on; means over seeds and their range."""
    import numpy as np
    from matplotlib.figure import Figure

    runs = [json.loads(p.read_text()) for p in sorted(folder.glob("*/*.json"))]
    rewards = sorted({r["reward"] for r in runs})
    figure = Figure(figsize=(5.5 * len(rewards), 3.8), layout="constrained")
    for axis, reward in zip(figure.subplots(1, len(rewards), squeeze=False)[0], rewards, strict=True):
        for method in dict.fromkeys(r["method"] for r in runs if r["reward"] == reward):
            curves = [r["curve"] for r in runs if (r["reward"], r["method"]) == (reward, method)]
            end = min(c[-1]["seconds"] for c in curves)
            at = np.linspace(0, end, 50)
            seen = np.array([np.interp(at, [p["seconds"] for p in c], [p["gold"] for p in c]) for c in curves])
            [line] = axis.plot(at, seen.mean(0), label=f"{method} ({len(curves)})")
            axis.fill_between(at, seen.min(0), seen.max(0), color=line.get_color(), alpha=0.12)
        axis.set(xlabel="processor seconds", ylabel="captions drawn right, held out", title=f"trained on {reward}")
        axis.legend(fontsize=8)
        axis.grid(alpha=0.25)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=130))


def main(config: Config) -> None:
    """Make the runs that are missing."""
    if config.draw is not None:
        draw(config.out, config.draw)
        return
    torch.set_num_threads(1)
    for seed in config.seeds:
        for method in config.methods:
            place = config.out / config.reward / f"{method}-{seed}.json"
            if not place.exists():
                found = run(config, method, seed)
                write_json(place, found)
                last = found["curve"][-1]
                tqdm.write(f"{method} {seed} " + " ".join(f"{name} {value:.3f}" for name, value in last.items()))


if __name__ == "__main__":
    main(tyro.cli(Config))

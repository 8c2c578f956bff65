"""Tiny pipelines in folders, and preferences that they can learn: the redder image is better."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from rsm_guidance.engine.encode import encode_images
from rsm_guidance.reward_models import load_backbone
from rsm_guidance.training.reward_model.collate import PreparedData
from rsm_guidance.training.reward_model.config import DataConfig, ModelConfig, OptimizerConfig, RewardConfig
from rsm_guidance.training.reward_model.objective import PairObjective
from rsm_guidance.training.reward_model.trainer import build_model, build_objective
from tests.zoo import ZOO

COLOURS = ("red", "green", "blue", "grey", "white", "black")


def save_pipeline(name: str, folder: Path) -> Path:
    """A tiny pipeline of a family, as a user has it on disk, with latents of the usual size."""
    pipe = ZOO[name].build()
    with torch.no_grad():
        size = encode_images(pipe, torch.stack([to_tensor(picture(i / 7, i)) for i in range(8)])).std()
    pipe.vae.register_to_config(scaling_factor=float(pipe.vae.config.scaling_factor / size))
    pipe.save_pretrained(folder)
    return folder


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def picture(redness: float, seed: int, size: int = 32) -> Image.Image:
    """Noise over a colour whose red says how good it is."""
    random = np.random.default_rng(seed)
    base = np.array([redness, 1 - redness, 0.4]) * 220
    pixels = base + random.normal(0, 2, (size, size, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_choices(folder: Path, count: int = 24, size: int = 32, ties: int = 0) -> Path:
    """A table `choices.csv` of two images and a label, and the images; the redder one is preferred."""
    (folder / "images").mkdir(parents=True)
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for i in range(count):
        redness = random.permutation([random.uniform(0.0, 0.3), random.uniform(0.7, 1.0)])
        names = [f"images/{i}_{side}.png" for side in (0, 1)]
        for side, name in enumerate(names):
            picture(redness[side], 2 * i + side, size).save(folder / name)
        label = "tie" if i < ties else int(redness[1] > redness[0])
        prompt = f"a {COLOURS[i % len(COLOURS)]} thing, number {i // 2}"
        row = {"prompt": prompt, "image_0": names[0], "image_1": names[1], "label": label}
        row |= {f"rating_{side}": f"{1 + 4 * redness[side]:.2f}" for side in (0, 1)}
        rows.append({**row, "weight": 1 / (1 + i % 3), "source": "ab"[i % 2]})
    with (folder / "choices.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return folder / "choices.csv"


def tiny(pipeline: Path, table: Path, out: Path, **settings: Any) -> RewardConfig:
    """A run of seconds."""
    base: dict[str, Any] = {
        "out": out,
        "pipeline": str(pipeline),
        "data": DataConfig(str(table), side=32, held_out_fraction=0.25),
        "model": ModelConfig(blocks=1, lora_rank=2, head_width=16),
        "optimizer": OptimizerConfig(lr=3e-3, warmup=2),
        "steps": 6,
        "batch_size": 4,
        "evaluate_every": 3,
        "save_every": 3,
        "ema_decay": 0.5,
    }
    return RewardConfig(**base | settings)


def total(module: torch.nn.Module) -> float:
    return sum(p.double().sum().item() for p in module.parameters() if p.requires_grad)


def silent(label: str) -> None:
    return None


def objective_of(config: RewardConfig) -> tuple[PairObjective, PreparedData]:
    drm = build_model(load_backbone(config.pipeline), config)
    data = PreparedData(drm, config, silent)
    return build_objective(drm, data, config), data


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def same_weights(a: Path, b: Path) -> bool:
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)

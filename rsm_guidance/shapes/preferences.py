"""Preferences of the shapes world: a render that its caption describes, and one that misses it in one thing."""

import json
import random
from pathlib import Path

from PIL import Image

from rsm_guidance.io.files import replace_folder
from rsm_guidance.shapes.render import place, render
from rsm_guidance.shapes.scenes import caption_set
from rsm_guidance.shapes.training.hard_negatives import hard_negative

TABLE = "preferences.jsonl"


def write_preferences(folder: Path, pairs: int = 2400, seed: int = 0) -> Path:
    """Render pairs for captions of the training split, and return their table; what is there already is not made again."""
    table = folder / TABLE
    if not table.exists():
        replace_folder(folder, lambda fresh: _write(fresh, pairs, seed))
    return table


def _write(folder: Path, pairs: int, seed: int) -> None:
    captions = caption_set(min(pairs, 7200), seed, held_out=False)
    rng = random.Random(f"preferences|{seed}")
    lines = []
    for number in range(pairs):
        caption = captions[number % len(captions)]
        names = f"{number:06d}_chosen.png", f"{number:06d}_rejected.png"
        for name, spec in zip(names, (caption.spec, hard_negative(caption.spec, rng)), strict=True):
            Image.fromarray(render(place(spec, rng))).save(folder / name, compress_level=1)
        row = {"prompt": caption.text, "chosen": names[0], "rejected": names[1], "category": caption.category}
        lines.append(json.dumps(row))
    (folder / TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")

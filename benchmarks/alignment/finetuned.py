"""Base, guided, fine-tuned, both: captions drawn right by the embedded model and its packaged LoRA, at what cost.

    python -m benchmarks.alignment.finetuned --out benchmarks/results/finetuned.json

Held-out captions at equal seeds, 20 steps; guided runs keep the best of N samples by the packaged reward model.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks import script
from rsm_guidance import RewardGuidedPipeline, shapes
from rsm_guidance.evaluation.report.tables import table
from rsm_guidance.io.files import write_json

ODE, BEST = "none:transition=ode", "best-of-n:candidates={}:transition=cps 0.9"
WAYS: dict[str, tuple[bool, float, str]] = {
    "base, no classifier-free guidance": (False, 1.0, ODE),
    "base": (False, 3.0, ODE),
    "fine-tuned, no classifier-free guidance": (True, 1.0, ODE),
    "fine-tuned": (True, 2.0, ODE),
    "base, best of 2": (False, 3.0, BEST.format(2)),
    "fine-tuned, no classifier-free guidance, best of 4": (True, 1.0, BEST.format(4)),
    "fine-tuned, best of 2": (True, 2.0, BEST.format(2)),
}
"""Whether the LoRA is loaded, the guidance scale, and the sampler."""


@dataclass(frozen=True)
class Config:
    """How much is measured.

    Attributes:
        out: JSON file.
        captions: held-out ones.
        batch: images at once.
    """

    out: Path = Path("finetuned.json")
    captions: int = 512
    batch: int = 64


def run(config: Config) -> dict[str, Any]:
    """Shares of captions drawn right, and NFE."""
    captions = [c.text for c in shapes.caption_set(config.captions, 0)]
    pipes = {lora: RewardGuidedPipeline.from_pretrained(shapes.model_path()) for lora in (False, True)}
    pipes[True].load_lora_weights(shapes.lora_path())
    for pipe in pipes.values():
        pipe.set_progress_bar_config(disable=True)
    found: dict[str, Any] = {}
    for name, (lora, scale, sampler) in WAYS.items():
        right: list[bool] = []
        cost = 0.0
        for start in tqdm(range(0, len(captions), config.batch), name, leave=False):
            part = captions[start : start + config.batch]
            reward = {} if sampler == ODE else {"reward": "shapes-drm"}
            out = pipes[lora](
                prompt=part, guidance_scale=scale, num_inference_steps=20, seed=0, sampler=sampler, **reward
            )
            pairs = zip(out.images, part, strict=True)
            right += [shapes.verify(np.asarray(image.convert("RGB")), caption).correct for image, caption in pairs]
            cost += out.ledger.evaluations
        share = float(np.mean(right))
        error = (share * (1 - share) / len(right)) ** 0.5
        found[name] = {"right": share, "standard_error": error, "nfe": cost / len(captions)}
        write_json(config.out, {"captions": config.captions, "ways": found})
    return {"captions": config.captions, "ways": found}


def shown(result: dict[str, Any]) -> str:
    """The table."""
    rows = [
        [name, f"{w['right']:.3f} ± {w['standard_error']:.3f}", f"{w['nfe']:.0f}"] for name, w in result["ways"].items()
    ]
    return table(["", "captions drawn right", "NFE an image"], rows)


if __name__ == "__main__":
    script(Config, run, shown)

"""Makes docs/guided.png: failures of the unguided model, and the guided samples of the same captions and seed.

python docs/guided.py

The captions are the first held-out ones of the hardest categories; shown are the first that come out wrong without guidance,
whatever guidance makes of them, and beside them what share of all comes out right.
"""

import functools
from pathlib import Path

import numpy as np

from rsm_guidance import StepwiseSampling, Unguided, resolve_reward, shapes
from rsm_guidance.evaluation.generate import Generation, Sample, generate
from rsm_guidance.evaluation.report.pictures import grid
from rsm_guidance.io.files import write_image
from rsm_guidance.pipelines.load import load_pipeline
from rsm_guidance.shapes.scenes import PREFIXES

CATEGORIES = ("two_objects", "counting")  # what the model finds hardest
CAPTIONS, SHOWN = 64, 8


def main() -> None:
    """Draw all captions under both samplers."""
    captions = [c for c in shapes.caption_set(512) if c.category in CATEGORIES][:CAPTIONS]
    pipe = load_pipeline("shapes")
    reward, generation = resolve_reward("shapes-drm", pipe), Generation.for_model("shapes")
    guided = StepwiseSampling(trajectories=2)
    drawn: dict[str, list[Sample]] = {}
    right: dict[str, list[bool]] = {}
    for name, sampler in (("unguided", Unguided(guided.transition)), ("step-wise, same seed", guided)):
        batches = generate(pipe, [c.text for c in captions], sampler, reward, generation)
        drawn[name] = [sample for batch in batches for sample in batch]
        right[name] = [shapes.verify(np.array(s.image), s.prompt).correct for s in drawn[name]]
    failures = [i for i, ok in enumerate(right["unguided"]) if not ok][:SHOWN]
    rows = []
    for name, samples in drawn.items():
        label = f"{name}: {np.mean(right[name]):.0%} of {CAPTIONS} captions right"
        label += ", and here the first that are not" if name == "unguided" else ""
        rows.append([(samples[i].image, label if i == failures[0] else "") for i in failures])
    titles = [functools.reduce(str.removeprefix, PREFIXES, captions[i].text) for i in failures]
    write_image(Path(__file__).with_name("guided.png"), grid(rows, cell=176, title=titles))


if __name__ == "__main__":
    main()

"""Makes docs/guided.png: unguided above guided samples of the embedded model, at one seed, nothing picked by hand.

python docs/guided.py
"""

import functools
from pathlib import Path

import numpy as np

from rsm_guidance import StepwiseSampling, Unguided, resolve_reward, shapes
from rsm_guidance.evaluation.generate import Generation, generate
from rsm_guidance.evaluation.report.pictures import grid
from rsm_guidance.io.files import write_image
from rsm_guidance.pipelines.load import load_pipeline
from rsm_guidance.shapes.scenes import PREFIXES

CATEGORIES = ("two_objects", "counting")  # what the model finds hardest


def main() -> None:
    """The first held-out captions of the hardest categories, in the order of the benchmark's caption set."""
    captions = [c for c in shapes.caption_set(512) if c.category in CATEGORIES][:8]
    pipe = load_pipeline("shapes")
    reward, generation = resolve_reward("shapes-drm", pipe), Generation.for_model("shapes")
    guided = StepwiseSampling(trajectories=2)
    rows = []
    for name, sampler in (("unguided", Unguided(guided.transition)), ("guided", guided)):
        [samples] = generate(pipe, [c.text for c in captions], sampler, reward, generation)
        right = [shapes.verify(np.array(s.image), s.prompt).correct for s in samples]
        rows.append([(s.image, f"{name}: {'right' if ok else 'wrong'}") for s, ok in zip(samples, right, strict=True)])
    titles = [functools.reduce(str.removeprefix, PREFIXES, c.text) for c in captions]
    write_image(Path(__file__).with_name("guided.png"), grid(rows, cell=176, title=titles))


if __name__ == "__main__":
    main()

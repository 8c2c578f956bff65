"""Initial noises near others, with the same law; for searches and Markov chains over them."""

import math

from torch import Tensor

from rsm_guidance.core.random import Name
from rsm_guidance.samplers.task import Task


def neighbours(task: Task, x: Tensor, share: float, *name: Name) -> Tensor:
    """Initial latents [B, ...] that keep a `share` in (-1, 1) of initial latents x [B, ...]; the rest is fresh, by name.

    The fresh noise is (b f1 + c f2) / r of two draws with a + b + c = 1 and a^2 + b^2 + c^2 = 1, a = `share`, so that the
    result has the law of initial latents also where these hold an input image, their mean (ours).
    """
    root = math.sqrt(max((1 - share) * (1 + 3 * share), 0.0))
    streams, rows = task.streams, range(task.count)
    first, second = (  # two draws of the pipeline's own
        task.denoiser.initial([streams.generator(r, *name, which) for r in rows]) for which in ("first", "second")
    )
    mixed: Tensor = share * x + (1 - share + root) / 2 * first + (1 - share - root) / 2 * second
    return mixed

"""Hard negatives for reward models: rendered scenes that miss their caption in one thing."""

import random
from dataclasses import dataclass

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from rsm_guidance.engine import encode_images
from rsm_guidance.shapes.render import place, render
from rsm_guidance.shapes.scenes import COLORS, SHAPES, Caption, Group, SceneSpec
from rsm_guidance.shapes.training.groups import graded
from rsm_guidance.shapes.training.objects import token_labels
from rsm_guidance.shapes.verify import judge


def hard_negative(spec: SceneSpec, rng: random.Random) -> SceneSpec:
    """A specification that differs from `spec` in one thing: a colour, a shape, a count, or the relation turned round."""
    groups = list(spec.groups)
    index = rng.randrange(len(groups))
    g = groups[index]
    change = rng.choice(["shape", "count", "color", "swap"])
    if spec.relation and rng.random() < 0.6:
        return SceneSpec((groups[1], groups[0]), spec.relation)
    if change == "swap" and len(groups) == 2 and groups[0].color and groups[1].color:
        return SceneSpec(
            (
                Group(groups[0].count, groups[1].color, groups[0].shape),
                Group(groups[1].count, groups[0].color, groups[1].shape),
            ),
            spec.relation,
        )
    if change == "color" and g.color:
        groups[index] = Group(g.count, rng.choice([c for c in COLORS if c != g.color]), g.shape)
    elif change == "count" and spec.relation is None:
        count = rng.choice([c for c in (g.count - 1, g.count + 1) if 1 <= c <= 4 and c != g.count])
        groups[index] = Group(count, g.color, g.shape)
    else:
        taken = {x.shape for x in groups}
        groups[index] = Group(g.count, g.color, rng.choice([s for s in SHAPES if s not in taken]))
    return SceneSpec(tuple(groups), spec.relation)


@dataclass
class Renders:
    """Per caption a correct render and M hard negatives.

    Attributes:
        latents: [G, 1 + M, C, H, W], half precision.
        labels: [G, 1 + M, 64, 4], half precision (`training.objects`).
        scores: [G, 1 + M], of the drawn scenes, as those of `BranchGroups`.
    """

    latents: Tensor
    labels: Tensor
    scores: Tensor


@torch.no_grad()
def render_hard_negatives(pipe: DiffusionPipeline, captions: list[Caption], seed: int, count: int = 3) -> Renders:
    """Draw and encode a correct scene and `count` hard negatives for every caption."""
    rng = random.Random(f"hard-negative|{seed}")
    latents, labels, scores = [], [], []
    for start in tqdm(range(0, len(captions), 32), desc="hard negatives"):
        chunk = [c.spec for c in captions[start : start + 32] for _ in range(1 + count)]
        drawn = [spec if n % (1 + count) == 0 else hard_negative(spec, rng) for n, spec in enumerate(chunk)]
        scenes = [place(spec, rng) for spec in drawn]
        scores += [graded(judge(scene, spec)) for scene, spec in zip(scenes, chunk, strict=True)]
        images = torch.from_numpy(np.stack([render(objects) for objects in scenes])).permute(0, 3, 1, 2)
        latents.append(encode_images(pipe, images / 255).half().cpu())
        labels.append(torch.from_numpy(np.stack([token_labels(objects) for objects in scenes])).half())
    parts = (torch.cat(latents), torch.cat(labels), torch.tensor(scores))
    return Renders(*(part.unflatten(0, (len(captions), 1 + count)) for part in parts))

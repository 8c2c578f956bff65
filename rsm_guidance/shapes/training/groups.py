"""Preference data for reward models, from a generator's own samples.

For each prompt one trajectory is run to a random level; there K children are drawn from the one Gaussian of the
transition and each is completed to a clean sample, which a judge scores.  One such *group* serves twice: its finished
samples are the re-noised pairs of the DRM paper, and its noisy children are *sibling* pairs, ordered by what became of
them, the very comparison that Step-wise Sampling makes.  (Sibling pairs are ours.)
"""

import json
import os
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.transitions import Transition
from rsm_guidance.engine import PipelineDenoiser, encode_images
from rsm_guidance.shapes.reward import to_uint8
from rsm_guidance.samplers import Problem
from rsm_guidance.shapes.render import place, render
from rsm_guidance.shapes.scenes import COLORS, SHAPES, Caption, Group, SceneSpec
from rsm_guidance.shapes.verify import judge, see
from rsm_guidance.shapes.training.objects import token_labels


@dataclass(frozen=True)
class GroupConfig:
    """How sibling groups are made.

    Attributes:
        siblings: K children per prompt.
        steps: denoising steps of the trajectories.
        guidance_scale: classifier-free guidance.
        transition: stochastic transition, the one that will be used in sampling.
        batch_size: prompts per batch; all prompts of a batch branch at one level.
        autocast: run the generator in bfloat16 autocast, which is faster on a CPU.
    """

    siblings: int = 4
    steps: int = 12
    guidance_scale: float = 3.0
    transition: Transition = Transition("cps", 0.9)
    batch_size: int = 48
    autocast: bool = True


@dataclass
class Groups:
    """G groups: prompts [G], children and finals [G, K, C, H, W] (half), sigma [G] of the children, scores [G, K].

    Scores are the verifier's credit in [0, 1], plus 0.25 where the image is strictly correct; labels [G, K, 64, 4]
    (half) are what it saw in the finished images (`training.objects`).
    """

    prompts: list[str]
    children: Tensor
    finals: Tensor
    sigma: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the prompts, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "prompts"}

    def every_other(self, first: int) -> "Groups":
        """Every second group, from the first or the second on."""
        return Groups(self.prompts[first::2], **{name: t[first::2] for name, t in self.tensors().items()})


def branch_level(rng: random.Random, steps: int) -> int:
    """Level of the children: 0 (competing initial noises) to about 0.8 N, the noisy ones more often."""
    return min(int(rng.betavariate(1.1, 2.2) * (steps - 1)), steps - 2)


@torch.no_grad()
def sample_groups(
    pipe: DiffusionPipeline, captions: list[Caption], config: GroupConfig, level: int, seed: int
) -> Groups:
    """Branch one trajectory per caption into siblings at `level` and complete them."""
    prompts = [c.text for c in captions]
    k, b = config.siblings, len(prompts)
    call = {"prompt": prompts, "num_inference_steps": config.steps, "guidance_scale": config.guidance_scale}
    streams = RandomStreams.for_prompts(seed, prompts)
    denoiser = PipelineDenoiser(pipe, call | {"generator": [streams.generator(r, "initial", 0) for r in range(b)]})
    problem = Problem(denoiser, streams)
    schedule = denoiser.schedule
    if level == 0:
        children = torch.stack([problem.initial(c) for c in range(k)], 1)
    else:
        x = denoiser.initial()
        for i in range(level):
            gaussian = config.transition(denoiser.predict(x, i), schedule, i, i + 1)
            if i < level - 1:
                x = problem.step(gaussian, i, [0])
        children = torch.stack([problem.step(gaussian, level - 1, [0], child=c) for c in range(k)], 1)
    x = children.transpose(0, 1).flatten(0, 1)  # candidate-major
    rows = torch.arange(b).repeat(k)
    for i in range(level, schedule.steps):
        gaussian = config.transition(denoiser.predict(x, i, rows), schedule, i, i + 1)
        x = problem.step(gaussian, i, list(range(k)))
    finals = x.unflatten(0, (k, b)).transpose(0, 1)
    images = to_uint8(denoiser.decode(finals.flatten(0, 1))).numpy()
    denoiser.close()
    seen = [see(image) for image in images]
    verdicts = [judge(objects, captions[n // k].spec) for n, objects in enumerate(seen)]
    scores = torch.tensor([v.score + 0.25 * v.correct for v in verdicts]).view(b, k)
    labels = torch.from_numpy(np.stack([token_labels(objects) for objects in seen])).half().unflatten(0, (b, k))
    sigma = torch.full((b,), float(schedule.sigma[level]))
    return Groups(prompts, children.half(), finals.half(), sigma, scores, labels)


def generate_groups(
    pipe: DiffusionPipeline, captions: list[Caption], config: GroupConfig, folder: Path, seed: int, label: str
) -> Groups:
    """Groups for all captions, written batch by batch under `folder`; what is there already is not made again.

    Raises:
        ValueError: if the folder holds groups made with other captions or settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = sum(
        p.detach().double().abs().sum().item() for p in pipe.transformer.parameters()
    )  # tells generators apart
    about = {"captions": [c.text for c in captions], "seed": seed, "groups": asdict(config), "weights": weights}
    settings = json.dumps(about)
    description = folder / "settings.json"
    if not description.exists():
        description.write_text(settings)
    elif description.read_text() != settings:
        raise ValueError(f"{folder} holds samples made with other settings; name another data folder or delete it")
    parts = []
    starts = range(0, len(captions), config.batch_size)
    for start in tqdm(starts, desc=label):
        path = folder / f"{start:06d}.safetensors"
        batch = captions[start : start + config.batch_size]
        if not path.exists():
            level = branch_level(random.Random(f"{seed}|{start}"), config.steps)
            with torch.autocast(pipe.device.type, torch.bfloat16, enabled=config.autocast):
                g = sample_groups(pipe, batch, config, level, seed)
            partial = path.with_suffix(".partial")
            save_file({k: v.contiguous() for k, v in g.tensors().items()}, partial)
            os.replace(partial, path)
        parts.append(Groups([c.text for c in batch], **load_file(path)))
    return join(parts)


def join(parts: list[Groups]) -> Groups:
    """Concatenate groups."""
    names = parts[0].tensors()
    return Groups(
        [p for g in parts for p in g.prompts], **{n: torch.cat([g.tensors()[n] for g in parts]) for n in names}
    )


# --- rendered near misses ---


def near_miss(spec: SceneSpec, rng: random.Random) -> SceneSpec:
    """A demand that differs from `spec` in one thing: a colour, a shape, a count, or the relation turned round."""
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
    """Per caption a correct render and M near misses: latents [G, 1 + M, C, H, W] (half), labels [G, 1 + M, 64, 4]."""

    latents: Tensor
    labels: Tensor


@torch.no_grad()
def render_near_misses(pipe: DiffusionPipeline, captions: list[Caption], seed: int, misses: int = 3) -> Renders:
    """Draw and encode a correct scene and `misses` near misses for every caption."""
    rng = random.Random(f"near-miss|{seed}")
    latents, labels = [], []
    for start in tqdm(range(0, len(captions), 32), desc="near misses"):
        specs = [
            s for c in captions[start : start + 32] for s in (c.spec, *(near_miss(c.spec, rng) for _ in range(misses)))
        ]
        scenes = [place(spec, rng) for spec in specs]
        images = torch.from_numpy(np.stack([render(objects) for objects in scenes])).permute(0, 3, 1, 2)
        latents.append(encode_images(pipe, images / 255).half().cpu())
        labels.append(torch.from_numpy(np.stack([token_labels(objects) for objects in scenes])).half())
    return Renders(*(torch.cat(t).unflatten(0, (len(captions), 1 + misses)) for t in (latents, labels)))


def batches(count: int, size: int, steps: int, first: int, seed: int) -> Iterator[Tensor]:
    """Index batches of `size` out of `count` for steps first..steps-1, epoch by epoch without replacement."""
    per_epoch = max(1, count // size)
    for step in range(first, steps):
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed * 7919 + epoch))
        yield order[position * size : (position + 1) * size]

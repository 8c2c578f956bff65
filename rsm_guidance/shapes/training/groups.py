"""Preference data for reward models, from a generator's own samples.

For each prompt one trajectory is run to a random level; there K children are drawn from the one Gaussian of the
transition, and each is completed to a clean sample that the verifier scores.  Such a *branch group* serves three times: its
finished samples are the re-noised pairs of the DRM paper; its noisy children, ordered by what became of them, are
*sibling* pairs, the very comparison that step-wise sampling makes; and every latent on the way is an example of what
becomes of such latents.  (The latter two are ours.)
"""

import random
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from tqdm.auto import tqdm

from rsm_guidance.core.random import RandomStreams
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.io.files import read_json, read_tensors, write_json, write_tensors
from rsm_guidance.io.fingerprint import fingerprint
from rsm_guidance.rollouts.collect import collect, initial_generators
from rsm_guidance.shapes.reward import to_uint8
from rsm_guidance.shapes.scenes import Caption
from rsm_guidance.shapes.training.config import GroupConfig
from rsm_guidance.shapes.training.objects import token_labels
from rsm_guidance.shapes.verify import Verdict, judge, see

_CORRECT_BONUS = 0.25  # of a strictly correct image, above the graded score


@dataclass
class BranchGroups:
    """G groups of K noisy children each, and what became of them.

    Attributes:
        prompts: [G].
        paths: [G, K, N, C, H, W], half precision, the latents of each trajectory at levels 0 to N - 1; up to its branching
            those of a group are the same.
        finals: [G, K, C, H, W], half precision, clean.
        sigmas: [G, N], the noise levels of `paths`.
        branched: [G], the level of the children.
        scores: [G, K], the verifier's in [0, 1], plus 0.25 where the image is strictly correct.
        labels: [G, K, 64, 4], half precision, what it saw in the finished images (`training.objects`).
    """

    prompts: list[str]
    paths: Tensor
    finals: Tensor
    sigmas: Tensor
    branched: Tensor
    scores: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def sigma(self) -> Tensor:
        """Noise level [G] of the children."""
        return self.sigmas[torch.arange(len(self)), self.branched]

    def children(self, rows: Tensor) -> Tensor:
        """The children [R, K, C, H, W] of groups rows [R]."""
        return self.paths[rows, :, self.branched[rows]]

    def outcomes(self, rows: Tensor, levels: Tensor, completions: int | None = None) -> Tensor:
        """What became [R, K] of latents of `paths` at levels [R]: the score, before the branching the mean of the group's.

        That mean is of the first `completions`, by default of all.
        """
        scores = self.scores[rows]
        shared = (levels < self.branched[rows])[:, None]
        return torch.where(shared, scores[:, :completions].mean(1, keepdim=True), scores)

    def tensors(self) -> dict[str, Tensor]:
        """Everything but the prompts, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "prompts"}

    def every_other(self, first: int) -> "BranchGroups":
        """Every second group, from the first or the second on."""
        return BranchGroups(self.prompts[first::2], **{name: t[first::2] for name, t in self.tensors().items()})


def graded(verdict: Verdict) -> float:
    """The verifier's score, and 0.25 more where all is right."""
    return verdict.score + _CORRECT_BONUS * verdict.correct


def branch_level(rng: random.Random, steps: int) -> int:
    """Level of the children: 0 (competing initial noises) to about 0.8 N, the noisy ones more often."""
    return min(int(rng.betavariate(1.1, 2.2) * (steps - 1)), steps - 2)


@torch.no_grad()
def sample_groups(
    pipe: DiffusionPipeline, captions: list[Caption], config: GroupConfig, level: int, seed: int
) -> BranchGroups:
    """Branch one trajectory per caption at `level`, complete the children, and score them."""
    prompts = [c.text for c in captions]
    streams = RandomStreams.for_prompts(seed, prompts)
    call = {
        "prompt": prompts,
        "num_inference_steps": config.steps,
        "guidance_scale": config.guidance_scale,
        "generator": initial_generators(streams, 0),
    }
    with closing(PipelineDenoiser(pipe, call)) as denoiser:
        paths, finals = _completed(denoiser, streams, config, level)
        rows = torch.arange(len(prompts)).repeat_interleave(config.siblings)
        images = to_uint8(denoiser.decode(finals.flatten(0, 1), rows)).numpy()
        sigmas = torch.as_tensor(denoiser.schedule.sigma[:-1]).float().expand(len(prompts), -1).clone()
    shape = (len(prompts), config.siblings)
    seen = [see(image) for image in images]
    verdicts = [judge(objects, captions[n // config.siblings].spec) for n, objects in enumerate(seen)]
    scores = torch.tensor([graded(v) for v in verdicts]).view(shape)
    labels = torch.from_numpy(np.stack([token_labels(objects) for objects in seen])).half().unflatten(0, shape)
    branched = torch.full((len(prompts),), level)
    return BranchGroups(prompts, paths.half().cpu(), finals.half().cpu(), sigmas, branched, scores, labels)


def _completed(
    denoiser: PipelineDenoiser, streams: RandomStreams, config: GroupConfig, level: int
) -> tuple[Tensor, Tensor]:
    """Trajectories [B, K, N, ...] that part at `level` (at 0 they are K initial noises), and the clean latents they end in."""
    k = config.siblings
    apart = {"group": k} if level == 0 else {"splits": {level - 1: k}}
    rollout = collect(denoiser, streams, config.gaussian, **apart)  # type: ignore[arg-type]
    path = torch.stack([step.x[place] for step, place in zip(rollout.steps, rollout.lineage(), strict=True)], 1)
    return path.unflatten(0, (-1, k)), rollout.latents.unflatten(0, (-1, k))


def generate_groups(
    pipe: DiffusionPipeline, captions: list[Caption], config: GroupConfig, folder: Path, seed: int, label: str
) -> BranchGroups:
    """Groups for all captions, written batch by batch under `folder`; what is there already is not made again.

    Raises:
        ValueError: if the folder holds groups made with another generator, other captions or other settings.
    """
    _require_settings(
        folder / "settings.json",
        {
            "captions": [c.text for c in captions],
            "seed": seed,
            "groups": asdict(config),
            "generator": fingerprint(pipe.transformer),
        },
    )
    parts = []
    for start in tqdm(range(0, len(captions), config.batch_size), desc=label):
        path = folder / f"{start:06d}.safetensors"
        batch = captions[start : start + config.batch_size]
        if not path.exists():
            level = branch_level(random.Random(f"{seed}|{start}"), config.steps)
            with torch.autocast(pipe.device.type, torch.bfloat16, enabled=config.autocast):
                write_tensors(path, sample_groups(pipe, batch, config, level, seed).tensors())
        parts.append(BranchGroups([c.text for c in batch], **read_tensors(path)))
    return join(parts)


def _require_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings of a data folder, or require those that are written there."""
    if not path.exists():
        write_json(path, settings)
    elif read_json(path) != settings:
        raise ValueError(f"{path.parent} holds samples made with other settings; name another data folder or delete it")


def join(parts: list[BranchGroups]) -> BranchGroups:
    """Concatenate groups."""
    names = parts[0].tensors()
    return BranchGroups(
        [p for g in parts for p in g.prompts], **{n: torch.cat([g.tensors()[n] for g in parts]) for n in names}
    )

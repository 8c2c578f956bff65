"""Loading a pipeline and making images for many prompts under one sampler."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from rsm_guidance.core.contracts import Reward
from rsm_guidance.core.ledger import Budget
from rsm_guidance.core.random import RandomStreams, derive_seed
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.evaluation.fitting import Costs
from rsm_guidance.pipelines import RewardGuidedPipeline
from rsm_guidance.rewards import judged, name_of
from rsm_guidance.samplers import Problem, Sampler
from rsm_guidance.shapes.model import GUIDANCE_SCALE, STEPS, model_path
from rsm_guidance.values import DiffusionRewardModel, Judge


@dataclass(frozen=True)
class Generation:
    """Arguments of the pipeline call; None leaves the pipeline's own default."""

    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None

    def call(self) -> dict[str, Any]:
        """Keyword arguments of the stock call."""
        given = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
        }
        return {k: v for k, v in given.items() if v is not None}

    @staticmethod
    def for_model(model: str, steps: int | None = None, guidance_scale: float | None = None) -> "Generation":
        """The embedded model's measured settings where the caller gives none; other models keep their defaults."""
        if steps is not None and steps < 1:
            raise ValueError(f"--steps must be at least 1; got {steps}")
        if model == model_path():
            return Generation(steps or STEPS, GUIDANCE_SCALE if guidance_scale is None else guidance_scale)
        return Generation(steps, guidance_scale)


def load_pipeline(model: str, dtype: str = "float32") -> DiffusionPipeline:
    """The reward-guided pipeline of a hub id or folder, on the accelerator if there is one.

    Raises:
        ValueError: if there is no such model, or its pipeline cannot be guided.
    """
    try:
        pipe = RewardGuidedPipeline.from_pretrained(model, dtype=getattr(torch, dtype))
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"cannot load a pipeline from {model!r}: {str(error).strip().splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Sample:
    """One finished image, the place of its prompt, and what it cost (its share of its batch)."""

    index: int
    prompt: str
    image: Image.Image
    reward: float | None
    evaluations: float
    seconds: float
    trace: dict[str, Any]


def generate(
    pipe: DiffusionPipeline,
    prompts: list[str],
    sampler: Sampler,
    judge: Judge | None,
    generation: Generation,
    seed: int = 0,
    batch_size: int = 16,
    budget: Budget | None = None,
    copies: list[int] | None = None,
) -> Iterator[list[Sample]]:
    """Images for prompts, batch by batch.  Batching changes no image: random numbers are named by prompt.

    `copies` numbers the repetitions of each prompt, by default within `prompts` (see `copies_of`).

    Raises:
        KeyboardInterrupt: on Ctrl-C; what was cut short is not yielded.
    """
    rounds: dict[int, list[int]] = {}  # repeated prompts go into rounds of their own, with seeds of their own
    for index, copy in enumerate(copies_of(prompts) if copies is None else copies):
        rounds.setdefault(copy, []).append(index)
    for copy, indices in rounds.items():
        named = seed if copy == 0 else derive_seed(seed, "copy", copy)
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            batch = [prompts[i] for i in chosen]
            began = time.perf_counter()
            out = pipe(prompt=batch, sampler=sampler, reward=judge, seed=named, budget=budget, **generation.call())
            if out.ledger.stopped == "interrupted":
                raise KeyboardInterrupt
            seconds = (time.perf_counter() - began) / len(batch)
            cost = out.ledger.evaluations / len(batch)
            rewards = out.rewards or [None] * len(batch)
            yield [
                Sample(i, p, image, r, cost, seconds, out.trace)
                for i, p, image, r in zip(chosen, batch, out.images, rewards, strict=True)
            ]


@contextmanager
def watched(
    pipe: DiffusionPipeline,
    prompts: list[str],
    generation: Generation,
    reward: Reward,
    seed: int = 0,
    autocast: bool = False,
) -> Iterator[tuple[Problem, PipelineDenoiser]]:
    """The problem that a call for these prompts poses, and its denoiser, to follow runs from within; without gradients."""
    streams = RandomStreams.for_prompts(seed, prompts)
    generators = [streams.generator(row, "initial", 0) for row in range(len(prompts))]
    with (
        torch.no_grad(),
        torch.autocast(pipe.device.type, torch.bfloat16, enabled=autocast),
        closing(PipelineDenoiser(pipe, {"prompt": prompts, **generation.call(), "generator": generators})) as denoiser,
    ):
        yield Problem(denoiser, streams, denoiser.ledger, reward), denoiser


def copies_of(prompts: list[str]) -> list[int]:
    """How often each prompt has come before: 0, 0, 1, ... for a, b, a, ..."""
    seen: dict[str, int] = {}
    result = []
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, -1) + 1
        result.append(seen[prompt])
    return result


def value_share(judge: Judge | None) -> float:
    """Cost of judging one latent, in denoiser evaluations."""
    return judge.depth_share if isinstance(judge, DiffusionRewardModel) else 0.0


def costs_of(pipe: DiffusionPipeline, generation: Generation, judge: Judge | None) -> Costs:
    """What a call consists of, for `fitting`: its levels and what denoising and judging cost, without running it."""
    with torch.no_grad(), closing(PipelineDenoiser(pipe, {"prompt": "-", **generation.call()})) as denoiser:
        share = value_share(judge) if isinstance(judge, DiffusionRewardModel) else None
        return Costs(denoiser.schedule, denoiser.evaluations_per_row, share, share or 0.0)


def scores_of(judge: Judge, images: Tensor, prompts: list[str]) -> list[float]:
    """Checked scores of finished images [B, 3, H, W] in [0, 1]."""
    score = judge.score_images if isinstance(judge, DiffusionRewardModel) else judge
    with torch.no_grad():
        scores: list[float] = judged(lambda: score(images, prompts), len(images), name_of(judge)).tolist()
    return scores


def fingerprint(module: torch.nn.Module) -> str:
    """A short hash of a module's weights, by which results name what they were made with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

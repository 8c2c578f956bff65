"""Loading a pipeline and making images for many prompts under one sampler."""

import hashlib
import math
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors import SafetensorError

from rsm_guidance.core.ledger import Budget
from rsm_guidance.core.random import derive_seed
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.pipelines import reward_guided
from rsm_guidance.samplers import BestOfN, Sampler, StepwiseSampling
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
    if not Path(model).is_dir() and not (model.count("/") == 1 and model[0] not in "./~"):
        raise ValueError(
            f"cannot load a pipeline from {model!r}: there is no such folder, and it is no hub id (org/name)"
        )
    try:
        config = DiffusionPipeline.load_config(model)
        name = config["_class_name"]
        base = getattr(diffusers, name if isinstance(name, str) else name[-1], None)
        if base is None:
            raise ValueError(f"{model} is a {name}, which diffusers does not export; load it in Python instead")
        pipe = reward_guided(base).from_pretrained(model, dtype=getattr(torch, dtype))
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
) -> Iterator[list[Sample]]:
    """Images for prompts, batch by batch.  Batching changes no image: random numbers are named by prompt.

    Raises:
        KeyboardInterrupt: on Ctrl-C; what was cut short is not yielded.
    """
    first: list[int] = []
    again: dict[int, list[int]] = {}
    seen: dict[str, int] = {}
    for index, prompt in enumerate(prompts):  # repeated prompts go into rounds of their own, with seeds of their own
        copy = seen[prompt] = seen.get(prompt, -1) + 1
        (first if copy == 0 else again.setdefault(copy, [])).append(index)
    for copy, indices in [(0, first), *again.items()]:
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


def value_share(judge: Judge | None) -> float:
    """Cost of judging one latent, in denoiser evaluations."""
    return judge.depth_share if isinstance(judge, DiffusionRewardModel) else 0.0


def fit_to_budget(
    sampler: Sampler, budget: float, schedule: NoiseSchedule, per_level: float, judge: Judge | None
) -> Sampler:
    """The sampler with as many candidates as `budget` denoiser evaluations per image pay for.

    Args:
        sampler: best-of-n or stepwise are fitted; others are returned as they are.
        budget: denoiser evaluations per image, value evaluations counted by their share.
        schedule: the levels of a run.
        per_level: denoiser evaluations per level (2 with CFG).
        judge: what guides; a plain function judges noisy latents after another denoiser evaluation.

    Raises:
        ValueError: if the budget does not pay for one image.
    """
    is_model = isinstance(judge, DiffusionRewardModel)
    once = schedule.steps * per_level + value_share(judge)
    if budget < once - 1e-6:
        raise ValueError(f"a budget of {budget:g} denoiser evaluations is less than the {once:g} of one image")
    if isinstance(sampler, BestOfN):
        return replace(sampler, candidates=math.floor(budget / once + 1e-9))
    if isinstance(sampler, StepwiseSampling):
        share = value_share(judge) if is_model else per_level
        compared = sum(sampler.competes(schedule, level) for level in range(schedule.steps))
        start = sampler.initial_candidates * share if sampler.initial_candidates > 1 else 0.0
        left = budget / sampler.trajectories - once - start
        return replace(sampler, candidates=max(1, math.floor(left / (compared * share) + 1e-9)))
    return sampler


def levels_of(pipe: DiffusionPipeline, generation: Generation) -> tuple[NoiseSchedule, float]:
    """The schedule of a call and its denoiser evaluations per level, without running it."""
    with torch.no_grad(), closing(PipelineDenoiser(pipe, {"prompt": "-", **generation.call()})) as denoiser:
        return denoiser.schedule, denoiser.evaluations_per_row


def fingerprint(module: torch.nn.Module) -> str:
    """A short hash of a module's weights, by which results name what they were made with."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]

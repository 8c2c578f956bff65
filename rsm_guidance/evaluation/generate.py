"""Loading a pipeline and making images for many prompts under one sampler."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from PIL import Image

from rsm_guidance.core.ledger import Budget
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
        if model == model_path():
            return Generation(steps or STEPS, GUIDANCE_SCALE if guidance_scale is None else guidance_scale)
        return Generation(steps, guidance_scale)


def load_pipeline(model: str, dtype: str = "float32") -> DiffusionPipeline:
    """The reward-guided pipeline of a hub id or folder, on the accelerator if there is one.

    Raises:
        ValueError: if there is no such model, or its pipeline cannot be guided.
    """
    if not Path(model).is_dir() and not (model.count("/") == 1 and model[0] not in "./~"):
        raise ValueError(f"cannot load a pipeline from {model!r}: there is no such folder, and it is no hub id (org/name)")
    try:
        config = DiffusionPipeline.load_config(model)
        name = config["_class_name"]
        base = getattr(diffusers, name if isinstance(name, str) else name[-1], None)
        if base is None:
            raise ValueError(f"{model} is a {name}, which diffusers does not export; load it in Python instead")
        pipe = reward_guided(base).from_pretrained(model, dtype=getattr(torch, dtype))
    except OSError as error:
        raise ValueError(f"cannot load a pipeline from {model!r}: {str(error).splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Sample:
    """One finished image with what it cost; `evaluations` and `seconds` are its share of its batch."""

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
    """Images for prompts, batch by batch.  Batching changes no image: random numbers are named by prompt."""
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        began = time.perf_counter()
        out = pipe(prompt=batch, sampler=sampler, reward=judge, seed=seed, budget=budget, **generation.call())
        seconds = (time.perf_counter() - began) / len(batch)
        cost = out.ledger.evaluations / len(batch)
        rewards = out.rewards or [None] * len(batch)
        yield [
            Sample(p, image, r, cost, seconds, out.trace)
            for p, image, r in zip(batch, out.images, rewards, strict=True)
        ]


def value_share(judge: Judge | None) -> float:
    """Cost of judging one latent, in denoiser evaluations."""
    return judge.depth_share if isinstance(judge, DiffusionRewardModel) else 0.0


def fit_to_budget(sampler: Sampler, budget: float, steps: int, per_level: float, share: float) -> Sampler:
    """The sampler with as many candidates as `budget` denoiser evaluations per image pay for.

    Args:
        sampler: best-of-n or stepwise are fitted; others are returned as they are.
        budget: denoiser evaluations per image, value evaluations counted by their share.
        steps: levels of a run.
        per_level: denoiser evaluations per level (2 with CFG).
        share: cost of one value evaluation.
    """
    once = steps * per_level + share
    if budget < once - 1e-6:
        raise ValueError(f"a budget of {budget:g} denoiser evaluations is less than the {once:g} of one image")
    if isinstance(sampler, BestOfN):
        return replace(sampler, candidates=math.floor(budget / once + 1e-9))
    if isinstance(sampler, StepwiseSampling) and share > 0:
        compared = steps - 1  # the last transition is deterministic
        return replace(sampler, candidates=max(1, math.floor((budget - once) / (compared * share) + 1e-9)))
    return sampler

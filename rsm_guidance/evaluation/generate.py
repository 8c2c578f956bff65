"""Making images for many prompts under one sampler."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from rsm_guidance.core.contracts import Reward
from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.ledger import Budget
from rsm_guidance.core.random import Purpose, RandomStreams, derive_seed
from rsm_guidance.data.prompts import chosen
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.io.fingerprint import fingerprint
from rsm_guidance.io.names import packaged_model
from rsm_guidance.pipelines.load import load_pipeline
from rsm_guidance.rewards import check_rows, scored
from rsm_guidance.samplers import Sampler, Task
from rsm_guidance.samplers.planning import Costs
from rsm_guidance.values import resolve_value

__all__ = [
    "Generation",
    "Sample",
    "copies_of",
    "costs_of",
    "fingerprint",
    "generate",
    "load_pipeline",
    "pixels_of",
    "scores_of",
    "task_of",
]


_LARGEST = 100_000  # steps, pixels along a side, frames


@dataclass(frozen=True)
class Generation:
    """Arguments of the pipeline call; None leaves the pipeline's own default."""

    steps: int | None = None
    guidance_scale: float | None = None
    height: int | None = None
    width: int | None = None
    frames: int | None = None
    negative_prompt: str | None = None

    def call(self) -> dict[str, Any]:
        """Keyword arguments of the stock call."""
        given = {
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "height": self.height,
            "width": self.width,
            "num_frames": self.frames,
            "negative_prompt": self.negative_prompt,
        }
        return {k: v for k, v in given.items() if v is not None}

    @staticmethod
    def for_model(
        model: str, steps: int | None = None, guidance_scale: float | None = None, **others: Any
    ) -> "Generation":
        """A packaged model's measured settings where the caller gives none; other models keep their defaults.

        Args:
            model: name or folder of a packaged model, or any other folder or hub id.
            steps: denoising steps.
            guidance_scale: of classifier-free guidance.
            others: fields besides.

        Raises:
            UsageError: for a size below one.
        """
        for name, size in {"steps": steps, **others}.items():
            if isinstance(size, int) and not 1 <= size <= _LARGEST:
                raise UsageError(f"--{name} must be at least 1 and at most {_LARGEST}; got {size}")
        if guidance_scale is not None and not math.isfinite(guidance_scale):
            raise UsageError(f"--guidance-scale must be a finite number; got {guidance_scale}")
        packaged = packaged_model(model)
        measured = {} if packaged is None else packaged.call
        return Generation(
            measured.get("num_inference_steps") if steps is None else steps,
            measured.get("guidance_scale") if guidance_scale is None else guidance_scale,
            **others,
        )


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
    reward: Reward | None,
    generation: Generation,
    seed: int = 0,
    batch_size: int = 16,
    budget: Budget | None = None,
    copies: list[int] | None = None,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> Iterator[list[Sample]]:
    """Images for prompts, batch by batch.  Batching changes no image: random numbers are named by prompt.

    `copies` numbers the repetitions of each prompt, by default within `prompts` (see `copies_of`); `columns` are what rewards
    read besides, with an entry for each prompt.

    Raises:
        KeyboardInterrupt: on Ctrl-C; what was cut short is not yielded.
    """
    rounds: dict[int, list[int]] = {}  # repeated prompts go into rounds of their own, with seeds of their own
    for index, copy in enumerate(copies_of(prompts) if copies is None else copies):
        rounds.setdefault(copy, []).append(index)
    for copy, indices in rounds.items():
        named = seed if copy == 0 else derive_seed(seed, "copy", copy)
        for start in range(0, len(indices), batch_size):
            places = indices[start : start + batch_size]
            batch = [prompts[i] for i in places]
            began = time.perf_counter()
            call = generation.call()
            if isinstance(call.get("negative_prompt"), str):
                call["negative_prompt"] = [call["negative_prompt"]] * len(batch)
            told = chosen(columns or {}, places)
            out = pipe(
                prompt=batch, sampler=sampler, reward=reward, seed=named, budget=budget, reward_columns=told, **call
            )
            if out.ledger.stopped == "interrupted":
                raise KeyboardInterrupt
            seconds = (time.perf_counter() - began) / len(batch)
            cost = out.ledger.evaluations / len(batch)
            rewards = out.rewards or [None] * len(batch)
            yield [
                Sample(i, p, image, r, cost, seconds, out.trace)
                for i, p, image, r in zip(places, batch, out.images, rewards, strict=True)
            ]


@contextmanager
def task_of(
    pipe: DiffusionPipeline,
    prompts: list[str],
    generation: Generation,
    reward: Reward | None,
    seed: int = 0,
    autocast: bool = False,
    columns: Mapping[str, Sequence[Any]] | None = None,
) -> Iterator[Task]:
    """The task of a guided call for these prompts, to follow its runs from within; without gradients.

    A reward that has a value of noisy latents scores these alone, as in the call; any other scores decoded estimates.
    """
    streams = RandomStreams.for_prompts(seed, prompts)
    generators = [streams.generator(row, Purpose.INITIAL, 0) for row in range(len(prompts))]
    call = {"prompt": prompts, **generation.call(), "generator": generators}
    own = None if reward is None or hasattr(reward, "value") else reward
    value = None if reward is None else resolve_value(reward, pipe)
    with (
        torch.no_grad(),
        torch.autocast(pipe.device.type, torch.bfloat16, enabled=autocast),
        closing(PipelineDenoiser(pipe, call)) as denoiser,
    ):
        yield Task(denoiser, streams, reward=own, value=value, columns=columns or {})


def copies_of(prompts: list[str]) -> list[int]:
    """How often each prompt has come before: 0, 0, 1, ... for a, b, a, ..."""
    seen: dict[str, int] = {}
    result = []
    for prompt in prompts:
        seen[prompt] = seen.get(prompt, -1) + 1
        result.append(seen[prompt])
    return result


def costs_of(
    pipe: DiffusionPipeline,
    generation: Generation,
    reward: Reward | None,
    prompt: str = "-",
    columns: Mapping[str, Any] | None = None,
) -> Costs:
    """What a call consists of, for `samplers.planning`: its levels, and the NFE of denoising and scoring, without running it.

    The prompt and its entries of columns are of no matter for the costs, but the reward must be able to read them.
    """
    told = {name: [value] for name, value in (columns or {}).items()}
    with task_of(pipe, [prompt], generation, reward, columns=told) as task:
        return Costs.of(task)


def pixels_of(images: list[Image.Image]) -> Tensor:
    """Images of one size as [B, 3, H, W] in [0, 1]."""
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 255


def scores_of(
    reward: Reward, images: Tensor, prompts: list[str], columns: Mapping[str, Sequence[Any]] | None = None
) -> list[float]:
    """Checked scores of finished images [B, 3, H, W] in [0, 1]; columns with B entries each, as the reward requires them."""
    check_rows(reward, prompts, columns or {})
    own = {name: list((columns or {})[name]) for name in reward.requires}
    with torch.no_grad():
        scores: list[float] = scored(lambda: reward(images, prompts, **own), len(images), reward.name).tolist()
    return scores

"""Scores of samples by the rewards of a training: one column a reward."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from rsm_guidance.core.contracts import Reward
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.engine.families import denoisers_of
from rsm_guidance.engine.replayed import ReplayedDenoiser
from rsm_guidance.rewards import RowReward, check_rows, resolve_reward, scored
from rsm_guidance.rewards.compose import Composite
from rsm_guidance.values import resolve_value

_DECODED = 64  # images that are decoded and scored at once


@dataclass(frozen=True)
class Judge:
    """Rewards of images and of noisy latents.

    Attributes:
        pipe: the pipeline whose samples are judged.
        rewards: one column of scores each.
        batch: images that a reward scores at once; None for as many as are decoded.
        value: of noisy latents, as `values.resolve_value` takes it; None for the rewards themselves, of which those of images
            judge the image of Tweedie's estimate.
    """

    pipe: DiffusionPipeline
    rewards: tuple[Reward, ...]
    batch: int | None = None
    value: Any = None

    def check(self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
        """Raise a UsageError for prompts and columns that a reward cannot score."""
        for reward in self.rewards:
            check_rows(reward, prompts, columns)

    @torch.no_grad()
    def finals(
        self, denoiser: ReplayedDenoiser, latents: Tensor, rows: Tensor, columns: Mapping[str, Sequence[Any]]
    ) -> Tensor:
        """Scores [R, M] of clean latents of rows [R]; diffusion reward models judge them without decoding."""
        found = [torch.zeros(0)] * len(self.rewards)
        of_images = []
        for place, reward in enumerate(self.rewards):
            if shares_latents(reward, self.pipe):
                value = resolve_value(reward).value(denoiser, None, NO_STREAMS)
                found[place] = scored(partial(value, latents, denoiser.steps, rows), len(latents), reward.name)
            else:
                of_images.append(place)
        if of_images:
            table = self._images(denoiser, latents, rows, columns, [self.rewards[i] for i in of_images])
            for place, scores in zip(of_images, table, strict=True):
                found[place] = scores
        return torch.stack(found, 1)

    def images(self, images: Tensor, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> Tensor:
        """Scores [R, M] of images [R, 3, H, W] in [0, 1], one of each prompt."""
        rows = torch.arange(len(images))
        return torch.stack([self._scores(r, images, rows, prompts, columns) for r in self.rewards], 1)

    @torch.no_grad()
    def states(
        self,
        denoiser: ReplayedDenoiser,
        streams: RandomStreams,
        x: Tensor,
        level: int,
        rows: Tensor,
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        """Scores [R, M] of noisy latents at their own level; [R, 1] by a `value` of its own."""
        found = []
        for reward in self.rewards[:1] if self.value is not None else self.rewards:
            own = self.value or (reward if shares_latents(reward, self.pipe) else "tweedie")
            value = resolve_value(own, self.pipe).value(denoiser, RowReward(reward, denoiser.prompts, columns), streams)
            found.append(scored(partial(value, x, level, rows), len(x), reward.name))
        return torch.stack(found, 1)

    def _images(
        self,
        denoiser: ReplayedDenoiser,
        latents: Tensor,
        rows: Tensor,
        columns: Mapping[str, Sequence[Any]],
        rewards: Sequence[Reward],
    ) -> list[Tensor]:
        parts: list[list[Tensor]] = [[] for _ in rewards]
        for start in range(0, len(latents), _DECODED):
            piece = slice(start, start + _DECODED)
            images = denoiser.decode(latents[piece], rows[piece])
            for scores, reward in zip(parts, rewards, strict=True):
                scores.append(self._scores(reward, images, rows[piece], denoiser.prompts, columns))
        return [torch.cat(p) for p in parts]

    def _scores(
        self,
        reward: Reward,
        images: Tensor,
        rows: Tensor,
        prompts: Sequence[str],
        columns: Mapping[str, Sequence[Any]],
    ) -> Tensor:
        bound, size = RowReward(reward, list(prompts), columns), self.batch or len(images)
        parts = [slice(i, i + size) for i in range(0, len(images), size)]
        return torch.cat([scored(partial(bound, images[p], rows[p]), len(images[p]), reward.name) for p in parts])


NO_STREAMS = RandomStreams(0, ())
"""Of values that draw nothing."""


def shares_latents(reward: Any, pipe: DiffusionPipeline) -> bool:
    """Whether a reward is a diffusion reward model of latents like a pipeline's own."""
    backbone = getattr(reward, "pipe", None)
    if not hasattr(reward, "score_at_level") or backbone is None:
        return False
    own = denoisers_of(pipe)
    theirs = denoisers_of(backbone)
    alike = [type(m) for m in own.values()] == [type(m) for m in theirs.values()]
    return alike and _plain(backbone.vae.config) == _plain(pipe.vae.config)


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if not name.startswith("_")}


def load_rewards(specs: Sequence[str], pipe: DiffusionPipeline) -> tuple[Reward, ...]:
    """Rewards that share what they can with a pipeline, but not the denoiser that is going to be trained."""
    found = []
    for spec in specs:
        reward = resolve_reward(spec, pipe)
        if _reads(reward, pipe):
            reward = resolve_reward(spec)
            if isinstance(reward, nn.Module):
                reward.to(pipe.device)
        found.append(reward)
    return tuple(found)


def _reads(reward: Any, pipe: DiffusionPipeline) -> bool:
    """Whether a reward computes with weights of a pipeline's denoiser."""
    if isinstance(reward, Composite):
        return any(_reads(term.reward, pipe) for term in reward.terms)
    trained = {id(p) for module in denoisers_of(pipe).values() for p in module.parameters()}
    return isinstance(reward, nn.Module) and any(id(p) in trained for p in reward.parameters())

"""A diffusion reward model on another machine: latents travel there as safetensors, and scores come back."""

from dataclasses import dataclass
from math import hypot
from typing import Any, ClassVar

import torch
from torch import Tensor

from rsm_guidance.core.contracts import Denoiser
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.reward_models.value import DRMValue
from rsm_guidance.rewards.http import numbers_of
from rsm_guidance.rewards.remote import Remote
from rsm_guidance.rewards.wire import SAFETENSORS, pack_latents


@dataclass(frozen=True)
class RemoteDRM:
    """A reward of images and a source of values, as a `DiffusionRewardModel` is, without gradients.

    Attributes:
        client: the connection; its server says that it scores latents.
    """

    client: Remote

    differentiable: ClassVar[bool] = False
    reads_prompt: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return self.client.name

    @property
    def identity(self) -> str:
        return self.client.identity

    @property
    def requires(self) -> tuple[str, ...]:
        return self.client.requires

    @property
    def image_size(self) -> int | None:
        return self.client.image_size

    @property
    def share(self) -> float:
        """Cost of scoring an image in denoiser evaluations, as the server has it."""
        return float(self.client.facts.get("share", 0.0))

    @property
    def latent_share(self) -> float:
        """Cost of scoring a noisy latent in denoiser evaluations, as the server has it."""
        return float(self.client.facts.get("latent_share", 0.0))

    def value(self, denoiser: Denoiser, reward: Any, streams: Any) -> DRMValue:
        """The value of a denoiser's latents: their own scores, whatever `reward` and `streams` are."""
        return DRMValue(self, denoiser, getattr(denoiser, "token_grid", None))

    def __call__(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]."""
        return self.client(images, prompts, **columns)

    def score_at_level(
        self, latents: Tensor, level: int, prompts: list[str], schedule: NoiseSchedule, grid: tuple[int, int] | None
    ) -> Tensor:
        """Scores [B] of latents as a sampler has them, at a level 0..N of its schedule."""
        if not schedule.is_flow:  # exploding levels are shown to the denoiser at the size of preserving ones
            latents = latents / hypot(*schedule.coefficients(level))
        found: list[float] = []
        for start in range(0, len(latents), self.client.batch):
            piece = slice(start, start + self.client.batch)
            body = pack_latents(latents[piece], float(schedule.timesteps[level]), prompts[piece], grid)
            answer = self.client.server.ask("/v1/score", body, SAFETENSORS)
            found += numbers_of(answer, len(prompts[piece]), self.name)
        return torch.tensor(found, dtype=torch.float64, device=latents.device)

"""A reward on another machine, behind `rsm-guidance serve-reward` or any server of the same protocol (`rewards.wire`).

Images travel as PNG, so a score is that of the 8-bit image, and has no gradient.  Where the server has a diffusion reward
model, latents travel, and guide every step as with a model on this machine.  What goes wrong is an error, never a score.
"""

import functools
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.io.names import load_object
from rsm_guidance.rewards.base import RewardError
from rsm_guidance.rewards.builtin import BuiltInReward
from rsm_guidance.rewards.http import Server, numbers_of
from rsm_guidance.rewards.wire import PROTOCOL, pack_images

_OF_LATENTS = "rsm_guidance.reward_models.remote:RemoteDRM"


@dataclass(frozen=True)
class Remote(BuiltInReward):
    """Scores of the reward that the server has.

    Attributes:
        url: address of the server, such as http://localhost:8000.
        timeout: seconds for an answer.
        retries: further attempts where there is none.
        batch: images in a request.
        latents: send latents where the server can score them; false for finished images alone.
    """

    url: str = ""
    timeout: float = 120.0
    retries: int = 2
    batch: int = 16
    latents: bool = True

    name = "remote"
    about = "the reward of another machine, over HTTP"
    needs = "url=http://HOST:PORT, where `rsm-guidance serve-reward NAME` runs"
    range = (-inf, inf)

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise UsageError(f"remote: batch must be at least 1; got {self.batch}")

    @functools.cached_property
    def server(self) -> Server:
        """Where requests go."""
        if not self.url:
            raise UsageError("the reward remote needs url=..., as in remote:url=http://localhost:8000")
        return Server(self.name, self.url, self.timeout, self.retries)

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """What the server says of its reward.

        Raises:
            RewardError: if it does not answer, or with something else.
        """
        found = self.server.ask("/v1/reward")
        if not isinstance(found, dict) or found.get("protocol") != PROTOCOL:
            raise RewardError(
                f"remote: {self.url} is no reward server of protocol {PROTOCOL}; it says {str(found)[:80]!r}"
            )
        return found

    @property
    def requires(self) -> tuple[str, ...]:
        return tuple(self.facts.get("requires", ())) if self.url else ()

    @property
    def reads_prompt(self) -> bool:  # type: ignore[override]
        return bool(self.facts.get("reads_prompt", True)) if self.url else True

    @property
    def image_size(self) -> int | None:
        """Side of the square images that it was made for; None for one that takes any."""
        found: int | None = self.facts.get("image_size")
        return found

    def load(self) -> Any:
        """Ask the server what it has; a `reward_models.remote.RemoteDRM` where that scores latents."""
        of_latents = self.facts.get("latents") is True
        return load_object(_OF_LATENTS)(self) if of_latents and self.latents else self

    def scores(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        found: list[float] = []
        for start in range(0, len(images), self.batch):
            piece = slice(start, start + self.batch)
            told = {name: values[piece] for name, values in columns.items()}
            answer = self.server.ask("/v1/score", pack_images(images[piece], prompts[piece], told))
            found += numbers_of(answer, len(prompts[piece]), self.name)
        return torch.tensor(found, dtype=torch.float64)

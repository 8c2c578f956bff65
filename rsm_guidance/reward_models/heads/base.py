"""What a reward head is: what it is built for, what it is called with, what it answers."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from rsm_guidance.reward_models.config import DRMConfig


class Features(NamedTuple):
    """What a head reads of a denoiser.

    Attributes:
        tokens: [B, rows * columns, dim], of the image; the channels of several taps one after the other.
        grid: rows and columns.
        text: [B, T, dim] of each text tap.
        embedding: [B, E], the denoiser's embedding of its level (SD3 and its kin: of the pooled prompt, too); empty where
            the head asks for none.
    """

    tokens: Tensor
    grid: tuple[int, int]
    text: tuple[Tensor, ...] = ()
    embedding: Tensor | None = None

    def to(self, dtype: torch.dtype) -> "Features":
        """In another precision."""
        embedding = None if self.embedding is None else self.embedding.to(dtype)
        return Features(self.tokens.to(dtype), self.grid, tuple(t.to(dtype) for t in self.text), embedding)


@dataclass(frozen=True)
class Widths:
    """Channels of what a head reads.

    Attributes:
        image: of the image tokens of each tap.
        text: of the text tokens of each text tap.
        embedding: of the level's embedding; 0 where there is none.
    """

    image: tuple[int, ...]
    text: tuple[int, ...] = ()
    embedding: int = 0

    @property
    def dim(self) -> int:
        """Channels of the image tokens of all taps together."""
        return sum(self.image)


class Head(nn.Module, ABC):
    """What a denoiser shows to raw numbers [B, channels].

    Attributes:
        reads_output: it reads the denoiser's output in place of blocks.
        reads_embedding: it reads the embedding of the noise level besides.
    """

    reads_output: ClassVar[bool] = False
    reads_embedding: ClassVar[bool] = False

    def __init__(self, widths: Widths, config: DRMConfig) -> None:
        super().__init__()

    @staticmethod
    @abstractmethod
    def default_width(widths: Widths) -> int:
        """`head_width` where none is asked for."""

    @abstractmethod
    def forward(
        self, tokens: Tensor, grid: tuple[int, int], text: tuple[Tensor, ...] = (), embedding: Tensor | None = None
    ) -> Tensor:
        """Numbers [B, channels] from `Features`."""

    def together(self, levels: list[Features]) -> list[Tensor]:
        """Numbers of the same samples at several noise levels: one answer for each level, or a single one for all."""
        return [self(*features) for features in levels]

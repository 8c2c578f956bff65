"""What a reward head is built for, and what it is called with."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


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

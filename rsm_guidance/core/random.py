"""Random numbers by name: every particle and tree node owns a stream derived from (seed, prompt, copy, path).

A stream is named by what it is for, not by when it is drawn, so a result depends neither on the batch size nor on the
other prompts of the batch nor on their order.  The prompt enters by its text and, when it occurs several times, by the
number of its occurrence.  Noise is drawn on the CPU in float32, so that every device sees the same numbers.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def derive_seed(*name: int | str) -> int:
    """A seed from a name; equal names give equal seeds on every machine.

    It has 63 bits, of which torch's CPU generator uses the lower 32: two of a run's streams coincide by chance only
    among tens of thousands, and then merely share their noise.
    """
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in name)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True)
class RandomStreams:
    """The streams of one sampling run: one per row (image asked for)."""

    seed: int
    names: tuple[tuple[str, int], ...]

    @staticmethod
    def for_prompts(seed: int, prompts: Sequence[str]) -> "RandomStreams":
        """Streams for prompts [B]; equal prompts are told apart by their occurrence."""
        counts: dict[str, int] = {}
        names = []
        for prompt in prompts:
            names.append((prompt, counts.get(prompt, 0)))
            counts[prompt] = names[-1][1] + 1
        return RandomStreams(seed, tuple(names))

    def generator(self, row: int, *path: int | str) -> torch.Generator:
        """A CPU generator for one purpose of one row."""
        prompt, copy = self.names[row]
        return torch.Generator().manual_seed(derive_seed(self.seed, prompt, copy, *path))

    def normal(self, row: int, shape: Sequence[int], *path: int | str) -> Tensor:
        """Standard normal float32 noise of a shape, named by its path (level, child, ...)."""
        return torch.randn(tuple(shape), generator=self.generator(row, *path))

    def uniform(self, row: int, *path: int | str) -> float:
        """One number in [0, 1)."""
        return float(torch.rand((), generator=self.generator(row, *path), dtype=torch.float64))

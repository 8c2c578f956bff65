"""Random numbers by name: every particle and tree node owns a stream derived from (seed, prompt, copy, path).

A stream is named by what it is for, not by when it is drawn, so a result depends neither on the batch size nor on the
other prompts of the batch nor on their order.  The prompt enters by its text and, when it occurs several times, by the
number of its occurrence.  Noise is drawn on the CPU in float32, so that every device sees the same numbers.

Noise and single numbers come from numpy's Philox, whose key of 128 bits is a hash of the name (Salmon et al. 2011).  Where a
torch generator is asked for, SHAKE-256 of the name fills the whole state of its Mersenne twister: `manual_seed` would use
32 bits, with which two of 65,000 streams are likely to coincide.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Name = int | str


class Purpose:
    """First part of a stream's name."""

    INITIAL = "initial"  # initial noise of a candidate
    STEP = "step"  # noise of a step: candidate, level, child
    BACK = "back"  # noise of going back to a noisier level
    BRANCH = "branch"
    MOVE = "move"  # of a Markov chain
    SELECT = "select"
    RESAMPLE = "resample"
    DRAW = "draw"
    ACCEPT = "accept"
    PERTURB = "perturb"
    PERMUTE = "permute"
    SMOOTH = "smooth"
    TREE = "tree"


_WORDS = 624
_FIRST = 3  # torch's layout, in 64 bits: seed, (left, seeded), next, then 624 words of which 32 bits are used


class _Buffer(threading.local):
    """A generator state to be filled, and its words as numbers; one for each thread, as making it takes its time."""

    def __init__(self) -> None:
        self.state = torch.Generator().manual_seed(0).get_state()
        self.words = self.state.numpy()[: 8 * (_FIRST + _WORDS)].view(np.uint64)


_BUFFER = _Buffer()


class _Philox(threading.local):
    """Numpy's generator, to be set to the beginning of a stream; one for each thread, as making one takes longer."""

    def __init__(self) -> None:
        self.bits = np.random.Philox(key=0)
        self.numbers = np.random.Generator(self.bits)
        self.beginning = self.bits.state

    def stream(self, name: tuple[Name, ...]) -> np.random.Generator:
        """The numbers of a name; valid until the next call."""
        key = hashlib.blake2b(_spelled(name), digest_size=16).digest()
        self.beginning["state"]["key"] = np.frombuffer(key, "<u8")
        self.bits.state = self.beginning
        return self.numbers


_PHILOX = _Philox()


def _spelled(name: tuple[Name, ...]) -> bytes:
    return repr(name).encode()  # numbers and text, told apart by their quotes


def derive_seed(*name: Name) -> int:
    """A seed of 63 bits from a name; equal names give equal seeds on every machine."""
    return int.from_bytes(hashlib.blake2b(_spelled(name), digest_size=8).digest(), "big") >> 1


def generator_of(*name: Name) -> torch.Generator:
    """A CPU generator whose whole state derives from a name."""
    digest = hashlib.shake_256(_spelled(name)).digest(4 * _WORDS)
    words = _BUFFER.words
    words[_FIRST:] = np.frombuffer(digest, dtype="<u4")
    words[0] = int.from_bytes(digest[:8], "big") >> 1  # what `initial_seed` tells
    return torch.Generator().set_state(_BUFFER.state)


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
        return RandomStreams(int(seed), tuple(names))

    def generator(self, row: int, *path: Name) -> torch.Generator:
        """A CPU generator for one purpose of one row."""
        prompt, copy = self.names[row]
        return generator_of(self.seed, prompt, copy, *path)

    def normal(self, row: int, shape: Sequence[int], *path: Name) -> Tensor:
        """Standard normal float32 noise of a shape, named by its path (level, child, ...)."""
        return self.normals([row], shape, [path])[0]

    def normals(self, rows: Sequence[int], shape: Sequence[int], paths: Sequence[tuple[Name, ...]]) -> Tensor:
        """Standard normal float32 noise [R, ...] of rows [R], each by its own path [R]."""
        drawn = np.empty((len(rows), *shape), np.float32)
        for place, row, path in zip(drawn[:, None], rows, paths, strict=True):
            _PHILOX.stream((self.seed, *self.names[row], *path)).standard_normal(dtype=np.float32, out=place)
        return torch.from_numpy(drawn)

    def uniform(self, row: int, *path: Name) -> float:
        """One number in [0, 1)."""
        return self.uniforms(row, 1, *path).item()

    def uniforms(self, row: int, count: int, *path: Name) -> Tensor:
        """Float64 numbers [count] in [0, 1)."""
        return torch.from_numpy(_PHILOX.stream((self.seed, *self.names[row], *path)).random(count))

"""Preferences as a trainer reads them: items of tensors at random, from shards on disk."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.data.preferences.problems import Problem, Reason, Tally
from rsm_guidance.data.preferences.usable import Duplicates

_OPEN = 64  # files at a time


@dataclass(frozen=True, slots=True)
class Entry:
    """A preference in a shard.

    Attributes:
        shard: number of the shard.
        prompt: of both images.
        tensors: names of the latents: the first, the second and, if there is one, the source image.
        embeddings: tensors of the prompt by name, as names in the shard.
        probability: that the first is preferred.
        weight: in the loss.
        bucket: of the images.
        place: where it was read.
        source: what the images or votes come from.
        category: kind of prompt.
        models: what made the images.
        scores: of both images by dimension.
    """

    shard: int
    prompt: str
    tensors: tuple[str, ...]
    embeddings: Mapping[str, str]
    probability: float
    weight: float
    bucket: int
    place: str
    source: str
    category: str
    models: tuple[str, str]
    scores: Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class PreferenceData:
    """Preferences with a length and items, for a `DataLoader`; tensors are read when an item is asked for.

    An item is a mapping: `first` and `second` (latents), `source_latents` for edits, `probability`, `weight`, `index`
    and `bucket` as numbers (float32, float32, int, int), `scores` by dimension, `prompt` as text, and the embeddings of the
    prompt by their names.

    Attributes:
        shards: files of tensors.
        entries: what they hold, in the order of the data; their number is the length.
        skipped: rows and pairs that could not be used, and duplicates, by reason.
    """

    shards: tuple[Path, ...]
    entries: tuple[Entry, ...]
    skipped: Tally = field(default_factory=Tally)
    _open: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        shard = self._shard(entry.shard)
        names = dict(zip(("first", "second", "source_latents"), entry.tensors, strict=False)) | dict(entry.embeddings)
        return {name: shard.get_tensor(stored) for name, stored in names.items()} | {
            "prompt": entry.prompt,
            "probability": torch.tensor(entry.probability),
            "weight": torch.tensor(entry.weight),
            "scores": entry.scores,
            "index": index,
            "bucket": entry.bucket,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    @property
    def groups(self) -> list[int]:
        """The bucket of each item; items of one can be stacked."""
        return [entry.bucket for entry in self.entries]

    @property
    def sources(self) -> Counter[str]:
        """How many items come from each source."""
        return Counter(entry.source for entry in self.entries)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # open files stay with their process

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            from safetensors import safe_open

            if len(self._open) >= _OPEN:
                del self._open[next(iter(self._open))]
            self._open[number] = safe_open(self.shards[number], framework="pt")
        return self._open[number]


def gathered(shards: Sequence[Path], entries: Sequence[Sequence[Entry]], problems: Sequence[Problem]) -> PreferenceData:
    """Data of shards, without what several of them hold; the first of duplicates stays.

    Raises:
        UsageError: if nothing is left, with the reasons.
    """
    tally, duplicates, kept = Tally(), Duplicates(), []
    for problem in problems:
        tally.add(problem)
    for entry in (entry for shard in entries for entry in shard):
        keys = tuple(name.partition("@")[0] for name in entry.tensors)
        met = duplicates.first(entry.prompt, keys, entry.place)
        if met is None:
            kept.append(entry)
        else:
            tally.add(Problem(entry.place, Reason.DUPLICATE, f"of {met}"))
    if not kept:
        why = f": {tally}; first: {tally.kept[0]}" if tally.kept else ""
        raise UsageError(f"there is no preference to train on{why}")
    return PreferenceData(tuple(shards), tuple(kept), tally)


def stack_images(images: Sequence[Any]) -> Tensor:
    """RGB images of one size as [B, 3, H, W] in [0, 1]."""
    import numpy as np

    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255

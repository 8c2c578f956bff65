"""Batches of a data set, epoch by epoch, from any step on."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from accelerate import PartialState, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch import Tensor
from torch.utils.data import DataLoader

from rsm_guidance.core.random import generator_of
from rsm_guidance.data.order import epoch_batches


def process_state() -> PartialState:
    """This process among those that train together, whether or not it has an accelerator."""
    asked: str = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    return PartialState(cpu=asked in ("1", "true", "yes") or not torch.accelerator.is_available())


def leave() -> None:
    """End the communication with other processes, at the end of a program: its threads may not outlive the interpreter."""
    state = process_state()
    state.wait_for_everyone()
    state.destroy_process_group()


class BatchSource(Protocol):
    """What a training takes batches from."""

    def start(self, step: int) -> Iterator[Any]:
        """The batches of steps `step`, `step` + 1, ..., until training is to end."""
        ...


@dataclass(frozen=True)
class Batches:
    """Endless batches without replacement within an epoch; a last one that is not full is left out, unless there are groups.

    The order of an epoch is named by (seed, epoch), so a resumed run sees what an uninterrupted one would have seen.
    With several processes each gets batches of its own.

    Attributes:
        data: anything with a length and items, such as a `range` of row numbers; items are stacked as torch does it.
        size: items per batch and process; at most as many as there are.
        seed: of the order.
        workers: processes that make items.
        groups: one number per item, such as its bucket: items of a batch share it, and every item comes once an epoch.
        collate: makes a batch of items and the number of their epoch; default: what torch does, without the number.
    """

    data: Any
    size: int
    seed: int
    workers: int = 0
    groups: Sequence[int] | None = None
    collate: Callable[[list[Any], int], Any] | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or not len(self.data):
            raise ValueError(f"batches need a size and data; got size {self.size} and {len(self.data)} items")
        if self.groups is not None and len(self.groups) != len(self.data):
            raise ValueError(f"every item needs a group; got {len(self.groups)} groups for {len(self.data)} items")

    def start(self, step: int) -> Iterator[Any]:
        """The batches of steps `step`, `step` + 1, ..."""
        epoch, skipped = divmod(step, self.per_epoch)
        for number in itertools.count(epoch):
            loader = self._loader(number)
            yield from skip_first_batches(loader, skipped) if skipped else loader
            skipped = 0

    @property
    def per_epoch(self) -> int:
        """Batches of an epoch, for each process."""
        return len(self._loader(0))

    def _loader(self, epoch: int) -> DataLoader[Any]:
        state = process_state()
        collate = None if self.collate is None else partial(_collated, collate=self.collate, epoch=epoch)
        if self.groups is not None:
            share = state.num_processes, state.process_index
            own = epoch_batches(self.groups, self.size, self.seed, epoch, *share)
            return DataLoader(self.data, batch_sampler=own, num_workers=self.workers, collate_fn=collate)
        loader: DataLoader[Any] = DataLoader(
            self.data,
            min(self.size, len(self.data)),
            shuffle=True,
            drop_last=True,
            generator=generator_of("epoch", self.seed, epoch),
            num_workers=self.workers,
            collate_fn=collate,
        )
        if state.num_processes == 1:
            return loader
        return prepare_data_loader(loader, num_processes=state.num_processes, process_index=state.process_index)


def _collated(items: list[Any], collate: Callable[[list[Any], int], Any], epoch: int) -> Any:
    return collate(items, epoch)


def parts_of(batch: Any, size: int | None) -> list[Any]:
    """A batch in parts of at most `size` items: tensors and lists are cut, the values of mappings each, all else is in every part."""
    count = _length(batch)
    if size is None or count is None or count <= size:
        return [batch]
    return [_cut(batch, slice(start, start + size)) for start in range(0, count, size)]


def _length(batch: Any) -> int | None:
    if isinstance(batch, dict):
        return next((n for value in batch.values() if (n := _length(value)) is not None), None)
    return len(batch) if isinstance(batch, Tensor | list) else None


def _cut(batch: Any, part: slice) -> Any:
    if isinstance(batch, dict):
        return {name: _cut(value, part) for name, value in batch.items()}
    return batch[part] if isinstance(batch, Tensor | list) else batch

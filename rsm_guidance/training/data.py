"""Batches of a data set, epoch by epoch, from any step on."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from accelerate import PartialState, skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from rsm_guidance.core.random import generator_of
from rsm_guidance.data.order import epoch_batches


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
    """

    data: Any
    size: int
    seed: int
    workers: int = 0
    groups: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if self.size < 1 or not len(self.data):
            raise ValueError(f"batches need a size and data; got size {self.size} and {len(self.data)} items")
        if self.groups is not None and len(self.groups) != len(self.data):
            raise ValueError(f"every item needs a group; got {len(self.groups)} groups for {len(self.data)} items")

    def start(self, step: int) -> Iterator[Any]:
        """The batches of steps `step`, `step` + 1, ..."""
        epoch, skipped = divmod(step, len(self._loader(0)))
        for number in itertools.count(epoch):
            loader = self._loader(number)
            yield from skip_first_batches(loader, skipped) if skipped else loader
            skipped = 0

    def _loader(self, epoch: int) -> DataLoader[Any]:
        state = PartialState()
        if self.groups is not None:
            share = state.num_processes, state.process_index
            own = epoch_batches(self.groups, self.size, self.seed, epoch, *share)
            return DataLoader(self.data, batch_sampler=own, num_workers=self.workers)
        loader: DataLoader[Any] = DataLoader(
            self.data,
            min(self.size, len(self.data)),
            shuffle=True,
            drop_last=True,
            generator=generator_of("epoch", self.seed, epoch),
            num_workers=self.workers,
        )
        if state.num_processes == 1:
            return loader
        return prepare_data_loader(loader, num_processes=state.num_processes, process_index=state.process_index)

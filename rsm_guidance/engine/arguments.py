"""The arguments of a recorded call as functions of latents, timesteps and rows.

What an argument is a function of is found from what it was in three recordings: over B rows, over B + 1 rows, and with other
latents.  A tensor or list that grew with the rows follows them; one that changed with the latents is made of them; one that
changed from level to level, with the latents as they were, is the timestep; all others are constant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.core.rows import per_row

Layout = str
"""How a batch holds k copies of its rows (unconditional and conditional): "blocks" (u u c c) or "pairs" (u c u c)."""


class NotReplayable(UsageError):
    """A call that cannot be replayed, and why."""


@dataclass(frozen=True)
class Batch:
    """What a call is replayed with.

    Attributes:
        x: latents [R, ...] in the scheduler's scale, or in the denoiser's where `levels` is None.
        rows: recorded rows [R].
        levels: [R], or None where `timesteps` are given.
        timesteps: [R], of the scheduler.
        outputs: answers of the calls before this one.
    """

    x: Tensor
    rows: Tensor
    levels: Tensor | None
    timesteps: Tensor | None
    outputs: list[Any]


class Argument(Protocol):
    """One argument of a call."""

    def value(self, batch: Batch) -> Any:
        """What the call is given for a batch."""
        ...

    def pick(self, rows: Tensor, count: int) -> "Argument":
        """The argument for some of `count` recorded rows, in a new order."""
        ...

    def join(self, others: Sequence[Any]) -> "Argument":
        """The argument for the rows of several recordings; a NotReplayable where they do not fit."""
        ...

    def kept(self, place: str) -> dict[str, Tensor]:
        """What a recording of one row keeps for it: tensors by their place in the call."""
        ...

    def keeping(self, place: str, tensors: Mapping[str, Tensor]) -> "Argument":
        """The argument of a recording of one row with other tensors at some places."""
        ...


class _Shared:
    """An argument that keeps nothing for single rows."""

    def pick(self, rows: Tensor, count: int) -> Self:
        return self

    def kept(self, place: str) -> dict[str, Tensor]:
        return {}

    def keeping(self, place: str, tensors: Mapping[str, Tensor]) -> Self:
        return self


def copied(rows: Tensor, copies: int, count: int, layout: Layout) -> Tensor:
    """Indices [k * R], into a batch with k copies of `count` rows, of rows [R]."""
    copy = torch.arange(copies, device=rows.device)
    if layout == "blocks":
        return (copy[:, None] * count + rows).flatten()
    return (rows[:, None] * copies + copy).flatten()


def repeated(x: Tensor, copies: int, layout: Layout) -> Tensor:
    """x [R, ...] as a batch [k * R, ...] of k copies."""
    if copies == 1:
        return x
    return torch.cat([x] * copies) if layout == "blocks" else x.repeat_interleave(copies, 0)


@dataclass(frozen=True)
class Constant(_Shared):
    """An argument that is the same for all rows and levels."""

    content: Any

    def value(self, batch: Batch) -> Any:
        return self.content

    def join(self, others: Sequence[Any]) -> Self:
        if not all(same(self.content, other.content) for other in others):
            raise NotReplayable("a shared argument differs between the recordings")
        return self


@dataclass(frozen=True)
class PerRow:
    """A conditioning: a tensor with the batch on some axis, or a list with an entry for each row (and copy)."""

    content: Tensor | list[Any]
    axis: int
    copies: int
    layout: Layout

    @property
    def count(self) -> int:
        size = len(self.content) if isinstance(self.content, list) else self.content.shape[self.axis]
        return size // self.copies

    def value(self, batch: Batch) -> Any:
        return self._at(copied(batch.rows, self.copies, self.count, self.layout))

    def _at(self, index: Tensor) -> Any:
        if isinstance(self.content, list):
            return [self.content[i] for i in index.tolist()]
        return self.content.index_select(self.axis, index.to(self.content.device))

    def pick(self, rows: Tensor, count: int) -> Self:
        return replace(self, content=self._at(copied(rows, self.copies, self.count, self.layout)))

    def join(self, others: Sequence[Any]) -> Self:
        parts = [self, *others]
        if any(type(p.content) is not type(self.content) for p in parts):
            raise NotReplayable("a conditioning differs in kind between the recordings")
        pieces = [p._copy(c) for c in range(self.copies) for p in parts]  # in blocks
        if isinstance(self.content, list):
            together: Any = [entry for piece in pieces for entry in piece]
        else:
            if len({(*p.shape[: self.axis], *p.shape[self.axis + 1 :]) for p in pieces}) > 1:
                raise NotReplayable("a conditioning differs in shape between the recordings")
            together = torch.cat(pieces, self.axis)
        return replace(self, content=together, layout="blocks")

    def kept(self, place: str) -> dict[str, Tensor]:
        entries = self.content if isinstance(self.content, list) else [self.content]
        return {f"{place}.{i}": entry for i, entry in enumerate(entries) if isinstance(entry, Tensor)}

    def keeping(self, place: str, tensors: Mapping[str, Tensor]) -> Self:
        if isinstance(self.content, list):
            entries = [tensors.get(f"{place}.{i}", entry) for i, entry in enumerate(self.content)]
            return replace(self, content=entries)
        return replace(self, content=tensors.get(f"{place}.0", self.content))

    def _copy(self, copy: int) -> Any:
        rows = torch.arange(self.count)
        index = copy * self.count + rows if self.layout == "blocks" else rows * self.copies + copy
        return self._at(index)


@dataclass(frozen=True)
class Latents:
    """The denoiser's input: latents divided by a number per level, beside constant channels or tokens if there are any.

    Attributes:
        divisors: float32 [N] by level; all ones where the scheduler does not scale.
        dtype: of the input.
        copies, layout: of the batch.
        as_list: whether the call takes a list of single latents.
        inserted: position of an axis of length 1 that latents do not have.
        frame: what stands beside the latents, as a recorded input; None where they are all.
        axis, start: where in the frame they stand.
    """

    divisors: Tensor
    dtype: torch.dtype
    copies: int
    layout: Layout
    as_list: bool = False
    inserted: int | None = None
    frame: PerRow | None = None
    axis: int = 1
    start: int = 0

    def value(self, batch: Batch) -> Any:
        y = batch.x
        if batch.levels is not None and bool((self.divisors != 1).any()):
            divisor = per_row(self.divisors.to(y.device)[batch.levels.to(y.device)], y)
            y = (y.to(divisor.dtype) / divisor).to(y.dtype) if y.dtype.itemsize < 4 else y / divisor
        y = y.to(self.dtype)
        if self.inserted is not None:
            y = y.unsqueeze(self.inserted)
        y = repeated(y, self.copies, self.layout)
        if self.frame is not None:
            frame, size = self.frame.value(batch), y.shape[self.axis]
            end = self.start + size
            before = frame.narrow(self.axis, 0, self.start)
            after = frame.narrow(self.axis, end, frame.shape[self.axis] - end)
            y = torch.cat([before, y, after], self.axis)
        return list(y.unbind(0)) if self.as_list else y

    def pick(self, rows: Tensor, count: int) -> Self:
        return self if self.frame is None else replace(self, frame=self.frame.pick(rows, count))

    def join(self, others: Sequence[Any]) -> Self:
        return self if self.frame is None else replace(self, frame=self.frame.join([o.frame for o in others]))

    def kept(self, place: str) -> dict[str, Tensor]:
        return {} if self.frame is None else self.frame.kept(place)

    def keeping(self, place: str, tensors: Mapping[str, Tensor]) -> Self:
        return self if self.frame is None else replace(self, frame=self.frame.keeping(place, tensors))


@dataclass(frozen=True)
class Timestep(_Shared):
    """What the denoiser is told of the noise level, one number per row.

    Attributes:
        table: [N], by level, as the call was given it.
        slope, offset: its affine function of the scheduler's timestep; None where it is none.
        copies, layout: of the batch.
        trailing: axes that repeat the number.
    """

    table: Tensor
    slope: float | None
    offset: float
    copies: int
    layout: Layout
    trailing: tuple[int, ...] = ()

    def value(self, batch: Batch) -> Tensor:
        if batch.levels is not None:
            told = self.table.to(batch.x.device)[batch.levels.to(batch.x.device)]
        else:
            told = self._of(batch.timesteps).to(batch.x.device)
        told = repeated(told, self.copies, self.layout)
        return told.view(-1, *[1] * len(self.trailing)).expand(-1, *self.trailing) if self.trailing else told

    def _of(self, timesteps: Tensor | None) -> Tensor:
        if self.slope is None or timesteps is None:
            raise NotReplayable(
                "what the denoiser is told of the noise level is no affine function of the scheduler's timestep; it can be "
                "replayed at recorded levels only"
            )
        dtype = self.table.dtype if self.table.is_floating_point() else torch.float32
        if self.slope == 1 and self.offset == 0:
            return timesteps.to(dtype)
        wide = torch.float32 if timesteps.device.type == "mps" else torch.float64
        return (self.slope * timesteps.to(wide) + self.offset).to(dtype)

    def join(self, others: Sequence[Any]) -> Self:
        if any((o.slope, o.offset) != (self.slope, self.offset) for o in others):
            raise NotReplayable("the timestep is told in another way in one of the recordings")
        return self


@dataclass(frozen=True)
class Passed(_Shared):
    """A part of what an earlier call of the same level answered, such as a ControlNet's residuals."""

    call: int
    path: tuple[int, ...]

    def value(self, batch: Batch) -> Any:
        part = batch.outputs[self.call]
        for step in self.path:
            part = part[step]
        return part

    def join(self, others: Sequence[Any]) -> Self:
        return self


@dataclass(frozen=True)
class Group:
    """A dict, list or tuple of arguments."""

    kind: type
    keys: tuple[Any, ...]
    parts: tuple[Argument, ...]

    def value(self, batch: Batch) -> Any:
        values = [part.value(batch) for part in self.parts]
        return dict(zip(self.keys, values, strict=True)) if self.kind is dict else self.kind(values)

    def pick(self, rows: Tensor, count: int) -> Self:
        return replace(self, parts=tuple(part.pick(rows, count) for part in self.parts))

    def join(self, others: Sequence[Any]) -> Self:
        columns = zip(*(other.parts for other in others), strict=True)
        return replace(self, parts=tuple(p.join(c) for p, c in zip(self.parts, columns, strict=True)))

    def kept(self, place: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for key, part in zip(self._names(), self.parts, strict=True):
            found |= part.kept(f"{place}.{key}")
        return found

    def keeping(self, place: str, tensors: Mapping[str, Tensor]) -> Self:
        named = zip(self._names(), self.parts, strict=True)
        return replace(self, parts=tuple(part.keeping(f"{place}.{key}", tensors) for key, part in named))

    def _names(self) -> list[str]:
        return [str(key) for key in self.keys] if self.kind is dict else [str(i) for i in range(len(self.parts))]


def same(a: Any, b: Any) -> bool:
    """Whether two arguments are equal, tensors by their contents."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b)))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a is b or a == b)


def size_of(argument: Argument) -> int:
    """Bytes of the tensors that an argument keeps for its rows."""
    if isinstance(argument, Group):
        return sum(size_of(part) for part in argument.parts)
    if isinstance(argument, Latents):
        return 0 if argument.frame is None else size_of(argument.frame)
    if not isinstance(argument, PerRow):
        return 0
    entries = argument.content if isinstance(argument.content, list) else [argument.content]
    return sum(entry.nbytes for entry in entries if isinstance(entry, Tensor))

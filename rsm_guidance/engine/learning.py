"""Learning from recordings what each argument of a call is a function of; see `engine.arguments`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.engine.arguments import (
    Argument,
    Constant,
    Group,
    Latents,
    Layout,
    NotReplayable,
    Passed,
    PerRow,
    Timestep,
    copied,
    same,
)
from rsm_guidance.engine.recording import Call, Visit

_UNITS = ((1.0, 0.0), (0.001, 0.0), (-0.001, 1.0))
"""What families make of a timestep in 0..1000: itself, t / 1000, (1000 - t) / 1000."""


@dataclass(frozen=True)
class Seen:
    """What one argument was: by level, by level with other latents, and over one row more at the first level."""

    levels: Sequence[Any]
    others: Sequence[Any]
    more: Any

    def part(self, key: Any) -> "Seen":
        return Seen([v[key] for v in self.levels], [v[key] for v in self.others], self.more[key])

    @property
    def all(self) -> list[Any]:
        return [*self.levels, *self.others, self.more]


@dataclass
class Learner:
    """Learns the calls of one level from the levels of three recordings.

    Args:
        visits: over `count` rows.
        others: over the same rows, with other latents.
        more: over one row more, which repeats the first; its first level.
        count: number of rows B.
    """

    visits: Sequence[Visit]
    others: Sequence[Visit]
    more: Visit
    count: int
    _layout: Layout | None = field(default=None, init=False)
    _copies: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        names = [[call.name for call in v.calls] for v in (*self.visits, *self.others, self.more)]
        if any(n != names[0] for n in names):
            raise NotReplayable("the call evaluates its denoiser in another way from level to level")
        self._made: dict[int, Passed] = {}

    def calls(self) -> list[tuple[str, Group, Group, int, Layout]]:
        """Name, arguments, keyword arguments, copies of the rows and their layout, of each call of a level."""
        learned = []
        for index in range(len(self.visits[0].calls)):
            seen = Seen(
                [v.calls[index] for v in self.visits],
                [v.calls[index] for v in self.others],
                self.more.calls[index],
            )
            learned.append(self._call(seen))
            self._note(self.visits[0].calls[index].output, index, ())
        return learned

    def _call(self, seen: Seen) -> tuple[str, Group, Group, int, Layout]:
        call: Call = seen.more
        positional = Seen([c.args for c in seen.levels], [c.args for c in seen.others], call.args)
        named = Seen([c.kwargs for c in seen.levels], [c.kwargs for c in seen.others], call.kwargs)
        self._layout, self._copies = None, 1
        self._find_latents(positional, named)
        args, kwargs = self._argument(positional, call.name), self._argument(named, call.name)
        if not isinstance(args, Group) or not isinstance(kwargs, Group):
            raise NotReplayable(f"the arguments of {call.name} could not be read")
        return call.name, args, kwargs, self._copies, self._layout or "blocks"

    def _note(self, output: Any, index: int, path: tuple[int, ...]) -> None:
        """Remember tensors that a call has answered, so that they are known where they are passed on."""
        if isinstance(output, Tensor):
            self._made[id(output)] = Passed(index, path)
        elif isinstance(output, tuple | list):
            for i, part in enumerate(output):
                self._note(part, index, (*path, i))

    # --- one argument ---

    def _argument(self, seen: Seen, name: str) -> Argument:
        first = seen.levels[0]
        if id(first) in self._made:
            return self._made[id(first)]
        if any(type(v) is not type(first) for v in seen.all):
            raise NotReplayable(f"{name} of the denoiser is of another kind from level to level")
        if isinstance(first, Tensor):
            return self._tensor(seen, name)
        if isinstance(first, dict):
            if any(v.keys() != first.keys() for v in seen.all):
                raise NotReplayable(f"{name} of the denoiser has other entries from level to level")
            return Group(dict, tuple(first), tuple(self._argument(seen.part(k), str(k)) for k in first))
        if isinstance(first, list | tuple):
            return self._list(seen, name)
        if not all(same(first, v) for v in seen.all):
            raise NotReplayable(
                f"{name} changes from level to level, or with the rows, and is no tensor ({first!r}); it cannot be set for "
                "each sample"
            )
        return Constant(first)

    def _list(self, seen: Seen, name: str) -> Argument:
        first = seen.levels[0]
        if len(first) != len(seen.more):
            copies = self._copies_of(len(first), len(seen.more), name)
            if isinstance(first[0], Tensor) and not same(first, seen.others[0]):
                return self._latents(_stacked(seen), copies, as_list=True)
            if not all(same(first, v) for v in (*seen.levels, *seen.others)):
                raise NotReplayable(f"{name} of the denoiser changes from level to level")
            return PerRow(list(first), 0, copies, self._layout or "blocks")
        if any(len(v) != len(first) for v in seen.all):
            raise NotReplayable(f"{name} of the denoiser has another length from level to level")
        parts = tuple(self._argument(seen.part(i), f"{name}[{i}]") for i in range(len(first)))
        return Group(type(first), tuple(range(len(first))), parts)

    def _tensor(self, seen: Seen, name: str) -> Argument:
        first = seen.levels[0]
        axis = _grown(first, seen.more, name)
        copies = 0 if axis is None else self._copies_of(first.shape[axis], seen.more.shape[axis], name)
        if not same(first, seen.others[0]):
            if axis != 0:
                raise NotReplayable(f"{name} is made of the latents and has no batch in front")
            return self._latents(seen, copies)
        if not all(same(first, v) for v in seen.levels):
            return self._timestep(seen, axis, copies, name)
        if axis is None:
            return Constant(first)
        return PerRow(first, axis, copies, self._layout or "blocks")

    def _copies_of(self, size: int, more: int, name: str) -> int:
        copies = size // self.count
        if copies * self.count != size or copies * (self.count + 1) != more:
            raise NotReplayable(f"{name} holds {size} entries for {self.count} rows and {more} for one more")
        return copies

    # --- latents ---

    def _find_latents(self, positional: Seen, named: Seen) -> None:
        """Find how a call lays out copies of its rows, from the one argument whose contents are known, the latents."""
        for seen in [
            *(positional.part(i) for i in range(len(positional.more))),
            *(named.part(k) for k in named.more),
        ]:
            first, more = seen.levels[0], seen.more
            rows_in_list = isinstance(first, list) and bool(first) and isinstance(first[0], Tensor)
            if rows_in_list and len(first) != len(more):
                first, more, other = torch.stack(first), torch.stack(more), torch.stack(seen.others[0])
            elif isinstance(first, Tensor):
                other = seen.others[0]
            else:
                continue
            if first.ndim == 0 or first.shape[0] == more.shape[0] or same(first, other):
                continue
            self._copies = self._copies_of(len(first), len(more), "the latents")
            rows = torch.tensor([*range(self.count), 0], device=first.device)
            # Channels beside the latents may hold random numbers of each call: the layout under which more agrees.
            agreement = {
                layout: float((first[copied(rows, self._copies, self.count, layout)] == more).float().mean())
                for layout in ("blocks", "pairs")
            }
            self._layout = max(agreement, key=lambda layout: agreement[layout])
            return

    def _latents(self, seen: Seen, copies: int, as_list: bool = False) -> Latents:
        z = [_rows_of(v, copies, self.count, self._layout) for v in seen.levels]
        sample = self.visits[0].sample
        inserted = next((a for a in range(1, z[0].ndim) if z[0].shape[a] == 1 and z[0].ndim == sample.ndim + 1), None)
        if z[0].ndim - (inserted is not None) != sample.ndim:
            raise NotReplayable("the denoiser's input has other axes than the latents")
        axis, start = self._block(z[0], _rows_of(seen.others[0], copies, self.count, self._layout), inserted)
        size = sample.unsqueeze(inserted).shape[axis] if inserted is not None else sample.shape[axis]
        divisors = []
        for level, whole in enumerate(z):
            part = whole.narrow(axis, start, size)
            part = part.squeeze(inserted) if inserted is not None else part
            divisors.append(_divisor(self.visits[level].sample, part))
        frame = None if z[0].shape[axis] == size else self._frame(seen, copies, axis, start, size)
        return Latents(
            torch.tensor(divisors), z[0].dtype, copies, self._layout or "blocks", as_list, inserted, frame, axis, start
        )

    def _block(self, z: Tensor, other: Tensor, inserted: int | None) -> tuple[int, int]:
        """Axis and start of the part of an input that changes with the latents."""
        shape = self.visits[0].sample.shape
        expected = list(shape) if inserted is None else [*shape[:inserted], 1, *shape[inserted:]]
        changed = z != other
        found = (1, 0)
        for axis in range(1, z.ndim):
            places = changed.movedim(axis, 0).flatten(1).any(1).nonzero().flatten()
            if len(places) != expected[axis] or int(places[-1] - places[0]) + 1 != len(places):
                raise NotReplayable("how the denoiser's input is made of the latents could not be found")
            if z.shape[axis] != expected[axis]:
                found = (axis, int(places[0]))
        return found

    def _frame(self, seen: Seen, copies: int, axis: int, start: int, size: int) -> PerRow:
        """What stands beside the latents, with all copies of the rows."""
        first = seen.levels[0]
        outside = torch.ones(first.shape[axis], dtype=torch.bool, device=first.device)
        outside[start : start + size] = False
        kept = outside.nonzero().flatten()
        if not all(same(first.index_select(axis, kept), v.index_select(axis, kept)) for v in seen.levels):
            raise NotReplayable("what stands beside the latents in the denoiser's input changes from level to level")
        return PerRow(first, 0, copies, self._layout or "blocks")

    # --- timestep ---

    def _timestep(self, seen: Seen, axis: int | None, copies: int, name: str) -> Timestep:
        numbers = [v.flatten() for v in seen.levels]
        if axis not in (None, 0) or not all(bool((n == n[0]).all()) for n in numbers):
            raise NotReplayable(f"{name} changes from level to level and is not one number for each sample")
        table = torch.stack([n[0] for n in numbers]).cpu()
        slope, offset = _affine(torch.tensor([v.timestep for v in self.visits], dtype=torch.float64), table)
        trailing = tuple(seen.levels[0].shape[1:]) if axis == 0 else ()
        return Timestep(table, slope, offset, copies or self._copies, self._layout or "blocks", trailing)


def _stacked(seen: Seen) -> Seen:
    return Seen([torch.stack(v) for v in seen.levels], [torch.stack(v) for v in seen.others], torch.stack(seen.more))


def _grown(first: Tensor, more: Tensor, name: str) -> int | None:
    """The axis that grew with the rows; None if none did."""
    if first.ndim != more.ndim:
        raise NotReplayable(f"{name} has other axes for other numbers of rows")
    grown = [a for a in range(first.ndim) if first.shape[a] != more.shape[a]]
    if len(grown) > 1:
        raise NotReplayable(f"{name} changes its shape with the rows on several axes")
    return grown[0] if grown else None


def _rows_of(z: Tensor, copies: int, count: int, layout: Layout | None) -> Tensor:
    """The first copy of an input's rows."""
    if copies == 1:
        return z
    if layout is None:
        raise NotReplayable("how the denoiser's batch holds the copies of its rows could not be found")
    return z[:count] if layout == "blocks" else z[::copies]


def _divisor(sample: Tensor, part: Tensor) -> float:
    """The float32 number by which latents were divided, to the last bit where it can be told."""
    if same(sample.to(part.dtype), part):
        return 1.0
    wide, narrow = sample.double(), part.double()
    guess = torch.tensor(float((wide * wide).sum() / (wide * narrow).sum()), dtype=torch.float32)
    inf = torch.tensor(torch.inf)
    low = high = guess
    for _ in range(8):
        for candidate in (low, high):
            if same((sample / candidate.to(sample.device)).to(part.dtype), part):
                return float(candidate)
        low, high = torch.nextafter(low, -inf), torch.nextafter(high, inf)
    close = 1e-5 if part.dtype.itemsize >= 4 else 2e-2
    if not torch.allclose(sample / guess.to(sample.device), part.to(sample.dtype), rtol=close, atol=close):
        raise NotReplayable("the denoiser's input is not the latents divided by a number")
    return float(guess)


def _affine(timesteps: Tensor, table: Tensor) -> tuple[float | None, float]:
    """Slope (None if there is none) and offset of what the denoiser is told, over the scheduler's timestep."""
    told = table.double()
    tolerance = max(float(told.abs().max()), 1e-12) * (
        1e-5 if not table.is_floating_point() else 8 * torch.finfo(table.dtype).eps
    )

    def fits(slope: float, offset: float) -> bool:
        return bool(((slope * timesteps + offset - told).abs() <= tolerance).all())

    for slope, offset in _UNITS:
        if fits(slope, offset):
            return slope, offset
    span = float(timesteps[0] - timesteps[-1])
    if not span:
        return None, 0.0
    slope = float(told[0] - told[-1]) / span
    slope = next(
        (s for s in (float(f"{slope:.6g}"), slope) if fits(s, float(told[0]) - s * float(timesteps[0]))), slope
    )
    offset = float(told[0] - slope * timesteps[0])
    offset = 0.0 if abs(offset) <= tolerance else offset
    return (slope, offset) if fits(slope, offset) else (None, 0.0)

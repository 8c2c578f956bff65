"""The caller's callback under a sampler that jumps: told once of all latents it would meet, its edits kept.

A stock call tells its callback of every step.  A sampler restarts that call at other levels and with other rows, so the
callback's edits (latents, embeddings, attributes of the pipeline) are recorded with the latents they were made for, and
repeated where the same latents come by again.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

NAMES = ("callback", "callback_on_step_end")


def replayed(callback: object) -> bool:
    """Whether a callback is one of diffusers' own, which change the run at certain steps and mind no repetition."""
    return isinstance(callback, PipelineCallback | MultiPipelineCallbacks)


def unwatched(call: Mapping[str, Any], told: bool = False) -> dict[str, Any]:
    """A call without the caller's callback, and unless it is `told`, without diffusers' own."""
    return {n: v for n, v in call.items() if n not in NAMES or (told and replayed(v))}


class ForEveryRow(PipelineCallback):
    """A callback that keeps the conditioning of every row.

    diffusers' callbacks that switch guidance off keep the last row, `[-1:]`, which is all conditioning that a single image
    has; of several images it is that of the last one only, under which the call fails or draws them all alike.
    """

    def __init__(self, stock: PipelineCallback | MultiPipelineCallbacks, rows: Callable[[], int]) -> None:
        self._stock, self._rows = stock, rows

    @property
    def tensor_inputs(self) -> list[str]:
        inputs: list[str] = self._stock.tensor_inputs
        return inputs

    def __call__(self, pipeline: Any, step_index: int, timestep: Tensor, callback_kwargs: dict[str, Any]) -> Any:
        before = dict(callback_kwargs)
        return _every_row(self._stock(pipeline, step_index, timestep, callback_kwargs), before, self._rows())


def _every_row(after: dict[str, Any], before: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """What a callback returned, where it kept one row's conditioning with that of all rows."""
    for name, old in before.items():
        new = after.get(name)
        if isinstance(new, Tensor) and len(new) == 1 < rows <= len(old) and torch.equal(new, old[-1:]):
            after[name] = old[-rows:]
    return after


@dataclass(frozen=True)
class _Told:
    """What a callback made of a step: of latents [R, ...] of rows [R] (None: nothing), other tensors, attributes."""

    rows: tuple[int, ...]
    before: Tensor
    after: Tensor | None
    tensors: dict[str, Any]
    attributes: dict[str, Any]

    def places(self, rows: tuple[int, ...]) -> list[int] | None:
        """Where rows lie in this batch, or None if one is missing."""
        first = {row: i for i, row in reversed([*enumerate(self.rows)])}
        return None if any(row not in first for row in rows) else [first[row] for row in rows]

    def conditioning(self, rows: tuple[int, ...]) -> dict[str, Any]:
        """The edited tensors for other rows; those of several parts (negative, positive) lie one after the other."""
        places, count = self.places(rows), len(self.rows)
        if rows == self.rows or places is None:
            return self.tensors
        return {
            n: t[[part + p for part in range(0, len(t), count) for p in places]]
            if isinstance(t, Tensor) and len(t) % count == 0
            else t
            for n, t in self.tensors.items()
        }

    def known(self, latents: Tensor, rows: tuple[int, ...]) -> Tensor | None:
        """What the callback made of these latents, if it was told of each of them."""
        if self.after is not None and latents.requires_grad:
            return None  # its gradient has to pass the edit
        found = []
        for one, row in zip(latents.detach(), rows, strict=True):
            same = (i for i, r in enumerate(self.rows) if r == row and torch.equal(self.before[i], one))
            found.append(next(same, None))
        if None in found:
            return None
        return latents if self.after is None else self.after[found]


class Callbacks:
    """The function that a caller passed as a callback, over all the restarts of one guided call."""

    def __init__(self) -> None:
        self._told: dict[int, _Told] = {}
        self._quiet = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Evaluations that are no steps of the run, such as a value's lookahead; the callback is not told of them."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def bound(self, stock: Callable[..., Any], rows: tuple[int, ...], skip: int) -> Callable[..., Any]:
        """The callback for a stock call of some rows whose first `skip` steps are jumped over."""
        joined = skip == 0  # whether this call has the earlier edits

        def on_step_end(
            pipe: DiffusionPipeline, index: int, timestep: Tensor, inputs: dict[str, Any]
        ) -> dict[str, Any]:
            nonlocal joined
            if index < skip - 1:
                return inputs  # of a step that is passed blindly
            earlier = None if joined else self._before(index)
            joined = True
            if earlier is not None:
                inputs = {**inputs, **{n: t for n, t in earlier.conditioning(rows).items() if n in inputs}}
                vars(pipe).update(earlier.attributes)
            return self._tell(stock, pipe, index, timestep, inputs, rows, earlier)

        return on_step_end

    def plain(self, stock: Callable[..., Any], rows: tuple[int, ...], skip: int) -> Callable[..., Any]:
        """A callback of the old form (step, timestep, latents), which returns nothing."""

        def told(pipe: Any, index: int, timestep: Tensor, inputs: dict[str, Any]) -> dict[str, Any]:
            stock(index, timestep, inputs["latents"])
            return inputs

        bound = self.bound(told, rows, skip)
        return lambda index, timestep, latents: bound(SimpleNamespace(), index, timestep, {"latents": latents})

    def _before(self, index: int) -> _Told | None:
        earlier = [i for i in self._told if i < index]
        return self._told[max(earlier)] if earlier else None

    def _tell(
        self,
        stock: Callable[..., Any],
        pipe: DiffusionPipeline,
        index: int,
        timestep: Tensor,
        inputs: dict[str, Any],
        rows: tuple[int, ...],
        earlier: _Told | None,
    ) -> dict[str, Any]:
        latents: Tensor = inputs["latents"] if "latents" in inputs else torch.empty(len(rows), 0)
        told = self._told.get(index)
        after = None if told is None else told.known(latents, rows)
        if told is not None and after is not None:
            vars(pipe).update(told.attributes)
            return inputs | told.conditioning(rows) | ({"latents": after} if "latents" in inputs else {})
        if self._quiet:
            return inputs
        attributes, kept = dict(vars(pipe)), latents.detach()
        before = inputs | ({"latents": latents.clone()} if "latents" in inputs else {})  # which may be changed in place
        versions = {n: t._version for n, t in before.items() if isinstance(t, Tensor)}
        result = _every_row(dict(stock(pipe, index, timestep, dict(inputs)) or {}), before, len(rows))
        edited = {
            n: t for n, t in result.items() if t is not before.get(n) or getattr(t, "_version", None) != versions.get(n)
        }
        made = edited.pop("latents", None)
        if made is None and "latents" in inputs:
            result["latents"] = latents
        new = {n: v for n, v in vars(pipe).items() if n != "_interrupt" and attributes.get(n) is not v}
        last = earlier or self._before(index)
        self._told[index] = _Told(
            rows,
            kept,
            None if made is None or torch.equal(made, kept) else made.detach(),
            (last.conditioning(rows) if last else {}) | edited,
            (last.attributes if last else {}) | new,
        )
        return before | result

"""Record and replay: the denoiser's call of a stock pipeline as a plain module call, a level for each sample.

`Replay.record` watches the stock call (see `engine.recording`), at the cost of one denoiser evaluation of one row, and learns
what its denoiser is given, as a function of latents, level and row, and what is made of the answer.  A replayed call then
builds these arguments for any latents, levels and rows and calls the module.  No greenlet is involved and the caller's
gradient mode holds, so DDP, FSDP, `torch.compile` and gradient checkpointing see a module call like any other.

    replay = Replay.record(PipelineDenoiser(pipe, call))
    prediction = replay.denoise(x, levels=torch.tensor([0, 7, 3]), rows=torch.tensor([0, 0, 1]))
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.engine.arguments import Batch, Group, Layout, NotReplayable, size_of
from rsm_guidance.engine.denoiser import PipelineDenoiser
from rsm_guidance.engine.families import denoisers_of
from rsm_guidance.engine.learning import Learner
from rsm_guidance.engine.readout import Branch, Readout, learn_readout
from rsm_guidance.engine.recording import Answer, Blanks, Visit, ask, visits
from rsm_guidance.engine.schedulers import Levels


@dataclass(frozen=True)
class RecordedCall:
    """One call of a module at every level.

    Attributes:
        name: of the module in the pipeline.
        args, kwargs: what it is called with.
        copies, layout: how its batch holds the rows (two copies under classifier-free guidance in one pass).
    """

    name: str
    args: Group
    kwargs: Group
    copies: int
    layout: Layout


@dataclass(frozen=True)
class Blend:
    """What a pipeline puts into the latents before a level (inpainting: the known region): kept * x + known.

    Both are [N, B, ...], by level and row.
    """

    kept: Tensor
    known: Tensor

    def __call__(self, x: Tensor, levels: Tensor, rows: Tensor) -> Tensor:
        where = levels.to(self.kept.device), rows.to(self.kept.device)
        return self.kept[where] * x + self.known[where]


class Replay:
    """The denoiser's call of a stock pipeline call, recorded; make one with `record`.

    Attributes:
        pipe: the pipeline, whose modules are called.
        count: number of recorded rows B.
        levels: how model outputs are read; None where the recording was of arguments alone.
        evaluations: denoiser evaluations of replayed calls so far, by latents.
        shape: of one row's latents, without the batch.
    """

    def __init__(
        self,
        pipe: Any,
        calls: tuple[RecordedCall, ...],
        count: int,
        shape: tuple[int, ...],
        readout: Readout | None,
        blend: Blend | None,
        levels: Levels | None,
    ) -> None:
        self.pipe, self.calls, self.count, self.shape = pipe, calls, count, shape
        self.levels, self._readout, self._blend = levels, readout, blend
        self._denoisers = tuple(denoisers_of(pipe))
        self.evaluations = 0.0

    @staticmethod
    def record(denoiser: PipelineDenoiser, outputs: bool = True) -> "Replay":
        """Record a call, for all its rows.

        Args:
            denoiser: the call; it need not have run, and stays where it is.
            outputs: whether to learn what is made of the denoiser's answers, too, for which it is asked about one row.
                Without it the recording serves for `arguments` alone and no denoiser is asked anything.

        Raises:
            NotReplayable: if the call does something that replaying would miss, saying what.
            UsageError: if the pipeline's scheduler takes no single steps from level to level.
        """
        initial = denoiser.initial().detach()
        levels = denoiser.levels if outputs else None
        count = len(initial)
        base = tuple(range(count))
        random = torch.Generator().manual_seed(1)
        x, other = (torch.randn(initial.shape, generator=random).to(initial) for _ in range(2))
        blanks = Blanks(initial)

        def record(latents: Tensor, rows: tuple[int, ...], answer: Answer) -> Iterator[Visit]:
            return visits(denoiser.pipe, partial(denoiser.rehearse, latents, rows), latents, answer)

        if outputs:
            first = next(iter(record(x[:1], base[:1], ask)), None)
            for call in first.calls if first is not None else ():
                blanks.seen[call.name] = (call.output, 1)
        seen = list(record(x, base, blanks))
        others = list(record(other, base, blanks))
        more = next(iter(record(torch.cat([x, x[:1]]), (*base, 0), blanks)), None)
        if not seen or more is None:
            raise NotReplayable(f"{type(denoiser.pipe).__name__} ended without calling scheduler.step")
        calls = tuple(RecordedCall(*call) for call in Learner(seen, others, more, count).calls())
        names = {c.name for c in calls if c.name in denoisers_of(denoiser.pipe)}
        if len(names) != 1:
            raise NotReplayable(f"the call shares its levels between {len(names)} denoisers")
        readout = blend = None
        if outputs:
            branches = [
                Branch(i, copy, call.copies, call.layout)
                for i, call in enumerate(calls)
                if call.name in names
                for copy in range(call.copies)
            ]
            readout = learn_readout(seen, branches, denoiser.guidance_scales)
            blend = _learn_blend(x, other, seen, others)
        return Replay(denoiser.pipe, calls, count, tuple(initial.shape[1:]), readout, blend, levels)

    # --- replaying ---

    def denoise(
        self,
        x: Tensor,
        levels: Tensor,
        rows: Tensor | None = None,
        module: nn.Module | Mapping[str, nn.Module] | None = None,
    ) -> Prediction:
        """What `PipelineDenoiser.predict` says of latents, with a level each.

        Args:
            x: latents [R, ...] in the scheduler's scale.
            levels: int [R], each in 0..N-1.
            rows: int [R], the recorded row that each belongs to; default one latent for each row, in order.
            module: what to call in place of the recorded denoiser (a DDP wrapper, a compiled module), or several by name.

        Returns:
            x0, eps and velocity [R, ...]; under inpainting `x` has the known region as the pipeline puts it in.
        """
        if self.levels is None or self._readout is None:
            raise UsageError("this replay was recorded with outputs=False; record it with outputs=True to denoise")
        rows = self._rows(x, rows)
        if levels.shape != rows.shape or levels.is_floating_point():
            raise UsageError(
                f"{len(x)} latents need a whole-numbered level each; got levels of shape {list(levels.shape)}"
            )
        steps = self.levels.schedule.steps
        if bool(((levels < 0) | (levels >= steps)).any()):
            raise UsageError(f"levels lie in 0..{steps - 1}; got {levels.tolist()}")
        x = x if self._blend is None else self._blend(x, levels, rows)
        outputs = self._outputs(Batch(x, rows, levels, None, []), module)
        return self.levels.read_rows(x, self._readout(outputs, levels), levels)

    def call(
        self,
        x: Tensor,
        timesteps: Tensor,
        rows: Tensor | None = None,
        module: nn.Module | Mapping[str, nn.Module] | None = None,
    ) -> Tensor:
        """Model output [R, ...], in the scheduler's convention, at timesteps [R] that need not be levels of the call.

        `x` [R, ...] is in the scale of the denoiser's input (x / sqrt(1 + sigma^2) at variance-exploding levels), and
        nothing is pasted into it.  Other arguments as in `denoise`.
        """
        if self._readout is None:
            raise UsageError("this replay was recorded with outputs=False; record it with outputs=True to call it")
        rows = self._rows(x, rows)
        return self._readout(self._outputs(Batch(x, rows, None, timesteps, []), module), None)

    def arguments(
        self, x: Tensor, timesteps: Tensor, rows: Tensor | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the denoiser's one call of a level is given, positional and named; arguments as in `call`.

        Raises:
            NotReplayable: if a level takes two calls, or one over two copies of the rows (classifier-free guidance).
        """
        if self.evaluations_per_row != 1:
            raise NotReplayable("the call is guided, so a level has no single evaluation of the denoiser")
        batch = Batch(x, self._rows(x, rows), None, timesteps, [])
        for call in self.calls:
            args, kwargs = call.args.value(batch), call.kwargs.value(batch)
            if call.name in self._denoisers:
                return args, kwargs
            batch.outputs.append(getattr(self.pipe, call.name)(*args, **kwargs))
        raise AssertionError("a recording has a call of a denoiser")

    @property
    def evaluations_per_row(self) -> int:
        """Denoiser evaluations per latent: 2 with classifier-free guidance."""
        return sum(call.copies for call in self.calls if call.name in self._denoisers)

    @property
    def nbytes(self) -> int:
        """Memory of what is kept for the rows."""
        return sum(size_of(part) for call in self.calls for part in (call.args, call.kwargs))

    def _rows(self, x: Tensor, rows: Tensor | None) -> Tensor:
        if tuple(x.shape[1:]) != self.shape:
            raise UsageError(f"recorded latents have shape {list(self.shape)} each; got {list(x.shape[1:])}")
        rows = torch.arange(len(x), device=x.device) if rows is None else rows.to(x.device)
        if rows.shape != (len(x),) or bool(((rows < 0) | (rows >= self.count)).any()):
            raise UsageError(f"{len(x)} latents need a row in 0..{self.count - 1} each; got {rows.tolist()}")
        return rows

    def _outputs(self, batch: Batch, module: nn.Module | Mapping[str, nn.Module] | None) -> list[Any]:
        given = dict.fromkeys(self._denoisers, module) if isinstance(module, nn.Module) else module or {}
        for call in self.calls:
            called = given[call.name] if call.name in given else getattr(self.pipe, call.name)
            batch.outputs.append(called(*call.args.value(batch), **call.kwargs.value(batch)))
            if call.name in self._denoisers:
                self.evaluations += call.copies * len(batch.x)
        return batch.outputs

    # --- rows of recordings ---

    def pick(self, rows: Sequence[int]) -> "Replay":
        """The recording of some of its rows, in a new order."""
        index = torch.tensor(list(rows))
        calls = tuple(
            replace(c, args=c.args.pick(index, self.count), kwargs=c.kwargs.pick(index, self.count)) for c in self.calls
        )
        blend = self._blend and Blend(self._blend.kept[:, index], self._blend.known[:, index])
        return Replay(self.pipe, calls, len(index), self.shape, self._readout, blend, self.levels)

    def kept(self) -> dict[str, Tensor]:
        """Of a recording of one row: the tensors that it keeps for the row, by their place in the call."""
        found: dict[str, Tensor] = {}
        for number, call in enumerate(self.calls):
            found |= call.args.kept(f"{number}.args") | call.kwargs.kept(f"{number}.kwargs")
        return found

    def keeping(self, tensors: Mapping[str, Tensor]) -> "Replay":
        """The recording of one row with other tensors, as `kept` names them: the row of another prompt."""
        calls = tuple(
            replace(
                call,
                args=call.args.keeping(f"{number}.args", tensors),
                kwargs=call.kwargs.keeping(f"{number}.kwargs", tensors),
            )
            for number, call in enumerate(self.calls)
        )
        return Replay(self.pipe, calls, self.count, self.shape, self._readout, self._blend, self.levels)

    @staticmethod
    def joined(replays: Sequence["Replay"]) -> "Replay":
        """One recording of the rows of several, of the same kind of call.

        Raises:
            NotReplayable: if their conditioning does not fit together, such as texts that were padded to other lengths.
        """
        first, *others = replays
        if not others:
            return first
        if any([c.name for c in o.calls] != [c.name for c in first.calls] or o.shape != first.shape for o in others):
            raise NotReplayable("the recordings are of different calls")
        calls = tuple(
            replace(c, args=c.args.join([m.args for m in more]), kwargs=c.kwargs.join([m.kwargs for m in more]))
            for c, *more in zip(*(r.calls for r in replays), strict=True)
        )
        blend = first._blend
        if blend is not None:
            parts = [b for r in replays if (b := r._blend) is not None]
            blend = Blend(torch.cat([b.kept for b in parts], 1), torch.cat([b.known for b in parts], 1))
        count = sum(r.count for r in replays)
        return Replay(first.pipe, calls, count, first.shape, first._readout, blend, first.levels)


def _learn_blend(x: Tensor, other: Tensor, seen: Sequence[Visit], others: Sequence[Visit]) -> Blend | None:
    """What the pipeline puts into the latents before a level, from what it made of two; None if nothing."""
    if all(torch.equal(v.sample, x) for v in seen):
        return None
    kept, known = [], []
    for a, b in zip(seen, others, strict=True):
        share = ((a.sample.double() - b.sample) / (x.double() - other)).to(x.dtype)
        share = torch.where(a.sample == b.sample, 0, share)  # exactly, where the mask is 0 or 1
        share = torch.where((a.sample == x) & (b.sample == other), 1, share)
        kept.append(share)
        known.append(torch.where(share == 1, 0, a.sample - share * x))
        close = 1e-4 if x.dtype.itemsize >= 4 else 0.05
        if not torch.allclose(share * other + known[-1], b.sample, rtol=close, atol=close):
            raise NotReplayable("what the pipeline does to the latents between two levels is no blend with known ones")
    return Blend(torch.stack(kept), torch.stack(known))

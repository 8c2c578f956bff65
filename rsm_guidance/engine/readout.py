"""What a stock pipeline does between its denoiser and `scheduler.step`, told from recordings of random answers.

Up to now that is: the first channels or tokens of the answer, or an axis of length 1 less; a sign; and, of two passes,
uncond + s (cond - uncond), which some families give the norm of cond along the last axis.  Anything else is refused.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.rows import per_row
from rsm_guidance.engine.arguments import Layout, NotReplayable
from rsm_guidance.engine.recording import Visit


@dataclass(frozen=True)
class Branch:
    """One pass of the denoiser: call number, and which of the copies of the rows in it."""

    call: int
    copy: int
    copies: int
    layout: Layout

    def read(self, outputs: Sequence[Any], shape: tuple[int, ...]) -> Tensor:
        """Its answer [R, ...], cut to the latents' shape (without the batch)."""
        answer = outputs[self.call]
        answer = answer[0] if isinstance(answer, tuple) else answer
        answer = torch.stack(answer) if isinstance(answer, list) else answer
        if self.copies > 1:
            count = len(answer) // self.copies
            blocks = self.layout == "blocks"
            answer = answer[self.copy * count : (self.copy + 1) * count] if blocks else answer[self.copy :: self.copies]
        return _cut(answer, shape)


@dataclass(frozen=True)
class Readout:
    """Model outputs from the denoiser's answers.

    Attributes:
        branches: one, or the base and the one that guidance goes towards.
        sign: 1 or -1.
        scales: float64 [N], guidance scale by level; empty without guidance.
        normalized: whether the result takes the norm of the second branch along the last axis.
        shape: of the latents, without the batch.
        dtype: of model outputs.
    """

    branches: tuple[Branch, ...]
    sign: int
    scales: Tensor
    normalized: bool
    shape: tuple[int, ...]
    dtype: torch.dtype

    def __call__(self, outputs: Sequence[Any], levels: Tensor | None) -> Tensor:
        """Model outputs [R, ...] in the scheduler's convention."""
        read = [b.read(outputs, self.shape) for b in self.branches]
        if max(r.dtype.itemsize for r in read) < self.dtype.itemsize:
            read = [r.to(self.dtype) for r in read]
        result = read[0]
        if len(read) == 2:
            result = _guided(read[0], read[1], self._scale(levels, read[0]), self.normalized)
        return (-result if self.sign < 0 else result).to(self.dtype)

    def _scale(self, levels: Tensor | None, like: Tensor) -> Tensor | float:
        if bool((self.scales == self.scales[0]).all()):
            return float(self.scales[0])
        if levels is None:
            raise NotReplayable("the guidance scale changes from level to level; it can be replayed at levels only")
        return per_row(self.scales.to(like.dtype)[levels.cpu()], like)


def _guided(base: Tensor, towards: Tensor, scale: Tensor | float, normalized: bool) -> Tensor:
    result = base + scale * (towards - base)
    if normalized:
        result = result * (towards.norm(dim=-1, keepdim=True) / result.norm(dim=-1, keepdim=True))
    return result


def _cut(answer: Tensor, shape: tuple[int, ...]) -> Tensor:
    """An answer without an axis of length 1, and the first entries of an axis that is longer than that of the latents."""
    if answer.ndim == len(shape) + 2:
        axis = next((a for a in range(1, answer.ndim) if answer.shape[a] == 1), None)
        answer = answer if axis is None else answer.squeeze(axis)
    if answer.ndim != len(shape) + 1:
        raise NotReplayable(f"the denoiser answers {list(answer.shape[1:])} about latents {list(shape)}")
    for axis, size in enumerate(shape, 1):
        if answer.shape[axis] < size:
            raise NotReplayable(f"the denoiser answers {list(answer.shape[1:])} about latents {list(shape)}")
        answer = answer if answer.shape[axis] == size else answer.narrow(axis, 0, size)
    return answer


def learn_readout(visits: Sequence[Visit], branches: Sequence[Branch], hints: Sequence[float]) -> Readout:
    """The readout that reproduces recorded model outputs.

    Args:
        visits: levels of a recording with answers of random numbers.
        branches: the passes of the denoiser.
        hints: guidance scales that the call may have used.

    Raises:
        NotReplayable: if there is none.
    """
    shape, dtype = tuple(visits[0].sample.shape[1:]), visits[0].model_output.dtype
    found = next(_candidates(visits, branches, hints, shape, dtype), None)
    if found is None:
        raise NotReplayable(
            f"what the pipeline makes of {len(branches)} pass{'es' * (len(branches) > 1)} of its denoiser is neither a sign nor "
            "classifier-free guidance (rescaled or truncated guidance are others); switch them or guidance off"
        )
    return found


def _candidates(
    visits: Sequence[Visit],
    branches: Sequence[Branch],
    hints: Sequence[float],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Iterator[Readout]:
    """Readouts that reproduce the recording."""
    none = torch.zeros(0, dtype=torch.float64)
    for sign in (1, -1):
        if len(branches) == 1:
            tried = [Readout((branches[0],), sign, none, False, shape, dtype)]
        elif len(branches) == 2:
            tried = []
            for pair in (tuple(branches), tuple(branches[::-1])):
                scales = torch.tensor([_scale_of(v, pair, sign, shape) for v in visits], dtype=torch.float64)
                if bool((scales >= 0).all()):
                    tried.append(Readout(pair, sign, scales, False, shape, dtype))
                for hint in hints:
                    tried.append(Readout(pair, sign, torch.full_like(scales, hint), True, shape, dtype))
        else:
            return
        yield from (readout for readout in tried if _reproduces(readout, visits))


def _scale_of(visit: Visit, pair: Sequence[Branch], sign: int, shape: tuple[int, ...]) -> float:
    """The guidance scale that fits a level best."""
    outputs = [call.output for call in visit.calls]
    base, towards = (b.read(outputs, shape).double() for b in pair)
    step = towards - base
    return round(float(((sign * visit.model_output.double() - base) * step).sum() / (step * step).sum()), 5)


def _reproduces(readout: Readout, visits: Sequence[Visit]) -> bool:
    for level, visit in enumerate(visits):
        outputs = [call.output for call in visit.calls]
        made = readout(outputs, torch.full((len(visit.sample),), level))
        if len(readout.branches) == 1:
            if not torch.equal(made, visit.model_output):
                return False
            continue
        wide = made.double() - visit.model_output.double()
        coarsest = min(b.read(outputs, readout.shape).dtype.itemsize for b in readout.branches)
        tolerance = 1e-5 if coarsest >= 4 else 2e-2
        if float(wide.abs().max()) > tolerance * float(visit.model_output.double().abs().max()):
            return False
    return True

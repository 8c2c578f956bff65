"""Which way a call can be asked for other rows, decided by what it then gives its denoiser.

The call is rehearsed with stand-ins for its denoiser (`engine.recording`), once as it is and once for picked rows, with the same
latents for each row.  A way is right if every input of the denoiser, and the latents that reach the scheduler, are those of the
picked rows.  No denoiser is evaluated; pictures are encoded once for each way that is tried.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.engine.arguments import Layout, copied
from rsm_guidance.engine.recording import Visit
from rsm_guidance.engine.stand_ins import batch_size

_LAYOUTS: tuple[Layout, ...] = ("blocks", "pairs")


def picked_rows(count: int) -> tuple[int, ...]:
    """The rows of `count` that a way is tried with: one more than there are, and none where it was."""
    return (count - 1, *range(count))


def difference(whole: Sequence[Visit], picked: Sequence[Visit], rows: Sequence[int], count: int) -> str | None:
    """What a call for some of `count` rows gives its denoiser that is not theirs; None if there is no such thing."""
    if len(whole) != len(picked):
        return "it takes another number of steps"
    for a, b in zip(whole, picked, strict=True):
        if [c.name for c in a.calls] != [c.name for c in b.calls]:
            return "it calls its modules in another order"
        if not _follows(a.sample, b.sample, rows, count):
            return "the latents at scheduler.step"
        if len(rows) == count and not _follows(a.model_output, b.model_output, rows, count):
            return "the model output at scheduler.step"
        for first, second in zip(a.calls, b.calls, strict=True):
            if first.kwargs.keys() != second.kwargs.keys() or len(first.args) != len(second.args):
                return f"the arguments of {first.name}"
            inputs = [(str(i), *pair) for i, pair in enumerate(zip(first.args, second.args, strict=True))]
            inputs += [(name, first.kwargs[name], second.kwargs[name]) for name in first.kwargs]
            batch = batch_size(first.args, first.kwargs)
            for name, x, y in inputs:
                if (len(rows) != count and _stays(x, y, batch)) or not _follows(x, y, rows, count):
                    return f"{name} of {first.name}"
    return None


def _stays(whole: Any, picked: Any, batch: int) -> bool:
    """Whether an input has the length of the whole batch where it should have that of the picked one."""
    if isinstance(whole, dict) and isinstance(picked, dict):
        return any(_stays(whole[k], picked.get(k), batch) for k in whole)
    if isinstance(whole, list | tuple) and isinstance(picked, list | tuple):
        return len(whole) == len(picked) and any(_stays(a, b, batch) for a, b in zip(whole, picked, strict=True))
    if not isinstance(whole, Tensor) or not isinstance(picked, Tensor) or not whole.ndim:
        return False
    return batch > 1 and len(whole) == batch and whole.shape == picked.shape


def _follows(whole: Any, picked: Any, rows: Sequence[int], count: int) -> bool:
    """Whether an input is the same for all rows, or that of the picked rows."""
    if isinstance(whole, Tensor) and isinstance(picked, Tensor):
        return _tensor_follows(whole, picked, rows, count)
    if isinstance(whole, dict) and isinstance(picked, dict):
        return whole.keys() == picked.keys() and all(_follows(whole[k], picked[k], rows, count) for k in whole)
    if isinstance(whole, list | tuple) and isinstance(picked, list | tuple):
        if len(whole) == len(picked):
            return all(_follows(a, b, rows, count) for a, b in zip(whole, picked, strict=True))
        copies = len(whole) // count
        if copies * count != len(whole) or copies * len(rows) != len(picked):
            return False
        orders = (copied(torch.tensor(rows), copies, count, layout).tolist() for layout in _LAYOUTS)
        return any(all(_follows(whole[i], b, rows, count) for i, b in zip(o, picked, strict=True)) for o in orders)
    try:
        return type(whole) is type(picked) and bool(whole is picked or whole == picked)
    except (ValueError, RuntimeError):  # of objects that hold tensors
        return False


def _tensor_follows(whole: Tensor, picked: Tensor, rows: Sequence[int], count: int) -> bool:
    if whole.ndim != picked.ndim or whole.dtype != picked.dtype:
        return False
    grown = [a for a in range(whole.ndim) if whole.shape[a] != picked.shape[a]]
    if not grown:
        return close(whole, picked)
    axis, copies = grown[0], whole.shape[grown[0]] // count
    if len(grown) > 1 or copies * count != whole.shape[axis] or copies * len(rows) != picked.shape[axis]:
        return False
    index = (copied(torch.tensor(rows), copies, count, layout).to(whole.device) for layout in _LAYOUTS)
    return any(close(whole.index_select(axis, i), picked) for i in index)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether tensors of one shape are equal but for what other kernels for other batches round."""
    if not a.is_floating_point() or torch.equal(a, b):
        return torch.equal(a, b)
    within = 2e-4 if a.dtype.itemsize >= 4 else 3e-2
    a, b = a.detach().float(), b.detach().float()
    return bool(torch.allclose(a, b, rtol=within, atol=within * max(float(a.abs().max()), 1e-6)))

"""Micro-batches that shrink when memory runs out, and gradients through weights that are stored in fewer bits."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

T = TypeVar("T")


@contextmanager
def cast_weights_kept(modules: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Let gradients pass modules under layerwise casting, whose weights have eight bits again before the way back.

    What autograd saves is detached from the weights, so that it keeps their cast form; it costs the memory of that.
    """
    cast = torch.is_grad_enabled() and any(
        p.is_floating_point() and p.element_size() == 1 for module in modules for p in module.parameters()
    )
    if not cast:
        yield
        return
    with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda saved: saved):
        yield


@contextmanager
def under_gradient(modules: Sequence[Any], checkpointing: bool) -> Iterator[None]:
    """Run modules where there may be a gradient: weights are kept as they were cast, activations only if wanted.

    With `checkpointing`, modules that can recompute their activations on the way back do so, and are left as they were.
    """
    able = [m for m in modules if getattr(m, "_supports_gradient_checkpointing", False)]
    chosen = [m for m in able if checkpointing and torch.is_grad_enabled() and not m.is_gradient_checkpointing]
    for module in chosen:
        module.enable_gradient_checkpointing()
    try:
        with cast_weights_kept(modules):
            yield
    finally:
        for module in chosen:
            module.disable_gradient_checkpointing()


@dataclass
class MicroBatch:
    """How many rows fit at once; halved each time that memory runs out, and remembered.

    `size` starts as the most that may be tried.
    """

    size: int

    def __call__(self, call: Callable[[slice], T], count: int) -> list[T]:
        """`call(slice)` over 0..count-1 in pieces of at most `size`; an empty count is one empty piece.

        Raises:
            MemoryError: if a single row does not fit.
        """
        results: list[T] = []
        start = 0
        while start < count or not results:
            piece = slice(start, min(start + self.size, count))
            try:
                results.append(call(piece))
            except Exception as error:
                if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                    raise
                rows = piece.stop - start
                if rows <= 1:
                    raise MemoryError(
                        "one latent alone does not fit into memory; lower the resolution or the precision, call "
                        "pipe.enable_model_cpu_offload() or pipe.vae.enable_tiling(), or pass checkpoint=True under gradient"
                    ) from error
                self.size = rows // 2
                clear_device_cache(garbage_collection=True)
                continue
            start = piece.stop
        return results

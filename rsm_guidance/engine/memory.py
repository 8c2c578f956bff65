"""Micro-batches that shrink when memory runs out."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

T = TypeVar("T")


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

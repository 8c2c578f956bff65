"""Tensors of which every process holds a part (FSDP), whole and back.  Every process calls these functions."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def sharded(tensors: Iterable[Tensor]) -> bool:
    """Whether any of some tensors lies in parts."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, each whole on every process."""
    return {name: t.full_tensor() if isinstance(t, DTensor) else t for name, t in tensors.items()}


@torch.no_grad()
def put(target: Tensor, source: Tensor) -> None:
    """Copy a whole tensor into one of the same shape, of which this process may hold a part."""
    if isinstance(target, DTensor):
        source = distribute_tensor(source.to(target.device, target.dtype), target.device_mesh, target.placements)
    target.copy_(source)

"""Arithmetic with one number per row of a batch of latents [R, ...]."""

import torch
from torch import Tensor


def per_row(numbers: Tensor, like: Tensor) -> Tensor:
    """Numbers [R] as [R, 1, ...] on the device of latents [R, ...], to be combined with them."""
    return numbers.to(like.device).view(-1, *[1] * (like.ndim - 1))


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x [R, ...] times a factor [R] per row, in the precision of x."""
    return x * per_row(factor.to(x.dtype), x)


def rows_where(condition: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """Rows [R, ...] of `new` where `condition` [R], else of `old`."""
    return torch.where(per_row(condition, new), new, old)

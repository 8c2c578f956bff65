"""What a head's outputs mean: one score, a Gaussian, or probabilities of ordered grades."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

OutputKind = Literal["scalar", "gaussian", "ordinal"]
KINDS: tuple[str, ...] = get_args(OutputKind)
_LOG_VARIANCE = 8.0  # its largest magnitude


def width_of(kind: OutputKind, grades: int) -> int:
    """Outputs that a head needs."""
    return {"scalar": 1, "gaussian": 2, "ordinal": grades}[kind]


def grade_values(outputs: Tensor) -> Tensor:
    """The grades of ordinal outputs [..., N]: evenly from 0 to 1, [N]."""
    return torch.linspace(0, 1, outputs.shape[-1], dtype=outputs.dtype, device=outputs.device)


def mean_of(outputs: Tensor, kind: OutputKind) -> Tensor:
    """The score [...] that outputs [..., N] stand for."""
    if kind == "ordinal":
        return (outputs.softmax(-1) * grade_values(outputs)).sum(-1)
    return outputs[..., 0]


def variance_of(outputs: Tensor, kind: OutputKind) -> Tensor:
    """The variance [...] of the score; 0 for scalars."""
    if kind == "ordinal":
        spread = (grade_values(outputs) - mean_of(outputs, kind)[..., None]).square()
        return (outputs.softmax(-1) * spread).sum(-1)
    if kind == "gaussian":
        return (_LOG_VARIANCE * torch.tanh(outputs[..., 1] / _LOG_VARIANCE)).exp()
    return torch.zeros_like(outputs[..., 0])


def probability_above(first: Tensor, second: Tensor, kind: OutputKind) -> Tensor:
    """How probable it is that the first of two [..., N] is the better one, a tie counting half; [...].

    Gaussian scores are independent (Thurstone's case), grades too; scalars are Bradley and Terry's.
    """
    if kind == "scalar":
        return (first[..., 0] - second[..., 0]).sigmoid()
    if kind == "gaussian":
        spread = (variance_of(first, kind) + variance_of(second, kind)).sqrt()
        return 0.5 * (1 + torch.erf((first[..., 0] - second[..., 0]) / (spread * math.sqrt(2))))
    above, tied = ordered(first, second)
    return above + tied / 2


def ordered(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Of ordinal outputs [..., N]: probabilities [...] that the first has the higher grade, and that both have the same."""
    p, q = first.softmax(-1), second.softmax(-1)
    below = q.cumsum(-1) - q
    return (p * below).sum(-1), (p * q).sum(-1)

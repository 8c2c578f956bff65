"""Turning points of a path, TP-GRPO (2602.06422).

With R_s the reward after s stochastic steps and an ODE completion (R_0 the pure ODE run, R_S the path's own reward), step s
gains d_s = R_s - R_{s-1}, and Delta = R_S - R_0 is the path's.  The step is *consistent* where sign(d_s) = sign(Delta), and a
*turning point* where it is and the step before was not.  A turning point brought about what followed, so it also gets

- "paper": R_S - R_{s-1} instead of its gain,
- "code" (the published program): eta (R_S - R_0) added to its gain.

The first step has no step before; with `first` it counts where it is consistent.
"""

from typing import Literal

import torch
from torch import Tensor


def turning_points(values: Tensor, first: bool = True) -> Tensor:
    """Whether [R, S] each step is one, of values [R, S + 1]."""
    agrees = values.diff(dim=1).sign() * (values[:, -1:] - values[:, :1]).sign()
    before = torch.cat([torch.full_like(agrees[:, :1], -1.0 if first else 0.0), agrees[:, :-1]], 1)
    return (agrees > 0) & (before < 0)


def turning_point_credit(
    values: Tensor, variant: Literal["paper", "code"] = "paper", eta: float = 1.0, first: bool = True
) -> Tensor:
    """Credit of every step [R, S], of values [R, S + 1]; see the module."""
    step, turns = values.diff(dim=1), turning_points(values, first)
    last = values[:, -1:]
    if variant == "paper":
        return torch.where(turns, last - values[:, :-1], step)
    return step + eta * turns * (last - values[:, :1])

"""Values along a path, and what each of its steps added.

A path visits states 0 (noise) to S (clean).  With V_s some estimate of the reward that state s will bring, step s gains
V_{s+1} - V_s; the gains of a path add up to its reward less what its noise promised.

- DenseGRPO (2601.20218): V_s = r(decode(ODE run from x_s to its end)), the completion of all remaining steps.
- Stepwise-Flow-GRPO (2603.28718): V_s = r(decode(x0hat(x_s))), Tweedie's estimate; cheap, biased where noise is high.
- VGPO (2512.12387): the process value Q_s = sum_{k >= s} gamma^(k - s) V_{k + 1}, from one Euler step at each next state.
"""

import torch
from torch import Tensor


def gains(values: Tensor) -> Tensor:
    """V_{s+1} - V_s: what every step of a path added, [R, S] of values [R, S + 1]."""
    return values.diff(dim=1)


def process_value(values: Tensor, discount: float) -> Tensor:
    """Q_s = sum_{k >= s} discount^(k - s) V_{k + 1}, [R, S] of values [R, S + 1]."""
    total, found = torch.zeros_like(values[:, 0]), []
    for reached in reversed(values[:, 1:].unbind(1)):
        total = reached + discount * total
        found.append(total)
    return torch.stack(found[::-1], 1)


def value_ratio(process: Tensor) -> Tensor:
    """VGPO's weights omega_s = Q_s / mean_s Q_s [R, S].

    Raises:
        ValueError: for values of mixed sign or zero mean, where the ratio has no meaning.
    """
    if not bool((process > 0).all() | (process < 0).all()):
        raise ValueError(
            "the ratio of process values Q_s / mean Q needs rewards of one sign; shift the reward to be positive, or choose "
            "the estimator 'completion-difference'"
        )
    return process / process.mean(1, keepdim=True)

"""Optimisers and learning-rate schedules.

A schedule is a factor on each group's own learning rate.  What diffusers has is taken from there.
"""

import math
from collections.abc import Sequence

import torch
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR


def adamw(
    modules: Sequence[tuple[nn.Module, float]], weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """AdamW over what is trainable of modules, each with its peak learning rate.

    Matrices decay; vectors (biases, gains of norms) do not.
    """
    groups: list[dict[str, object]] = []
    for module, lr in modules:
        trained = [p for p in module.parameters() if p.requires_grad]
        for decay, chosen in (
            (weight_decay, [p for p in trained if p.ndim > 1]),
            (0.0, [p for p in trained if p.ndim <= 1]),
        ):
            if chosen:
                groups.append({"params": chosen, "lr": lr, "weight_decay": decay})
    return torch.optim.AdamW(groups, betas=betas)


def freeze_unreached(objective: nn.Module, loss: Tensor) -> list[str]:
    """Freeze parameters that `loss` does not depend on, and return their names.

    A cut denoiser keeps some, such as the last block's text stream.  They would idle in optimiser and averages, and
    processes that train together would wait for their gradients.
    """
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    unreached = [name for name, g in zip(trained, gradients, strict=True) if g is None]
    for name in unreached:
        trained[name].requires_grad_(False)
    return unreached


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: float = 0.05) -> LambdaLR:
    """Linear warm-up over a fraction of the steps, then a half cosine to 0."""
    return get_cosine_schedule_with_warmup(optimizer, max(1, int(steps * warmup)), steps)


def cosine_cycles(
    optimizer: torch.optim.Optimizer, steps: int, restarts: Sequence[int], restart_factor: float, warmup: float = 0.03
) -> LambdaLR:
    """Cycles of `cosine` that end at each restart and at `steps`; all but the first peak at `restart_factor`.

    Ours: the schedule with hard restarts in diffusers has cycles of one length and one peak.
    """
    starts = [0, *(r for r in sorted(restarts) if r < steps)]
    ends = [*starts[1:], steps]

    def factor(step: int) -> float:
        cycle = max(i for i, start in enumerate(starts) if step >= start)
        at, length = step - starts[cycle], ends[cycle] - starts[cycle]
        warm = max(1, int(length * warmup))
        shape = (at + 1) / warm if at < warm else 0.5 * (1 + math.cos(math.pi * (at - warm) / max(1, length - warm)))
        return shape * (restart_factor if cycle else 1.0)

    return LambdaLR(optimizer, factor)

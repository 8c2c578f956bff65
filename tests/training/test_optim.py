"""Learning rates, weight decay, and what is left out of training."""

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from rsm_guidance.training import adamw, cosine, cosine_cycles
from rsm_guidance.training.optim import freeze_unreached


def rates(optimizer: torch.optim.Optimizer, scheduler: LRScheduler, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return seen


def test_the_learning_rate_rises_over_the_warmup_and_falls_along_a_cosine() -> None:
    optimizer = adamw([(nn.Linear(2, 2), 0.5)], 0.0)
    seen = rates(optimizer, cosine(optimizer, 100, 0.1), 100)
    assert seen[0] == 0 and max(seen) == seen[10] == 0.5 and seen[-1] < 0.001
    assert seen[:11] == sorted(seen[:11]) and seen[10:] == sorted(seen[10:], reverse=True)
    assert seen[55] == pytest.approx(0.25)


def test_cycles_end_at_zero_where_the_next_begins_with_its_own_peak() -> None:
    optimizer = adamw([(nn.Linear(2, 2), 2.0)], 0.0)
    seen = rates(optimizer, cosine_cycles(optimizer, 200, (50, 120, 900), 0.7, 0.1), 200)
    for start, end, peak in ((0, 50, 2.0), (50, 120, 1.4), (120, 200, 1.4)):
        cycle = seen[start:end]
        assert max(cycle) == pytest.approx(peak) and cycle[-1] < 0.01 * peak
        assert 0 < cycle[0] < peak


def test_only_matrices_decay_and_each_module_has_its_own_rate() -> None:
    model = nn.ModuleDict({"trunk": nn.Linear(2, 2), "head": nn.Linear(2, 1), "frozen": nn.Linear(2, 1)})
    model["frozen"].requires_grad_(False)
    optimizer = adamw([(model["head"], 0.5), (model["trunk"], 0.1), (model["frozen"], 0.1)], 0.3)
    found = {
        name: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
        for name, q in model.named_parameters()
        if p is q
    }
    assert found == {
        "head.weight": (0.5, 0.3),
        "head.bias": (0.5, 0.0),
        "trunk.weight": (0.1, 0.3),
        "trunk.bias": (0.1, 0.0),
    }


def test_what_the_loss_does_not_depend_on_is_frozen() -> None:
    model = nn.ModuleDict({"used": nn.Linear(2, 1), "idle": nn.Linear(2, 1)})
    assert freeze_unreached(model, model["used"](torch.ones(1, 2)).sum()) == ["idle.weight", "idle.bias"]
    assert [name for name, p in model.named_parameters() if p.requires_grad] == ["used.weight", "used.bias"]
    assert all(p.grad is None for p in model.parameters())

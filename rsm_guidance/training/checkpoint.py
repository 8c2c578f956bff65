"""Atomic, resumable training state: safetensors for every tensor, JSON for the rest, nothing pickled."""

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    flat = {}
    for index, state in optimizer.state_dict()["state"].items():
        for name, value in state.items():
            flat[f"optimizer.{index}.{name}"] = torch.as_tensor(value).contiguous()
    return flat


def save_state(
    folder: Path, step: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer, extra: dict[str, object]
) -> None:
    """Write `folder` so that an interruption at any moment leaves either the old state or the new one."""
    fresh = folder.with_name(folder.name + ".new")
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    tensors = _optimizer_tensors(optimizer)
    for name, module in modules.items():
        tensors |= {f"{name}.{k}": v.detach().clone().contiguous() for k, v in module.state_dict().items()}
    save_file(tensors, fresh / "state.safetensors")
    (fresh / "state.json").write_text(json.dumps({"step": step, **extra}))
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(fresh, folder)
    shutil.rmtree(old, ignore_errors=True)


def load_state(
    folder: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer
) -> dict[str, object] | None:
    """Restore what `save_state` wrote; None when there is nothing to resume from.

    Raises:
        ValueError: when the state is of other modules or is damaged.
    """
    source = folder if folder.exists() else folder.with_name(folder.name + ".old")
    if not source.exists():
        return None
    try:
        extra: dict[str, object] = json.loads((source / "state.json").read_text())
        tensors = load_file(source / "state.safetensors")
        for name, module in modules.items():
            prefix = name + "."
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    except Exception as error:
        raise ValueError(f"cannot resume from {source}: {error}; delete that folder to start afresh") from error
    return extra


def warmup_cosine(step: int, steps: int, warmup: float = 0.05) -> float:
    """Learning-rate factor in (0, 1]: linear warm-up over a fraction of the run, then a half cosine to 0."""
    warm = max(1, int(steps * warmup))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class Ema:
    """Exponential moving average of parameters, swapped in for saving and evaluation."""

    def __init__(self, modules: Iterable[nn.Module], decay: float = 0.998) -> None:
        self.parameters = [p for m in modules for p in m.parameters()]
        self.decay = decay
        self.shadow = nn.ParameterList([nn.Parameter(p.detach().clone(), requires_grad=False) for p in self.parameters])

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_([p.data for p in self.shadow], [p.detach() for p in self.parameters], 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the live parameters; call twice to return."""
        for average, live in zip(self.shadow, self.parameters, strict=True):
            held = live.detach().clone()
            live.copy_(average)
            average.copy_(held)

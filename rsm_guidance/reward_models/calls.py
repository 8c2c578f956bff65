"""What a reward model is called with: checks, precision, and whether a graph is kept."""

from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.contracts import UsageError


def check_call(samples: Tensor, prompts: list[str], what: str) -> None:
    """Raises TypeError or UsageError for samples (`what`: latents, images) and prompts that are none, or not as many."""
    if not (isinstance(samples, Tensor) and samples.is_floating_point()):
        kind = samples.dtype if isinstance(samples, Tensor) else type(samples).__name__
        raise TypeError(f"a reward model takes {what} as a tensor of real numbers, then their prompts; got {kind}")
    if isinstance(prompts, str) or not all(isinstance(p, str) for p in prompts):
        raise TypeError(f"prompts are a list of one string for each of the {what}; got {type(prompts).__name__}")
    if len(samples) != len(prompts):
        raise UsageError(f"{len(prompts)} prompts need {len(prompts)} {what}; got {list(samples.shape)}")


def graph_for(latents: Tensor) -> torch.set_grad_enabled:
    """Scores carry a graph where the latents ask for one; the model's own parameters learn through `scorer`."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and latents.requires_grad)


def cast(value: Any, old: torch.dtype, new: torch.dtype) -> Any:
    """Arguments of a denoiser of one dtype for a copy of it in another."""
    if isinstance(value, Tensor):
        return value.to(new) if value.dtype == old else value
    if isinstance(value, dict):
        return {k: cast(v, old, new) for k, v in value.items()}
    return type(value)(cast(v, old, new) for v in value) if isinstance(value, list | tuple) else value

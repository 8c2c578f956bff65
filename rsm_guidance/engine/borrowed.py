"""What a stock call changes outside of its pipeline and scheduler: attention processors of modules, global random numbers.

A paused loop has them exchanged for what they were outside, as it has the attributes of the pipeline.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Processors:
    """The attention processors of modules; perturbed-attention guidance and others replace them for their call."""

    def __init__(self, modules: Iterable[Any]) -> None:
        parts = [part for m in modules if isinstance(m, nn.Module) for part in m.modules()]
        self._parts = [p for p in parts if "processor" in vars(p) or "processor" in p._modules]

    def now(self) -> list[Any]:
        """The processors in use."""
        return [vars(p).get("processor") or p._modules.get("processor") for p in self._parts]

    def put(self, processors: list[Any]) -> None:
        """Use other ones."""
        for part, processor in zip(self._parts, processors, strict=True):
            inside = isinstance(processor, nn.Module)
            (vars(part) if inside else part._modules).pop("processor", None)
            if inside:
                part._modules["processor"] = processor
            else:
                vars(part)["processor"] = processor


State = tuple[torch.Tensor, ...]
"""States of torch's global generators: of the CPU and, where there is one, of the device."""


class GlobalRandom:
    """torch's global generators, from which some pipelines draw although they were given one of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device if device.type == "cuda" else None

    def now(self) -> State:
        """Their states."""
        if self._device is None:
            return (torch.get_rng_state(),)
        return torch.get_rng_state(), torch.cuda.get_rng_state(self._device)

    def put(self, state: State) -> None:
        """Set them."""
        torch.set_rng_state(state[0])
        if self._device is not None:
            torch.cuda.set_rng_state(state[1], self._device)

    def seeded(self, seed: int) -> State:
        """The states that a seed gives."""
        own = torch.Generator().manual_seed(seed % 2**63).get_state()
        if self._device is None:
            return (own,)
        return own, torch.Generator(self._device).manual_seed(seed % 2**63).get_state()

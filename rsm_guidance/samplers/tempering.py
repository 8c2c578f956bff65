"""How values become the weights of Feynman-Kac steering: potentials, and their tempering at noisy levels."""

from typing import Literal, Protocol

import torch
from torch import Tensor

from rsm_guidance.core.weights import effective_sample_size
from rsm_guidance.samplers.kernel import State

POTENTIALS = ("difference", "max", "sum")
TEMPERINGS = ("none", "polynomial", "adaptive")
_BISECTIONS = 40


class Tempered(Protocol):
    """The settings that matter here; see `fk_steering.FKSteering`."""

    @property
    def potential(self) -> Literal["difference", "max", "sum"]: ...
    @property
    def tempering(self) -> Literal["none", "polynomial", "adaptive"]: ...
    @property
    def power(self) -> float: ...
    @property
    def threshold(self) -> float: ...


def start(config: Tempered, count: int, k: int) -> dict[str, Tensor]:
    """What K particles [B, K] carry at first: the potentials paid so far, the running one, and gamma."""
    zero = torch.zeros(count, k, dtype=torch.float64)
    return {"potentials": zero, "running": zero - torch.inf if config.potential == "max" else zero, "gamma": zero}


def potential(config: Tempered, state: State, phi: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """What is carried on [B, K], and log G_t [B, K], of the tempered values phi [B, K] at one of so many weighed levels."""
    if config.potential == "difference":
        return phi, phi - state.carried["potentials"]
    if config.potential == "max":
        running = torch.maximum(state.carried["running"], phi)
        return running, running / levels
    running = state.carried["running"] + phi
    return running, running / (levels * (levels + 1) / 2)


def gamma(config: Tempered, state: State, values: Tensor, progress: float, levels: int) -> Tensor:
    """gamma [B, K] of a level, for values V / lambda [B, K]; `progress` is the share of the run that lies behind.

    "adaptive" takes the largest gamma, from that of the level before on, with which `threshold` K effective particles
    remain.  It depends on the particles, which biases Z at order 1 / K.
    """
    if config.tempering == "none":
        return torch.ones_like(values)
    if config.tempering == "polynomial":
        return torch.full_like(values, progress**config.power)

    def enough(trial: Tensor) -> Tensor:
        weights = state.log_weights + potential(config, state, trial[:, None] * values, levels)[1]
        return effective_sample_size(weights) >= config.threshold * state.k

    low = state.carried["gamma"][:, 0].clone()
    high = torch.ones_like(low)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        good = enough(middle)
        low, high = torch.where(good, middle, low), torch.where(good, high, middle)
    return torch.where(enough(torch.ones_like(low)), 1.0, low)[:, None].expand_as(values)

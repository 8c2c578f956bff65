"""How unlike standard normal noise a vector of numbers is; what noise optimization pays for leaving the noise.

- Chi prior (ReNO, arXiv 2406.04312): K(x) = |x|^2 / 2 - (d - 1) log |x|, least at the length that noise has.
- Concentration tests (DNO, arXiv 2405.18881): the numbers are cut into m vectors of dimension k, whose mean and covariance
  deviate from 0 and I by more than they do with a probability below

      p1 = 2 exp(-m |mean|^2 / 2k),    p2 = 2 exp(-m max(sqrt(1 + |cov - I|) - 1 - sqrt(k / m), 0)^2 / 2);

  K = -log p1 - log p2 as far as they are below 1.
"""

import math

import torch
from torch import Tensor

from rsm_guidance.core.rows import scaled

_VECTOR = 4  # k


def chi_gradient(numbers: Tensor) -> Tensor:
    """Gradient of the chi prior at numbers [B, D]."""
    return scaled(numbers, 1 - (numbers.shape[1] - 1) / numbers.square().sum(1).clamp(min=1e-12))


def improbability_gradient(numbers: Tensor, orders: Tensor) -> Tensor:
    """Gradient [B, D] of DNO's K at numbers [B, D], averaged over permutations of theirs [P, B, D]."""
    with torch.enable_grad():
        leaf = numbers.detach().requires_grad_()
        total = improbability(leaf.expand(len(orders), -1, -1).gather(2, orders)).mean(0).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
    return gradient


def improbability(numbers: Tensor, k: int = _VECTOR) -> Tensor:
    """-log p1 - log p2 of DNO's tests for numbers [..., D] to be standard normal, cut into vectors of dimension k; [...]."""
    k = min(k, numbers.shape[-1])
    m = numbers.shape[-1] // k
    vectors = numbers[..., : m * k].reshape(*numbers.shape[:-1], m, k)
    log_p1 = math.log(2) - m * vectors.mean(-2).square().sum(-1) / (2 * k)
    covariance = vectors.transpose(-1, -2) @ vectors / m
    deviation: Tensor = torch.linalg.matrix_norm(covariance - torch.eye(k).to(covariance), ord=2)
    excess = ((1 + deviation).sqrt() - 1 - math.sqrt(k / m)).clamp(min=0)
    log_p2 = math.log(2) - m * excess.square() / 2
    return -log_p1.clamp(max=0) - log_p2.clamp(max=0)

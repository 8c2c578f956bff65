"""The priors on noise in closed form."""

import math

import pytest
import torch

from rsm_guidance.core.noise_prior import chi_gradient, improbability


def spread(variance: float, count: int, mean: float = 0.0) -> torch.Tensor:
    """`count` vectors of dimension 4 (a multiple of 8) whose second moments are `variance` I, and whose mean is `mean` / 2."""
    axes = torch.cat([torch.eye(4), -torch.eye(4)]).double() * math.sqrt(4 * variance)
    return (axes.repeat(count // 8, 1) + mean / 2).flatten()


@pytest.mark.parametrize(("variance", "count"), [(1.0, 8), (1.2, 8), (2.5, 8), (9.0, 8), (9.0, 16), (4.0, 64)])
def test_the_covariance_counts_as_far_as_it_exceeds_what_chance_explains(variance: float, count: int) -> None:
    excess = max(math.sqrt(1 + abs(variance - 1)) - 1 - math.sqrt(4 / count), 0.0)
    log_p = math.log(2) - count * excess**2 / 2
    assert float(improbability(spread(variance, count))) == pytest.approx(max(-log_p, 0.0), abs=1e-9)


def test_the_mean_counts_as_far_as_it_is_improbable() -> None:
    for mean in (0.1, 2.0):
        numbers = torch.full((4 * 64,), mean / 2, dtype=torch.float64) + spread(1e-9, 64)
        log_p1 = math.log(2) - 64 * mean**2 / 8  # |mean|^2 of the vector is mean^2
        covariance = torch.full((4, 4), mean**2 / 4, dtype=torch.float64) - torch.eye(4)
        excess = max(math.sqrt(1 + float(torch.linalg.matrix_norm(covariance, ord=2))) - 1 - 0.25, 0.0)
        log_p2 = math.log(2) - 64 * excess**2 / 2
        expected = max(-log_p1, 0.0) + max(-log_p2, 0.0)
        assert float(improbability(numbers)) == pytest.approx(expected, abs=1e-6)


def test_the_chi_prior_is_least_at_the_length_of_noise() -> None:
    numbers = torch.randn(3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    numbers = numbers / numbers.norm(dim=1, keepdim=True) * torch.tensor([[1.0], [3.0], [4.0]])  # sqrt(d - 1) = 3
    gradient = chi_gradient(numbers)
    along = (gradient * numbers).sum(1)
    assert along[0] < 0 < along[2] and gradient[1].abs().max() < 1e-9
    leaf = numbers.clone().requires_grad_()
    (leaf.square().sum(1) / 2 - 9 * leaf.norm(dim=1).log()).sum().backward()
    assert torch.allclose(gradient, leaf.grad)

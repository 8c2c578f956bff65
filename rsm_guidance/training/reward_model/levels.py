"""At which noise levels a reward model is trained: laws over the levels of the generator's own scheduler, by name.

A law is a pure function (count, table, generator, **constants) -> indices [count] into the table.  `uniform` and
`logit-normal` draw a place in the table (as the DRM's code does: with a shift of 3 half of the levels lie above sigma .75);
`uniform-sigma` (as DiNa-LRM's does) and `beta` draw sigma itself, and take the nearest level.
"""

from collections.abc import Callable

import torch
from scipy.special import betaincinv
from torch import Tensor

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.reward_models.levels import LevelTable


def uniform(count: int, table: LevelTable, generator: torch.Generator) -> Tensor:
    """Every level of the table alike."""
    return _places(torch.rand(count, generator=generator, dtype=torch.float64), table)


def logit_normal(
    count: int, table: LevelTable, generator: torch.Generator, mean: float = 0.0, std: float = 1.0
) -> Tensor:
    """Place u = sigmoid(z) with z ~ N(mean, std^2), 0 the noisiest: a positive mean prefers cleaner levels."""
    if not std > 0:
        raise UsageError(f"logit-normal needs a positive std; got {std}")
    z = mean + std * torch.randn(count, generator=generator, dtype=torch.float64)
    return _places(z.sigmoid(), table)


def uniform_sigma(count: int, table: LevelTable, generator: torch.Generator) -> Tensor:
    """sigma ~ U(0, 1)."""
    return table.nearest(torch.rand(count, generator=generator, dtype=torch.float64))


def beta(count: int, table: LevelTable, generator: torch.Generator, a: float = 1.0, b: float = 2.0) -> Tensor:
    """sigma ~ Beta(a, b); b > a prefers cleaner levels.  The defaults are ours."""
    if not (a > 0 and b > 0):
        raise UsageError(f"beta needs positive a and b; got {a} and {b}")
    u = torch.rand(count, generator=generator, dtype=torch.float64)
    return table.nearest(torch.from_numpy(betaincinv(a, b, u.numpy())))


LEVEL_LAWS: dict[str, Callable[..., Tensor]] = {
    "uniform": uniform,
    "uniform-sigma": uniform_sigma,
    "logit-normal": logit_normal,
    "beta": beta,
}


def pair_noise(shape: torch.Size, generator: torch.Generator, shared: bool = False) -> tuple[Tensor, Tensor]:
    """Noise for both members of pairs, each of `shape`: independent, or the same one where `shared`."""
    first = torch.randn(shape, generator=generator)
    return first, first if shared else torch.randn(shape, generator=generator)


def _places(u: Tensor, table: LevelTable) -> Tensor:
    return (u * len(table)).long().clamp(0, len(table) - 1)

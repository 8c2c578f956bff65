"""Noise levels that change with the level or the depth, for the flow SDE.

DenseGRPO (2601.20218) has a diffusion psi(t) of its own for every level, found once on the base model: a run's gains dR are
taken at every level, and psi rises by 0.01 where gains of both signs are about as frequent (their counts differ by less than 2)
and falls by 0.01 where they are not.  `flow_sde` has the diffusion a sqrt(t / (1 - t)), so psi is a level-dependent a.

Dynamic-TreeRPO (2509.23352) multiplies the noise of a tree by a factor that grows linearly with depth.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import FlowSDE, Gaussian, GaussianTransition


@dataclass(frozen=True)
class LeveledSDE(GaussianTransition):
    """The flow SDE with a noise level of its own for some levels.

    Attributes:
        a: of all others.
        levels: a by level.
    """

    name: ClassVar[str] = "flow_sde"
    stochastic: ClassVar[bool] = True
    a: float
    levels: Mapping[int, float]

    def __str__(self) -> str:
        return f"{self.name} by level: " + ", ".join(f"{level}: {a:.3g}" for level, a in sorted(self.levels.items()))

    def gaussian(self, prediction: Prediction, schedule: NoiseSchedule, level: int, target: int) -> Gaussian:
        return FlowSDE(self.levels.get(level, self.a)).gaussian(prediction, schedule, level, target)


def calibrated(diffusion: float, gains: Tensor, tolerance: int = 2, step: float = 0.01) -> float:
    """psi of one level after a round of gains [N] there; never below one step, where a step would draw no noise."""
    difference = int((gains > 0).sum()) - int((gains < 0).sum())
    return max(diffusion + step if abs(difference) < tolerance else diffusion - step, step)


def flow_sde_diffusion(level_noise: float, schedule: NoiseSchedule, level: int) -> float:
    """psi of `flow_sde` with noise level a; at pure noise its denominator uses the next level, as there."""
    t = schedule.coefficients(level)[1]
    rest = 1 - (schedule.coefficients(level + 1)[1] if t >= 1 else t)
    return level_noise * math.sqrt(t / rest)


def flow_sde_level(diffusion: float, schedule: NoiseSchedule, level: int) -> float:
    """The a of `flow_sde` whose diffusion at a level is psi."""
    return diffusion / flow_sde_diffusion(1.0, schedule, level)


def depth_level(base: float, slope: float, depth: int, depths: int) -> float:
    """base (1 + slope depth / (depths - 1)) for depth 0..depths - 1."""
    return base * (1 + slope * depth / max(depths - 1, 1))

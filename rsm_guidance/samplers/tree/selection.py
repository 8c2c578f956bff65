"""How a visit descends a tree of denoising trajectories: selection rules and progressive widening."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

Draw = Callable[[], float]  # a uniform number in [0, 1)


@dataclass(frozen=True)
class Widening:
    """Progressive widening: a node visited n times may have ceil(constant n^exponent) children, and at most `branching`."""

    constant: float = 1.0
    exponent: float = 0.5
    branching: int | None = None

    def limit(self, visits: int) -> int:
        """Children allowed at a number of visits >= 1, this one included."""
        limit = math.ceil(self.constant * math.pow(visits, self.exponent) - 1e-9)
        return limit if self.branching is None else min(limit, self.branching)


class Selection(Protocol):
    """How a visit descends."""

    def choose(
        self, values: Sequence[float], completed: Sequence[int], visits: Sequence[int], parent: float, draw: Draw
    ) -> int:
        """Index of a child, given the children's values, completed and planned visits, and the parent's value.

        A child without completed visits has its parent's value.
        """
        ...


def hopeful(values: Sequence[float], completed: Sequence[int], parent: float, caution: float) -> list[float]:
    """log(Z_c + caution Z_parent / sqrt(n_c)): what a child may be worth, given that few rollouts tell little.

    The second term is a standard error: rollouts of one node scatter about as widely as its parent's value.  It is the
    guard against the finite-budget bias of Boltzmann selection (ours).
    """
    if caution == 0:
        return list(values)
    result = []
    for value, count in zip(values, completed, strict=True):
        low, high = sorted((value, math.log(caution) + parent - 0.5 * math.log(max(count, 1))))
        result.append(high + math.log1p(math.exp(low - high)) if low > -math.inf else high)
    return result


@dataclass(frozen=True)
class Boltzmann:
    """A child drawn with probability proportional to its (hopeful) value; caution 0 is DTS as published."""

    caution: float = 0.0

    def choose(
        self, values: Sequence[float], completed: Sequence[int], visits: Sequence[int], parent: float, draw: Draw
    ) -> int:
        scores = hopeful(values, completed, parent, self.caution)
        top = max(scores)
        if top == -math.inf:
            return int(draw() * len(scores))
        weights = [math.exp(s - top) for s in scores]
        left = draw() * math.fsum(weights)
        for index, weight in enumerate(weights):
            left -= weight
            if left < 0:
                return index
        return max(range(len(scores)), key=lambda i: weights[i])


@dataclass(frozen=True)
class Proportional:
    """The child whose visits lag most behind its (hopeful) value: Boltzmann selection without its dice (ours)."""

    caution: float = 0.3

    def choose(
        self, values: Sequence[float], completed: Sequence[int], visits: Sequence[int], parent: float, draw: Draw
    ) -> int:
        scores = hopeful(values, completed, parent, self.caution)
        lags = [s - math.log(v + 1) for s, v in zip(scores, visits, strict=True)]
        return max(range(len(lags)), key=lags.__getitem__)


@dataclass(frozen=True)
class UpperConfidence:
    """DTS*: argmax of value + exploration * scale() * sqrt(log N_parent / N_child); `scale` is the unit of values."""

    exploration: float = 1.0
    scale: Callable[[], float] = lambda: 1.0

    def choose(
        self, values: Sequence[float], completed: Sequence[int], visits: Sequence[int], parent: float, draw: Draw
    ) -> int:
        total, unit = math.log(max(sum(visits), 1)), self.exploration * self.scale()
        scores = [v + unit * math.sqrt(total / n) for v, n in zip(values, visits, strict=True)]
        return max(range(len(scores)), key=scores.__getitem__)

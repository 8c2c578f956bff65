"""Zeroth-order value estimators: from rewards of some images or states to the credit of every step.

An estimator says what the reward must be asked (`asks`) and turns the answers into credits [R, S], which advantages compare
within groups (`groups`):

| asks | answers |
|---|---|
| `paths` | r of finished paths [R] |
| `branches` | r of ODE completions of K children of one state [R] |
| `children` | scores of K children of one state at their own level [R] (a diffusion reward model) |
| `completions` | r of ODE completions of every state of a path [R, S + 1] |
| `estimates` | r of Tweedie's estimates at every state of a path [R, S + 1] |
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from rsm_guidance.training.alignment.estimators.differences import gains, process_value, value_ratio
from rsm_guidance.training.alignment.estimators.groups import balance, node_values, terminal
from rsm_guidance.training.alignment.estimators.turning_points import turning_point_credit, turning_points

Asks = Literal["paths", "branches", "children", "completions", "estimates"]


@dataclass(frozen=True)
class Estimator:
    """What to ask of the reward, and how to read its answers.

    Attributes:
        asks: see the module.
        credit: answers and named constants to credits [R, S]; of `branches` and `children`, which have one step a row, [R, 1].
    """

    asks: Asks
    credit: Callable[..., Tensor]


def _single(scores: Tensor) -> Tensor:
    return scores[:, None]


def _terminal(rewards: Tensor, steps: int = 1) -> Tensor:
    return terminal(rewards, steps)


ESTIMATORS: dict[str, Estimator] = {
    "terminal": Estimator("paths", _terminal),
    "branch-group": Estimator("branches", _single),
    "immediate": Estimator("children", _single),
    "completion-difference": Estimator("completions", gains),
    "tweedie-difference": Estimator("estimates", gains),
    "turning-point": Estimator("completions", turning_point_credit),
    "process-value": Estimator("estimates", process_value),
}
"""The estimators by name."""


def estimate(name: str, answers: Tensor, **constants: Any) -> Tensor:
    """Credits [R, S] by the estimator of that name."""
    return ESTIMATORS[name].credit(answers, **constants)


__all__ = [
    "ESTIMATORS",
    "Asks",
    "Estimator",
    "balance",
    "estimate",
    "gains",
    "node_values",
    "process_value",
    "terminal",
    "turning_point_credit",
    "turning_points",
    "value_ratio",
]

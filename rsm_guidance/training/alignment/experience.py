"""What a policy's samples teach: its rollouts as flat rows, a level each, that batches and micro-batches can be cut from.

A row is one step of one trajectory, as `rollouts.record.Step` has it: where the step was, what was predicted and drawn there, where
it led.  `steps_of` makes such steps of rows again, one for each level among them, so that log-probabilities are those of
`Step` and nothing is written twice.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.rollouts import Rollout, Step


def rows_of(rollout: Rollout, schedule: NoiseSchedule, levels: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Rows [M] of the steps that drew noise, level by level: those of the first such step first, in its order.

    The last step of a chain draws none: it ends at its mean.

    Args:
        rollout: finished trajectories.
        schedule: of their denoiser.
        levels: which of its levels; default all that drew noise.

    Returns:
        "x", "x0", "eps", "noise" and "next", each [M, ...]; "velocity" [M, ...] where the model predicts one; "level", "target" and
        "row" (of the prompts), int [M]; and "trajectory" int [M], a place among the steps' own.

    Raises:
        ValueError: if none of the levels drew noise.
    """
    noisy = [s for s in rollout.stochastic if s.gaussian(schedule).std > 0]
    steps = [s for s in noisy if levels is None or s.level in levels]
    if not steps:
        raise ValueError(
            f"no step of this rollout drew noise at the levels {levels}; roll out by ddim, cps or flow_sde"
        )
    parts = [_fields(step) for step in steps]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _fields(step: Step) -> dict[str, Tensor]:
    prediction, noise = step.prediction, step.noise
    assert prediction is not None and noise is not None
    count = len(step.next)
    places = torch.arange(count)
    found = {
        "x": step.x, "x0": prediction.x0, "eps": prediction.eps, "noise": noise.expand_as(step.next), "next": step.next,
        "level": torch.full((count,), step.level), "target": torch.full((count,), step.target), "row": step.rows,
        "trajectory": places,
    }  # fmt: skip
    if prediction.velocity is not None:
        found["velocity"] = prediction.velocity
    return found


def steps_of(rows: dict[str, Any], transition: Transition) -> Iterator[tuple[Tensor, Step]]:
    """For every level among rows [M]: their places, and the step that they are of."""
    level: Tensor = rows["level"]
    for number in level.unique().tolist():
        index = (level == number).nonzero().flatten()
        velocity = rows["velocity"][index] if "velocity" in rows else None
        prediction = Prediction(rows["x"][index], rows["x0"][index], rows["eps"][index], velocity)
        yield index, Step(
            int(number), int(rows["target"][index[0]]), rows["x"][index], prediction, rows["noise"][index],
            rows["next"][index], rows["row"][index], transition, torch.arange(len(index)),
        )  # fmt: skip


def log_ratios(rows: dict[str, Any], transition: Transition, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
    """log p_new - log p_old [M] of rows, in float32, for new predictions of the same latents; 0 where they are equal."""
    found = torch.zeros(len(rows["level"]), dtype=torch.float32, device=prediction.x0.device)
    parts = [
        (index, step.log_ratio(schedule, prediction.pick(index)).float()) for index, step in steps_of(rows, transition)
    ]
    return found.index_copy(0, torch.cat([i for i, _ in parts]), torch.cat([ratio for _, ratio in parts]))


def finals_of(rollout: Rollout, per_trajectory: Tensor) -> list[Tensor]:
    """What belongs to finished trajectories [R], for the rows of each step: the mean over those that come from it, [R_step]."""
    found = []
    for step, place in zip(rollout.steps, rollout.lineage(), strict=True):
        total = torch.zeros(len(step.next), dtype=per_trajectory.dtype).index_add(0, place, per_trajectory)
        count = torch.zeros(len(step.next), dtype=per_trajectory.dtype).index_add(
            0, place, torch.ones_like(per_trajectory)
        )
        found.append(total / count)
    return found

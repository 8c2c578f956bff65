"""Rows of rollouts: the steps come back, and on policy their ratio is 1, for every family, whatever the micro-batch."""

from contextlib import closing
from typing import Any

import pytest
import torch
from torch import Tensor

from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import GaussianTransition, parse_transition
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.engine.replay import Replay
from rsm_guidance.rollouts import collect
from rsm_guidance.training.alignment.experience import concatenated, finals_of, noisy_steps, paths, row_of, steps_of
from rsm_guidance.training.alignment.forms.reverse import step_log_ratio
from rsm_guidance.training.data import parts_of
from tests.zoo import ZOO


def rolled(name: str, transition: str, **options: Any) -> tuple[Any, Replay, Any]:
    """A rollout, a recording of its call, and the schedule."""
    call = ZOO[name].call() | {"num_inference_steps": 3, "generator": torch.Generator().manual_seed(0)}
    with closing(PipelineDenoiser(ZOO[name].build(), call)) as denoiser, torch.no_grad():
        streams = RandomStreams.for_prompts(0, list(denoiser.prompts))
        flow = denoiser.schedule.is_flow
        rollout = collect(
            denoiser, streams, parse_transition(transition if flow or "sde" not in transition else "ddim 1"), **options
        )
        return rollout, Replay.record(denoiser), denoiser.schedule


def ratios(rows: dict[str, Tensor], how: GaussianTransition, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
    found = torch.zeros(len(rows["level"]))
    for index, new, old, _, _ in steps_of(rows, how, schedule, prediction):
        found[index] = step_log_ratio(new, old, rows["next"][index]).float()
    return found


@pytest.mark.parametrize("name", ZOO)
def test_the_ratio_is_1_on_policy_for_every_family_whatever_the_micro_batch(name: str) -> None:
    rollout, replay, schedule = rolled(name, "flow_sde 0.7", group=2)
    steps = noisy_steps(rollout, schedule)
    rows, how = concatenated([row_of(step, schedule) for step in steps]), steps[0].transition
    assert isinstance(how, GaussianTransition)
    recorded = [step.prediction for step in steps if step.prediction is not None]
    assert not ratios(rows, how, schedule, Prediction.joined(recorded)).any(), "exactly, for the recorded predictions"
    for micro in (1, 3):
        for part in parts_of(rows, micro):
            with torch.no_grad():
                new = replay.denoise(part["x"], part["level"], part["row"])
            assert float(ratios(part, how, schedule, new).abs().max()) < 5e-6, "a twentieth of a clip of 1e-4"


def test_rows_are_the_steps() -> None:
    rollout, _, schedule = rolled("sd3", "cps 0.9", group=2, window=(0, 2))
    steps = noisy_steps(rollout, schedule)
    assert [s.level for s in steps] == [0, 1], "the levels outside of the window drew nothing"
    rows = paths(steps, schedule)
    for place, step in enumerate(steps):
        assert torch.equal(rows["next"][:, place], step.next) and torch.equal(rows["x"][:, place], step.x)
        assert torch.equal(rows["mean"][:, place], step.gaussian(schedule).mean)
        assert rows["level"][:, place].tolist() == [step.level] * 2
    rollout, _, schedule = rolled("sd3", "ode", group=2)
    with pytest.raises(ValueError, match="no step of this rollout drew noise"):
        noisy_steps(rollout, schedule)


def test_a_step_has_the_mean_of_what_comes_of_it() -> None:
    rollout, _, _ = rolled("sd3", "cps 0.9", group=2, splits={1: 3})
    rewards = torch.arange(2.0 * len(rollout.rows)).view(-1, 2)
    found = finals_of(rollout, rewards)
    assert [len(f) for f in found] == [len(s.next) for s in rollout.steps]
    assert torch.equal(found[-1], rewards) and torch.equal(found[1], rewards)
    assert torch.equal(found[0], rewards.view(-1, 3, 2).mean(1)), "of a stem: the mean over its branches"

"""Rows of rollouts: the steps come back, and on policy their ratio is 1, whatever the micro-batch."""

from contextlib import closing
from typing import Any

import pytest
import torch

from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import parse_transition
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.engine.replay import Replay
from rsm_guidance.rollouts import collect
from rsm_guidance.training.alignment.experience import finals_of, log_ratios, rows_of, steps_of
from rsm_guidance.training.data import parts_of
from tests.zoo import ZOO


def rolled(name: str, transition: str, **options: Any) -> tuple[Any, Replay, Any]:
    """A rollout, a recording of its call, and the schedule."""
    call = ZOO[name].call() | {"num_inference_steps": 4, "generator": torch.Generator().manual_seed(0)}
    with closing(PipelineDenoiser(ZOO[name].build(), call)) as denoiser, torch.no_grad():
        streams = RandomStreams.for_prompts(0, list(denoiser.prompts))
        rollout = collect(denoiser, streams, parse_transition(transition), **options)
        return rollout, Replay.record(denoiser), denoiser.schedule


@pytest.mark.parametrize(
    ("name", "transition"),
    [("sd15", "ddim 1"), ("sdxl", "ddim 1"), ("sd3", "flow_sde 0.7"), ("flux", "cps 0.9"), ("wan", "flow_sde 0.7")],
)
def test_the_ratio_is_1_on_policy_whatever_the_micro_batch(name: str, transition: str) -> None:
    rollout, replay, schedule = rolled(name, transition, group=3)
    rows, how = rows_of(rollout, schedule), parse_transition(transition)
    assert len(rows["x"]) == sum(len(s.next) for s in rollout.steps[:-1]), "the last step draws no noise"
    same = Prediction(rows["x"], rows["x0"], rows["eps"], rows.get("velocity"))
    assert not log_ratios(rows, how, schedule, same).any(), "exactly, for the recorded predictions"
    dims = rows["x"][0].numel()
    for micro in (1, 2, 5):
        for part in parts_of(rows, micro):
            with torch.no_grad():
                new = replay.denoise(part["x"], part["level"], part["row"])
            assert float(log_ratios(part, how, schedule, new).abs().max()) / dims < 1e-6


def test_rows_are_the_steps() -> None:
    rollout, _, schedule = rolled("sd3", "cps 0.9", group=2, window=(1, 3))
    rows = rows_of(rollout, schedule)
    assert rows["level"].unique().tolist() == [1, 2], "the levels outside of the window drew nothing"
    mixed = {name: t.flip(0) for name, t in rows.items()}
    for index, step in steps_of(mixed, parse_transition("cps 0.9")):
        own = rollout.steps[step.level]
        place = mixed["trajectory"][index]
        assert torch.equal(step.next, own.next[place]) and torch.equal(step.noise, own.noise[place])  # type: ignore[index, arg-type]
        assert torch.equal(step.log_prob(schedule), own.log_prob(schedule)[place])
    assert rows_of(rollout, schedule, [2])["level"].unique().tolist() == [2]
    with pytest.raises(ValueError, match="no step of this rollout drew noise"):
        rows_of(rollout, schedule, [0])


def test_a_step_has_the_mean_of_what_comes_of_it() -> None:
    rollout, _, _ = rolled("sd3", "cps 0.9", group=2, splits={1: 3})
    rewards = torch.arange(float(len(rollout.rows)))
    found = finals_of(rollout, rewards)
    assert [len(f) for f in found] == [len(s.next) for s in rollout.steps]
    assert torch.equal(found[-1], rewards) and torch.equal(found[1], rewards)
    assert torch.equal(found[0], rewards.view(-1, 3).mean(1)), "of a stem: the mean over its branches"

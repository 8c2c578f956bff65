"""LiDAR: exact with many lookahead samples, unguided without anything to choose."""

from typing import Any

import pytest
import torch
from torch import Tensor

from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.oracles.mixture import tilt
from rsm_guidance.samplers import Lidar, Unguided
from rsm_guidance.samplers.run import run
from tests.samplers.cases import ANCESTRAL, CASES, SCHEDULES, SHORT, problem


@pytest.mark.parametrize("name", ["flow", "vp"])
def test_many_lookahead_samples_guide_to_the_tilted_posterior(name: str) -> None:
    tilted, _ = tilt(*CASES["linear"])
    sampler = Lidar(400, 100, 1.0, 1.0, False, (0.0, 1.0), ANCESTRAL)
    x = run(sampler, problem("linear", SCHEDULES[name], 400)).latents[:, 0]
    assert abs(float(x.mean() - tilted.mean)) < 0.2
    assert abs(float((x > 0).double().mean()) - 0.982014) < 0.03


@pytest.mark.parametrize("transition", [ANCESTRAL, Transition("ode"), Transition("cps", 0.5)])
def test_it_climbs_and_does_nothing_without_a_choice(transition: Transition) -> None:
    plain = run(Unguided(transition), problem("ring", SHORT, 60))
    guided = run(
        Lidar(strength=1.0, temperature=0.01, window=(0.0, 1.0), transition=transition), problem("ring", SHORT, 60)
    )
    assert plain.rewards is not None and guided.rewards is not None
    assert guided.rewards.mean() > plain.rewards.mean() + 2
    for sampler in (Lidar(1, transition=transition), Lidar(strength=0.0, transition=transition)):
        assert torch.equal(run(sampler, problem("ring", SHORT, 60)).latents, plain.latents)
    task = problem("ring", SHORT, 60)
    task.reward = lambda x, p: torch.zeros(len(x))
    assert torch.equal(run(Lidar(transition=transition), task).latents, plain.latents)


def test_the_units_of_the_reward_do_not_matter_and_rows_are_independent() -> None:
    reference = run(Lidar(transition=ANCESTRAL), problem("ring", SHORT, 7)).latents
    task = problem("ring", SHORT, 7)
    inner = CASES["ring"][1]
    task.reward = lambda x, p: 1000 * inner(x, p) + 5
    assert torch.allclose(run(Lidar(transition=ANCESTRAL), task).latents, reference, atol=1e-5)
    alone = run(Lidar(transition=ANCESTRAL), problem("ring", SHORT, 1)).latents
    assert torch.allclose(alone[0], reference[0])


def test_a_run_cut_off_while_looking_ahead_returns_its_estimate() -> None:
    task = problem("ring", SHORT, 3)
    predict, calls = task.denoiser.predict, []

    def interrupted(x: Tensor, level: int, rows: Tensor | None = None) -> Prediction:
        calls.append(level)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(x, level, rows)

    object.__setattr__(task.denoiser, "predict", interrupted)
    output = run(Lidar(4), task)
    assert output.ledger.stopped == "interrupted" and "lookahead" not in output.trace
    assert output.latents.shape == (3, 2) and output.latents.isfinite().all()


def test_budget_interruption_and_bad_input() -> None:
    output = run(Lidar(transition=ANCESTRAL), problem("ring", SHORT, 3, evaluations=8 + 3.2 * 5))
    assert len(output.trace["lookahead"]["rewards"][0]) == 3 and output.ledger.stopped == "budget"
    assert output.ledger.evaluations <= 3 * (8 + 3.2 * 5)

    def interrupt(progress: Any) -> None:
        if progress.level == 3:
            raise KeyboardInterrupt

    task = problem("ring", SHORT, 3)
    task.progress = interrupt
    assert run(Lidar(), task).latents.isfinite().all() and task.ledger.stopped == "interrupted"
    for options, words in (
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"strength": -1.0}, "strength must be finite"),
        ({"window": (0.5, 0.5)}, "window must be"),
        ({"transition": Transition("glass")}, "guided level by level"),
    ):
        with pytest.raises(ValueError, match=words):
            Lidar(**options)  # type: ignore[arg-type]

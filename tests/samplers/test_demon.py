"""Demon on Gaussian mixtures: what z* is, that it climbs, and that it is the unguided run where nothing differs."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

import rsm_guidance as rg
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.samplers import Unguided
from rsm_guidance.samplers.demon import Demon, combine
from rsm_guidance.samplers.run import run
from tests.samplers.cases import ANCESTRAL, SHORT, ConstantValue, problem

CPS = Transition("cps", 0.9)


class Affine(ConstantValue):
    """Another value, stretched and shifted."""

    def __init__(self, inner: Any, factor: float, shift: float) -> None:
        self.inner, self.factor, self.shift = inner, factor, shift

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        return self.factor * self.inner(x, level, rows, prediction) + self.shift


@pytest.mark.parametrize("weights", ["tanh", "softmax"])
@pytest.mark.parametrize("exact", [True, False])
def test_it_climbs_and_more_noises_climb_higher(weights: Any, exact: bool) -> None:
    def mean(sampler: Any) -> float:
        rewards = run(sampler, problem("ring", SHORT, 200, exact)).rewards
        assert rewards is not None
        return float(rewards.mean())

    plain, two, many = (mean(s) for s in (Unguided(ANCESTRAL), Demon(2, weights, 1.0), Demon(16, weights, 1.0)))
    assert plain + 1 < two < many


@pytest.mark.parametrize("weights", ["tanh", "softmax"])
@pytest.mark.parametrize("transition", [ANCESTRAL, CPS])
def test_a_constant_reward_and_one_noise_are_the_unguided_run(transition: Transition, weights: Any) -> None:
    plain = run(Unguided(transition), problem("ring", SHORT, 4)).latents
    for constant in (3.0, 0.1, 1e9 + 0.3):
        task = problem("ring", SHORT, 4)
        task.value = Affine(ConstantValue(), 1.0, constant)
        assert torch.equal(run(Demon(5, weights, transition=transition), task).latents, plain)
    assert torch.equal(run(Demon(1, transition=transition), problem("ring", SHORT, 4)).latents, plain)


def test_the_noise_is_the_weighted_sum_at_the_length_of_a_noise() -> None:
    task = problem("ring", SHORT, 3)
    weights = torch.tensor([[1.0, -1.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    noise = combine(torch.stack([task.noise(task.rows, (2,), 4, [0] * 3, k) for k in range(3)], 1), weights)
    drawn = [task.streams.normal(0, (2,), "step", 0, 4, k).double() for k in range(3)]
    expected = drawn[0] - drawn[1] + 0.5 * drawn[2]
    assert torch.allclose(noise[0], expected / expected.norm() * 2**0.5, atol=1e-6)
    alone = task.streams.normal(1, (2,), "step", 0, 4, 1).double()
    assert torch.allclose(noise[1], alone / alone.norm() * 2**0.5, atol=1e-6)
    assert bool(noise[2].isnan().all()), "without weights there is no noise: the step takes its first one"


def test_the_rewards_unit_and_origin_do_not_matter_and_the_trace_says_all() -> None:
    output = run(Demon(4), problem("ring", SHORT, 5))
    trace = json.loads(json.dumps(output.trace))
    assert [entry["level"] for entry in trace["levels"]] == list(range(1, SHORT.steps))
    for entry in trace["levels"]:
        scores, weights = torch.tensor(entry["scores"]), torch.tensor(entry["weights"])
        assert scores.shape == weights.shape == (5, 4)
        assert scores.argmax(1).tolist() == entry["chosen"] and weights.abs().max() < 1
    task = problem("ring", SHORT, 5)
    task.value = Affine(task.value.inner, 1e3, 64.0)
    assert torch.allclose(run(Demon(4), task).latents, output.latents, atol=1e-6)


def test_prompts_are_independent() -> None:
    together = run(Demon(4), problem("ring", SHORT, 5)).latents
    for row in (0, 3):
        task = problem("ring", SHORT, 5)
        task.denoiser.prompts[:] = [f"point {row}"]
        task.streams = RandomStreams.for_prompts(0, [f"point {row}"])
        assert torch.allclose(run(Demon(4), task).latents[0], together[row], rtol=0, atol=1e-12)


def test_the_window_bounds_what_is_judged() -> None:
    output = run(Demon(4, window=(0.3, 0.7)), problem("ring", SHORT, 2))
    assert all(0.3 <= float(SHORT.sigma[entry["level"]]) <= 0.7 for entry in output.trace["levels"])
    assert output.ledger.value_evaluations == 2 * 4 * len(output.trace["levels"])


@pytest.mark.parametrize(("cap", "size", "levels"), [(8.0, 0, 0), (11.0, 2, 3), (19.3, 3, 7)])
def test_budget_is_a_hard_cap_that_lowers_candidates_and_then_guided_levels(cap: float, size: int, levels: int) -> None:
    output = run(Demon(4), problem("ring", SHORT, 3, evaluations=cap))
    assert output.ledger.evaluations <= 3 * cap and output.ledger.stopped == "budget"
    assert [len(entry["scores"][0]) for entry in output.trace["levels"]] == [size] * levels


def test_an_interrupted_run_returns_its_estimate() -> None:
    def interrupt(progress: Any) -> None:
        if progress.level == 3:
            raise KeyboardInterrupt

    task = problem("ring", SHORT, 3)
    task.progress = interrupt
    output = run(Demon(4), task)
    assert output.ledger.stopped == "interrupted" and output.latents.isfinite().all()


def test_through_the_pipeline(guided: Any, drm: rg.DiffusionRewardModel) -> None:
    call = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "latent", "seed": 2}
    prompts = ["two red circles and a blue square", "a red star", "three green squares"]
    plain = guided(prompt=prompts, sampler=rg.Unguided(CPS), reward=drm, **call)
    climbed = guided(prompt=prompts, sampler=Demon(8), reward=drm, **call)
    assert sum(climbed.rewards) > sum(plain.rewards)
    flat = guided(prompt=prompts, sampler=Demon(3), reward=lambda i, p: torch.zeros(len(i)), **call)
    assert torch.equal(flat.images, plain.images)


def test_bad_input() -> None:
    for options, words in (
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"weights": "linear"}, "weights must be"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"window": (0.5, 0.2)}, "window must be"),
        ({"transition": Transition("ode")}, "there must be noise to combine"),
    ):
        with pytest.raises(ValueError, match=words):
            Demon(**options)  # type: ignore[arg-type]
    task = problem("ring", SHORT, 1)
    task.value = None
    with pytest.raises(ValueError, match="scores noisy latents"):
        run(Demon(), task)

"""Backtracking on Gaussian mixtures: who goes back, what it costs, and what must not change."""

import json
from typing import Any

import pytest
import torch

import rsm_guidance as rg
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.transitions import Transition
from rsm_guidance.samplers import Unguided
from rsm_guidance.samplers.backtracking import Backtracking
from rsm_guidance.samplers.run import run
from tests.samplers.cases import ANCESTRAL, SHORT, ConstantValue, problem

ODE = Transition("ode")


@pytest.mark.parametrize("transition", [ODE, ANCESTRAL])
@pytest.mark.parametrize("threshold", [None, -2.0])
def test_it_climbs_and_more_attempts_climb_higher(threshold: float | None, transition: Transition) -> None:
    def mean(sampler: Any) -> float:
        rewards = run(sampler, problem("ring", SHORT, 200)).rewards
        assert rewards is not None
        return float(rewards.mean())

    few, many = (mean(Backtracking(n, threshold=threshold, transition=transition)) for n in (2, 12))
    assert mean(Unguided(transition)) + 1 < few < many


def test_a_fixed_bar_spends_on_the_hard_ones_and_stops_when_it_is_passed() -> None:
    output = run(Backtracking(20, threshold=-2.0, checks=1), problem("ring", SHORT, 60))
    (entry,) = output.trace["levels"]
    assert output.rewards is not None
    assert len({len(scores) for scores in entry["scores"]}) > 3, "compute adapts to the prompt"
    for row, scores in enumerate(entry["scores"]):
        assert all(s < -2 for s in scores[:-1]) and (scores[-1] >= -2 or len(scores) == 21)
        assert float(output.rewards[row]) == max(scores)
    runs = sum(len(scores) for scores in entry["scores"])
    assert output.ledger.denoiser_evaluations == 60 * SHORT.steps + (runs - 60) * 4
    visits = json.loads(json.dumps(output.trace))["visits"]
    assert [v["value"] for v in visits if v["row"] == 7] == entry["scores"][7]


def test_the_best_state_seen_goes_on_and_unused_attempts_serve_later_checks() -> None:
    output = run(Backtracking(6, checks=3, transition=ANCESTRAL), problem("ring", SHORT, 40))
    assert [entry["level"] for entry in output.trace["levels"]] == [3, 5, 8]
    used = torch.zeros(40)
    for i, entry in enumerate(output.trace["levels"]):
        for row, scores in enumerate(entry["scores"]):
            assert scores[entry["chosen"][row]] == max(scores)
            used[row] += len(scores) - 1
            assert used[row] <= 2 * (i + 1)
            passed = scores[-1] >= float(torch.tensor(scores, dtype=torch.float64).quantile(0.5)) and len(scores) > 1
            assert passed or used[row] == 2 * (i + 1)
    assert used.min() >= 3 and used.max() > used.min()


@pytest.mark.parametrize("transition", [ODE, ANCESTRAL])
@pytest.mark.parametrize("threshold", [None, 2.0, 4.0])
def test_a_constant_reward_and_no_attempts_are_the_unguided_run(threshold: Any, transition: Transition) -> None:
    plain = run(Unguided(transition), problem("ring", SHORT, 4)).latents
    task = problem("ring", SHORT, 4)
    task.reward, task.value = (lambda x, p: torch.full((len(x),), 3.0)), ConstantValue()
    sampler = Backtracking(3, threshold=threshold, transition=transition)
    assert torch.equal(run(sampler, task).latents, plain)
    assert torch.equal(run(Backtracking(0, transition=transition), problem("ring", SHORT, 4)).latents, plain)


@pytest.mark.parametrize("caps", [{}, {"evaluations": 20.0}])
def test_prompts_are_independent_in_what_they_get_and_spend(caps: dict[str, float]) -> None:
    sampler = Backtracking(5, checks=3, transition=ANCESTRAL)
    whole = run(sampler, problem("ring", SHORT, 6, **caps))
    for row in (0, 3, 5):
        task = problem("ring", SHORT, 6, **caps)
        task.denoiser.prompts[:] = [f"point {row}"]
        task.streams, task.ledger.images = RandomStreams.for_prompts(0, [f"point {row}"]), 1
        alone = run(sampler, task)
        assert torch.equal(alone.latents[0], whole.latents[row])
        own = [{k: v for k, v in visit.items() if k != "row"} for visit in whole.trace["visits"] if visit["row"] == row]
        assert [{k: v for k, v in visit.items() if k != "row"} for visit in alone.trace["visits"]] == own


@pytest.mark.parametrize("cap", [8.0, 8.6, 13.0, 30.0])
def test_budget_is_a_hard_cap(cap: float) -> None:
    output = run(Backtracking(50, threshold=1.0), problem("ring", SHORT, 3, evaluations=cap))
    assert output.ledger.evaluations <= 3 * cap + 1e-6 and output.ledger.stopped == "budget"
    assert output.rewards is not None
    few = run(Backtracking(50, checks=1, threshold=1.0), problem("ring", SHORT, 3, reward_calls=4))
    assert few.ledger.reward_calls == 12 and len(few.trace["visits"]) == 12


@pytest.mark.parametrize("when", [1, 9, 14, 22])
def test_an_interrupted_search_returns_the_best_so_far(when: int) -> None:
    calls = []

    def interrupt(progress: Any) -> None:
        calls.append(progress.level)
        if len(calls) == when:
            raise KeyboardInterrupt

    task = problem("ring", SHORT, 3)
    task.progress = interrupt
    output = run(Backtracking(20, checks=1, threshold=1.0), task)
    assert output.ledger.stopped == "interrupted" and output.latents.isfinite().all()
    assert output.rewards is not None
    if when > 8:
        (entry,) = output.trace["levels"]
        assert output.rewards.tolist() == [max(scores) for scores in entry["scores"]]


def test_through_the_pipeline(guided: Any, drm: rg.DiffusionRewardModel) -> None:
    call = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "latent", "seed": 2}
    prompts = ["two red circles and a blue square", "a red star", "three green squares"]
    plain = guided(prompt=prompts, sampler=rg.Unguided(Transition("cps", 0.9)), reward=drm, **call)
    searched = guided(prompt=prompts, sampler=Backtracking(), reward=drm, **call)
    assert sum(searched.rewards) > sum(plain.rewards)
    flat = guided(prompt=prompts, sampler=Backtracking(3), reward=lambda i, p: torch.zeros(len(i)), **call)
    assert torch.equal(flat.images, plain.images)
    alone = guided(prompt=prompts[2:], sampler=Backtracking(), reward=drm, **call)
    assert torch.allclose(alone.images[0], searched.images[2], atol=1e-3)


def test_bad_input() -> None:
    for options, words in (
        ({"attempts": -1}, "attempts must be at least 0"),
        ({"checks": 0}, "checks must be at least 1"),
        ({"back": 0.0}, r"in \(0, 1\]"),
        ({"quantile": 1.5}, "quantile must be in"),
        ({"threshold": float("nan")}, "threshold must be finite"),
        ({"transition": Transition("scheduler")}, "it is stopped at single levels"),
    ):
        with pytest.raises(ValueError, match=words):
            Backtracking(**options)  # type: ignore[arg-type]
    task = problem("ring", SHORT, 1)
    task.value = None
    with pytest.raises(ValueError, match="scores noisy latents"):
        run(Backtracking(), task)

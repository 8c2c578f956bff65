"""Samplers on the exact Gaussian-mixture denoiser, where the right answer is known."""

import pytest
import torch

from rsm_guidance.core.ledger import Budget, Ledger
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import Transition
from rsm_guidance.oracles.cases import MixtureValue
from rsm_guidance.oracles.mixture import GaussianMixture, GaussianMixtureDenoiser, QuadraticReward
from rsm_guidance.samplers import BestOfN, Sampler, StepwiseSampling, Task, Unguided
from rsm_guidance.samplers.run import run

MIXTURE = GaussianMixture.from_weights([0.5, 0.5], [[-2.0], [2.0]], 0.25)
REWARD = QuadraticReward.around(torch.tensor([2.0]), torch.tensor([1.0]))
SCHEDULE = NoiseSchedule.flow(12)
ANCESTRAL = Transition("ddim", 1.0)


def problem(count: int, budget: Budget | None = None) -> Task:
    prompts = [f"point {i}" for i in range(count)]
    denoiser = GaussianMixtureDenoiser(MIXTURE, SCHEDULE, prompts)
    value = MixtureValue(MIXTURE, REWARD, denoiser, share=0.5)
    ledger = Ledger(budget or Budget(), images=count)
    return Task(denoiser, RandomStreams.for_prompts(0, prompts), ledger, value=value)


def mean_reward(sampler: Sampler, count: int = 400) -> float:
    output = run(sampler, problem(count))
    assert output.rewards is not None
    return float(output.rewards.mean())


def test_best_of_n_matches_the_expected_maximum() -> None:
    """E[max of N draws of r] by Monte Carlo on exact samples, against best-of-N along the ancestral chain."""
    exact = MIXTURE.sample(400_000, torch.Generator().manual_seed(0))
    rewards = REWARD(exact)
    for n in (1, 2, 8):
        groups = rewards[: len(rewards) // n * n].view(-1, n).amax(1)
        sampled = run(BestOfN(n, ANCESTRAL), problem(1000)).rewards
        assert sampled is not None
        error = float(sampled.std() / 1000**0.5)
        assert abs(float(sampled.mean() - groups.mean())) < 4 * error + 0.15


def test_stepwise_with_the_exact_value_beats_unguided_and_grows_with_k() -> None:
    scores = [mean_reward(StepwiseSampling(k, ANCESTRAL)) for k in (1, 2, 6)]
    assert scores[0] == pytest.approx(mean_reward(Unguided(ANCESTRAL)))
    assert scores[0] + 2 < scores[1] < scores[2]


def test_window_and_initial_noises_restrict_the_choice() -> None:
    early = StepwiseSampling(4, ANCESTRAL, window=(0.6, 1.0))
    output = run(early, problem(5))
    assert all(SCHEDULE.sigma[entry["level"]] >= 0.6 for entry in output.trace["levels"])
    started = run(StepwiseSampling(1, ANCESTRAL, initial_candidates=5), problem(5))
    assert [entry["level"] for entry in started.trace["levels"]] == [0]
    assert len(started.trace["levels"][0]["scores"][0]) == 5


def test_temperature_interpolates_between_random_and_greedy() -> None:
    greedy = mean_reward(StepwiseSampling(4, ANCESTRAL))
    warm = mean_reward(StepwiseSampling(4, ANCESTRAL, temperature=1.0))
    hot = mean_reward(StepwiseSampling(4, ANCESTRAL, temperature=1e6))
    unguided = mean_reward(Unguided(ANCESTRAL))
    assert greedy >= warm > hot + 1.5
    assert hot == pytest.approx(unguided, abs=1.5)


def test_trajectories_are_best_of_n_over_step_wise_runs() -> None:
    one, three = StepwiseSampling(2, ANCESTRAL), StepwiseSampling(2, ANCESTRAL, trajectories=3)
    first, best = run(one, problem(50)), run(three, problem(50))
    assert first.rewards is not None and best.rewards is not None
    table = torch.tensor(best.trace["candidates"]["rewards"], dtype=torch.float64)
    assert table.shape == (50, 3)
    assert torch.allclose(table[:, 0], first.rewards), "trajectory 0 is the single run of the same seed"
    assert torch.equal(best.rewards, table.amax(1)) and best.rewards.mean() > first.rewards.mean()
    assert best.ledger.evaluations == pytest.approx(3 * first.ledger.evaluations)
    chosen_alone = run(StepwiseSampling(1, ANCESTRAL, trajectories=4), problem(50)).rewards
    bon = run(BestOfN(4, ANCESTRAL), problem(50)).rewards
    assert chosen_alone is not None and bon is not None
    assert torch.allclose(chosen_alone, bon, atol=1e-5), "one child per level leaves best-of-N"


def test_one_denoiser_evaluation_per_parent() -> None:
    task = problem(3)
    run(StepwiseSampling(5, ANCESTRAL), task)
    assert task.ledger.denoiser_evaluations == 3 * SCHEDULE.steps
    assert task.ledger.value_evaluations == 3 * (5 * (SCHEDULE.steps - 1) + 1)


@pytest.mark.parametrize("cap", [12.5, 14.0, 20.3, 30.0])
def test_budget_is_a_hard_cap(cap: float) -> None:
    for sampler in (
        StepwiseSampling(4, ANCESTRAL),
        StepwiseSampling(3, ANCESTRAL, trajectories=3),
        BestOfN(9, ANCESTRAL),
        Unguided(ANCESTRAL),
    ):
        task = problem(3, Budget(evaluations=cap))
        output = run(sampler, task)
        assert output.ledger.evaluations <= 3 * cap + 1e-6
        assert output.rewards is not None and len(output.rewards) == 3
        if sampler.name != "none":
            assert output.ledger.stopped == "budget"


def test_budget_too_small_for_one_sample_says_so() -> None:
    with pytest.raises(ValueError, match="12 steps at 1 and the final score take 12.5"):
        run(Unguided(ANCESTRAL), problem(1, Budget(evaluations=12.0)))


def test_trace_is_json_and_names_every_choice() -> None:
    import json

    output = run(StepwiseSampling(3, ANCESTRAL), problem(2))
    trace = json.loads(json.dumps(output.trace))
    assert [e["level"] for e in trace["levels"]] == list(range(1, SCHEDULE.steps))
    for entry in trace["levels"]:
        for scores, chosen in zip(entry["scores"], entry["chosen"], strict=True):
            assert scores[chosen] == max(scores)
    assert trace["sampler"]["name"] == "stepwise" and trace["rewards"] == output.rewards.tolist()

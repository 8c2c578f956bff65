"""The funnel: its population, its cost, best-of-N as its end, and that it climbs."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from rsm_guidance.core.transitions import Transition
from rsm_guidance.samplers import BestOfN, Funnel, Unguided
from rsm_guidance.samplers.run import run
from tests.samplers.cases import ANCESTRAL, SHORT, ConstantValue, problem


def test_the_population_shrinks_from_all_to_the_survivors() -> None:
    alive = Funnel(16, 2, 0.25).population(8)
    assert alive[:3] == [16, 16, 16] and alive[-1] == 2
    assert alive == sorted(alive, reverse=True) and len(alive) == 9


@pytest.mark.parametrize("sampler", [Funnel(8, 2, 0.0, ANCESTRAL), Funnel(6, 1, 0.3, Transition("glass", inner=2))])
def test_it_costs_what_it_says_and_beats_unguided(sampler: Funnel) -> None:
    task = problem("ring", SHORT, 60)
    output = run(sampler, task)
    assert output.rewards is not None
    expected, alive, kept = 0.0, sampler.candidates, sampler.population(SHORT.steps)
    for level, target in sampler.transition.jumps(SHORT):
        expected += alive * (target - level)
        if kept[target] < alive and target < SHORT.steps:
            expected, alive = expected + 0.5 * alive, kept[target]
    assert output.ledger.evaluations == pytest.approx(60 * expected)
    assert output.ledger.reward_calls == 60 * alive
    plain = run(Unguided(sampler.transition), problem("ring", SHORT, 60)).rewards
    assert plain is not None and output.rewards.mean() > plain.mean() + 2


def test_no_pruning_is_best_of_n_and_a_constant_reward_is_unguided() -> None:
    funnel, best = Funnel(4, 4, transition=ANCESTRAL), BestOfN(4, ANCESTRAL)
    assert torch.equal(run(funnel, problem("ring", SHORT, 5)).latents, run(best, problem("ring", SHORT, 5)).latents)
    plain = run(Unguided(ANCESTRAL), problem("ring", SHORT, 5)).latents
    assert torch.equal(run(Funnel(1, 1, transition=ANCESTRAL), problem("ring", SHORT, 5)).latents, plain)
    task = problem("ring", SHORT, 5)
    task.value, task.reward = ConstantValue(), lambda x, p: torch.zeros(len(x))
    assert torch.equal(run(Funnel(6, 2, transition=ANCESTRAL), task).latents, plain)


def test_rows_are_independent() -> None:
    together = run(Funnel(6, 2, transition=ANCESTRAL), problem("ring", SHORT, 7)).latents
    alone = run(Funnel(6, 2, transition=ANCESTRAL), problem("ring", SHORT, 1)).latents
    assert torch.equal(alone[0], together[0])


def test_budget_interruption_and_bad_input() -> None:
    sampler = Funnel(8, 2, transition=ANCESTRAL)
    cap = run(replace(sampler, candidates=5), problem("ring", SHORT, 1)).ledger.evaluations + 0.1
    output = run(sampler, problem("ring", SHORT, 3, evaluations=cap))
    assert output.ledger.stopped == "budget" and 3 * (cap - 4) < output.ledger.evaluations <= 3 * cap

    def interrupt(progress: Any) -> None:
        if progress.level == 3:
            raise KeyboardInterrupt

    task = problem("ring", SHORT, 3)
    task.progress = interrupt
    output = run(sampler, task)
    assert output.ledger.stopped == "interrupted" and output.latents.shape == (3, 2)
    for options, words in (
        ({"candidates": 0}, "survivors must lie between"),
        ({"survivors": 9}, "survivors must lie between"),
        ({"start": 1.0}, "start is a share"),
    ):
        with pytest.raises(ValueError, match=words):
            Funnel(**options)  # type: ignore[arg-type]

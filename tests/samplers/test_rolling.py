"""Budget-rolling selection: what is accepted, what rolls over, and what it reduces to."""

import pytest
import torch

from rsm_guidance.samplers import RollingSelection, StepwiseSampling, Unguided
from rsm_guidance.samplers.run import run
from tests.samplers.cases import ANCESTRAL, SHORT, problem


def test_a_bar_that_nothing_passes_is_step_wise_sampling_and_one_that_all_pass_is_unguided() -> None:
    never = run(RollingSelection(4, threshold=1e9, transition=ANCESTRAL), problem("ring", SHORT, 20))
    stepwise = run(StepwiseSampling(4, ANCESTRAL), problem("ring", SHORT, 20))
    assert torch.equal(never.latents, stepwise.latents)
    assert never.ledger.value_evaluations == stepwise.ledger.value_evaluations
    always = run(RollingSelection(4, threshold=-1e9, transition=ANCESTRAL), problem("ring", SHORT, 20))
    assert torch.equal(always.latents, run(Unguided(ANCESTRAL), problem("ring", SHORT, 20)).latents)
    assert always.ledger.value_evaluations == 20 * (SHORT.steps - 1)


def test_the_first_good_child_is_taken_and_unused_tries_roll_over() -> None:
    output = run(RollingSelection(3, transition=ANCESTRAL), problem("ring", SHORT, 30))
    longest = 0
    for row in range(30):
        bar, spare = -torch.inf, 0
        for entry in output.trace["levels"]:
            scores, chosen = entry["scores"][row], entry["chosen"][row]
            assert len(scores) <= 3 + spare, "no more tries than quota and savings"
            assert scores[chosen] == max(scores)
            assert all(s <= bar for s in scores[:-1]), "the first one above the bar ends the level"
            assert scores[-1] > bar or len(scores) == 3 + spare
            spare += 3 - len(scores)
            longest = max(longest, len(scores))
            bar = max(bar, max(scores))
    assert longest > 3, "savings were used"
    plain = run(Unguided(ANCESTRAL), problem("ring", SHORT, 30)).rewards
    assert output.rewards is not None and plain is not None
    assert output.rewards.mean() > plain.mean() + 1


def test_prompts_are_independent() -> None:
    together = run(RollingSelection(3, transition=ANCESTRAL), problem("ring", SHORT, 5)).latents
    fewer = run(RollingSelection(3, transition=ANCESTRAL), problem("ring", SHORT, 2)).latents
    assert torch.equal(fewer, together[:2])


def test_budget_and_bad_input() -> None:
    output = run(RollingSelection(8, transition=ANCESTRAL), problem("ring", SHORT, 4, evaluations=SHORT.steps + 4))
    assert output.ledger.stopped == "budget"
    assert output.ledger.evaluations <= 4 * (SHORT.steps + 4) + 1e-6
    with pytest.raises(ValueError, match="candidates must be at least 1"):
        RollingSelection(0)
    with pytest.raises(ValueError, match="threshold must be finite"):
        RollingSelection(threshold=float("nan"))
    task = problem("ring", SHORT, 1)
    task.value = None
    with pytest.raises(ValueError, match="scores noisy latents"):
        run(RollingSelection(), task)

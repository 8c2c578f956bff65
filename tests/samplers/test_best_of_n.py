"""Best-of-N that stops at a good enough sample: what is drawn, what is returned, what it costs."""

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import rsm_guidance as rg
from rsm_guidance.samplers import BestOfN, Unguided
from rsm_guidance.samplers.run import DeadlinePassed, run
from tests.samplers.cases import ANCESTRAL, CASES, SHORT, problem

BAR = -5.0
TRANSITIONS = [ANCESTRAL, rg.Transition("scheduler"), rg.Transition("glass", 3)]


@pytest.mark.parametrize("transition", TRANSITIONS, ids=lambda t: t.name)
def test_each_prompt_draws_until_its_first_good_sample(transition: rg.Transition) -> None:
    full = run(BestOfN(6, transition), problem("ring", SHORT, 30))
    output = run(BestOfN(6, transition, accept=BAR), problem("ring", SHORT, 30))
    drawn = []
    for row, all_rewards in enumerate(full.trace["candidates"]["rewards"]):
        first = next((i for i, r in enumerate(all_rewards) if r >= BAR), 5)
        rewards = output.trace["candidates"]["rewards"][row]
        assert rewards == all_rewards[: first + 1], "the samples are those of best-of-N, up to the first good one"
        assert output.rewards is not None and output.rewards[row] == max(rewards)
        assert rewards[output.trace["candidates"]["chosen"][row]] == max(rewards)
        drawn.append(len(rewards))
    assert min(drawn) == 1 and 1 < max(drawn) and len(set(drawn)) > 2, "some are easy and some are hard"
    reward = CASES["ring"][1]
    assert reward is not None and torch.equal(reward(output.latents, []), output.rewards)
    assert output.ledger.denoiser_evaluations * 30 * 6 == full.ledger.denoiser_evaluations * sum(drawn)
    assert output.ledger.stopped is None


def test_a_bar_that_nothing_reaches_is_best_of_n_and_one_that_all_reach_is_unguided() -> None:
    never = run(BestOfN(5, ANCESTRAL, accept=1e9), problem("ring", SHORT, 8))
    full = run(BestOfN(5, ANCESTRAL), problem("ring", SHORT, 8))
    assert torch.equal(never.latents, full.latents) and never.trace["candidates"] == full.trace["candidates"]
    always = run(BestOfN(5, ANCESTRAL, accept=-1e9), problem("ring", SHORT, 8))
    assert torch.equal(always.latents, run(Unguided(ANCESTRAL), problem("ring", SHORT, 8)).latents)
    assert always.ledger.evaluations == 8 * SHORT.steps


def test_prompts_are_independent() -> None:
    together = run(BestOfN(6, ANCESTRAL, accept=BAR), problem("ring", SHORT, 9))
    fewer = run(BestOfN(6, ANCESTRAL, accept=BAR), problem("ring", SHORT, 4))
    assert torch.equal(fewer.latents, together.latents[:4])


def test_the_budget_still_holds_and_an_interruption_keeps_the_best() -> None:
    capped = run(BestOfN(6, ANCESTRAL, accept=1e9), problem("ring", SHORT, 4, evaluations=2.5 * SHORT.steps))
    assert capped.ledger.stopped == "budget" and capped.ledger.evaluations == 4 * 2 * SHORT.steps
    task, seen = problem("ring", SHORT, 30), []

    def interrupt(progress: Any) -> None:
        seen.append(len(progress.x0))
        if len(seen) == 2 * SHORT.steps + 3:
            raise KeyboardInterrupt

    task.progress = interrupt
    cut = run(BestOfN(6, ANCESTRAL, accept=BAR), task)
    two = run(BestOfN(2, ANCESTRAL, accept=BAR), problem("ring", SHORT, 30))
    assert cut.ledger.stopped == "interrupted" and torch.equal(cut.latents, two.latents)
    assert set(seen) == {30}, "what is shown is one estimate per prompt, of those that are done, too"
    with pytest.raises(ValueError, match="accept must be finite"):
        BestOfN(accept=float("nan"))


@pytest.mark.parametrize("transition", [rg.Transition("scheduler"), rg.Transition("cps", 0.9)], ids=lambda t: t.name)
def test_in_a_pipeline_rows_drop_out(guided: DiffusionPipeline, transition: rg.Transition) -> None:
    def blueness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        easy = torch.tensor([prompt.startswith("a blue") for prompt in prompts])
        return (images[:, 2] - images[:, 0]).mean((1, 2)) + easy

    call = {"prompt": ["a red star", "a blue circle", "two red squares"], "num_inference_steps": 6, "output_type": "pt"}
    full = guided(**call, seed=4, sampler=BestOfN(3, transition), reward=blueness)
    shown: list[int] = []
    out = guided(
        **call, seed=4, sampler=BestOfN(3, transition, accept=0.5), reward=blueness,
        on_step=lambda step: shown.append(len(step.x0)),
    )  # fmt: skip
    assert [len(r) for r in out.trace["candidates"]["rewards"]] == [3, 1, 3]
    assert out.trace["candidates"]["chosen"][1] == 0 and set(shown) == {3}
    assert float((out.images[[0, 2]] - full.images[[0, 2]]).abs().max()) < 1 / 255
    assert out.ledger.denoiser_evaluations == full.ledger.denoiser_evaluations * 7 / 9


def test_an_interruption_before_the_first_step_is_passed_on() -> None:
    task = problem("ring", SHORT, 2, seconds=1e-9)
    with pytest.raises(DeadlinePassed, match="allow more time"):
        run(BestOfN(3, ANCESTRAL, accept=BAR), task)

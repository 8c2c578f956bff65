"""Search over noises: what it reduces to, that rounds climb, and the start that `follow` takes."""

import json
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, FlowMatchHeunDiscreteScheduler, StableDiffusion3Pipeline

import rsm_guidance as rg
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import Transition
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.samplers import BestOfN, Unguided
from rsm_guidance.samplers.noise_search import NoiseSearch
from rsm_guidance.samplers.run import run
from tests.samplers.cases import ANCESTRAL, SHORT, ConstantValue, problem

ODE = Transition("ode")
CALL = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np"}
PROMPTS = ["two red circles and a blue square", "a red star"]


@torch.no_grad()
@pytest.mark.parametrize("change", [False, True], ids=["stock", "heun"])
def test_following_from_the_stock_start_is_bitwise_stock(stock: StableDiffusion3Pipeline, change: bool) -> None:
    before = stock.scheduler
    if change:
        stock.scheduler = FlowMatchHeunDiscreteScheduler.from_config(before.config)
    try:
        call = CALL | {"prompt": PROMPTS, "generator": torch.Generator().manual_seed(3), "output_type": "latent"}
        reference = stock(**call).images
        call["generator"] = torch.Generator().manual_seed(3)
        with closing(PipelineDenoiser(stock, call)) as denoiser:
            start = denoiser.initial()
            *_, (_, other) = denoiser.follow(start=denoiser.initial([torch.Generator().manual_seed(i) for i in (5, 6)]))
            *_, (_, x) = denoiser.follow(start=start)
            assert torch.equal(x, reference) and not torch.allclose(other, reference, atol=0.1)
            rows = torch.tensor([1, 0, 1])
            *_, (_, several) = denoiser.follow(rows, start=start[rows])
            assert torch.allclose(several, reference[rows], atol=1e-4)
            with pytest.raises(ValueError, match="2 starting latents were given for 3 rows"):
                next(denoiser.follow(rows, start=start))
    finally:
        stock.scheduler = before


@pytest.mark.parametrize("transition", [Transition("scheduler"), ODE, ANCESTRAL])
def test_random_is_best_of_n_and_so_is_one_round_of_deterministic_steps(transition: Transition) -> None:
    best = run(BestOfN(6, transition), problem("ring", SHORT, 5))
    random = run(NoiseSearch("random", 3, 2, transition=transition), problem("ring", SHORT, 5))
    assert torch.equal(random.latents, best.latents) and random.trace["candidates"] == best.trace["candidates"]
    assert random.trace["sampler"]["name"] == "noise-search" and random.trace["sampler"]["rounds"] == 2
    if not transition.stochastic:
        one = run(NoiseSearch("zero-order", 6, 1, transition=transition), problem("ring", SHORT, 5))
        assert torch.equal(one.latents, best.latents)
        still = run(NoiseSearch("zero-order", 3, 2, radius=1.0, transition=transition), problem("ring", SHORT, 5))
        assert torch.equal(still.latents, best.latents), "neighbours at radius 1 are independent starts"


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("transition", [ODE, ANCESTRAL])
def test_a_constant_reward_leaves_the_unguided_run(transition: Transition, branches: int) -> None:
    plain = run(Unguided(transition), problem("ring", SHORT, 4)).latents
    for sampler in (
        NoiseSearch("zero-order", 3, 3, transition=transition),
        NoiseSearch("paths", 3, 2, branches=branches, transition=transition),
        NoiseSearch("paths", 1, 2, branches=branches, transition=transition),
    ):
        task = problem("ring", SHORT, 4)
        task.reward, task.value = (lambda x, p: torch.zeros(len(x))), ConstantValue()
        assert torch.equal(run(sampler, task).latents, plain)


def test_one_branch_is_best_of_n() -> None:
    best = run(BestOfN(4, ODE), problem("ring", SHORT, 5))
    paths = run(NoiseSearch("paths", 4, 3, branches=1), problem("ring", SHORT, 5))
    assert torch.equal(paths.latents, best.latents)
    assert paths.ledger.denoiser_evaluations == best.ledger.denoiser_evaluations
    assert paths.trace["sampler"]["transition"] == "ode", "the trace says how it stepped"


def test_rounds_climb_and_every_candidate_is_in_the_trace() -> None:
    output = run(NoiseSearch("zero-order", 4, 5), problem("ring", SHORT, 100))
    rounds = torch.tensor([entry["best"] for entry in output.trace["rounds"]]).mean(1)
    assert (rounds.diff() > 0).all()
    table = torch.tensor(json.loads(json.dumps(output.trace))["candidates"]["rewards"], dtype=torch.float64)
    assert table.shape == (100, 20) and output.rewards is not None
    assert torch.equal(table.amax(1), output.rewards)
    assert torch.equal(table.argmax(1), torch.tensor(output.trace["candidates"]["chosen"]))
    local = run(NoiseSearch("zero-order", 1, 20, radius=0.3), problem("ring", SHORT, 100)).rewards
    plain = run(Unguided(ODE), problem("ring", SHORT, 100)).rewards
    assert local is not None and plain is not None and local.mean() > plain.mean() + 2


@pytest.mark.parametrize("transition", [ODE, ANCESTRAL])
def test_branches_beat_as_many_independent_paths(transition: Transition) -> None:
    sampler = NoiseSearch("paths", 2, 3, branches=3, start=0.9, transition=transition)
    output = run(sampler, problem("ring", SHORT, 200))
    best = run(BestOfN(2, transition), problem("ring", SHORT, 200)).rewards
    assert output.rewards is not None and best is not None
    assert output.rewards.mean() > best.mean() + 0.5
    for entry in output.trace["levels"]:
        scores, ancestors = torch.tensor(entry["scores"]), torch.tensor(entry["ancestors"])
        assert scores.shape == ancestors.shape == (200, 6)
        assert torch.equal(scores.gather(1, ancestors[:, :2]), scores.topk(2).values), "the best two survive"


def test_neighbours_have_the_law_of_a_start_also_where_it_has_a_mean() -> None:
    """Starts N(3, 1), as an input image gives them: neighbours keep mean and variance, and lie as near as they should."""
    task = problem("ring", SHORT, 3000)
    inner = task.denoiser.initial
    object.__setattr__(task.denoiser, "initial", lambda generators=None: inner(generators) + 3)
    pivot = task.initial(0)
    near = NoiseSearch(candidates=1, radius=0.6).near(task, 1, pivot)
    assert abs(near.mean() - 3) < 0.05 and abs(near.var() - 1) < 0.05
    correlation = ((near - 3) * (pivot - 3)).mean()
    assert abs(correlation - 0.8) < 0.05


def test_noising_back_keeps_the_marginal() -> None:
    for schedule in (NoiseSchedule.flow(10), NoiseSchedule.variance_preserving(10)):
        generator = torch.Generator().manual_seed(0)
        x0, eps, noise = torch.randn(3, 100_000, generator=generator, dtype=torch.float64)
        x = schedule.noise_back(schedule.add_noise(2 * x0, eps, 7), noise, 7, 3)
        alpha, sigma = schedule.coefficients(3)
        assert float(x.var()) == pytest.approx(4 * alpha**2 + sigma**2, rel=0.02)


@pytest.mark.parametrize(
    "sampler", [NoiseSearch(), NoiseSearch(transition=ANCESTRAL), NoiseSearch("paths"), NoiseSearch("random")]
)
def test_prompts_are_independent(sampler: NoiseSearch) -> None:
    together = run(sampler, problem("ring", SHORT, 5)).latents
    for row in (0, 3):
        task = problem("ring", SHORT, 5)
        task.denoiser.prompts[:] = [f"point {row}"]
        task.streams = RandomStreams.for_prompts(0, [f"point {row}"])
        assert torch.equal(run(sampler, task).latents[0], together[row])


@pytest.mark.parametrize("cap", [SHORT.steps + 0.5, 20.0, 33.3])
@pytest.mark.parametrize("mode", ["random", "zero-order", "paths"])
def test_budget_is_a_hard_cap(mode: Any, cap: float) -> None:
    task = problem("ring", SHORT, 3, evaluations=cap)
    output = run(NoiseSearch(mode, 4, 3, transition=ANCESTRAL), task)
    assert output.ledger.evaluations <= 3 * cap + 1e-6 and output.ledger.stopped == "budget"
    assert output.rewards is not None


@pytest.mark.parametrize("mode", ["random", "zero-order", "paths"])
@pytest.mark.parametrize("when", [1, 12])
def test_an_interrupted_search_returns_the_best_so_far(mode: Any, when: int) -> None:
    calls = []

    def interrupt(progress: Any) -> None:
        calls.append(progress.level)
        if len(calls) == when:
            raise KeyboardInterrupt

    task = problem("ring", SHORT, 3)
    task.progress = interrupt
    output = run(NoiseSearch(mode, 2, 3, transition=ANCESTRAL), task)
    assert output.ledger.stopped == "interrupted" and output.latents.isfinite().all()
    assert output.latents.shape == (3, 2) and output.rewards is not None


def test_any_scheduler_is_searched_and_the_first_candidate_is_the_unguided_image(guided: DiffusionPipeline) -> None:
    before = guided.scheduler
    guided.scheduler = FlowMatchHeunDiscreteScheduler.from_config(before.config)
    try:
        plain = guided(prompt=PROMPTS, seed=2, sampler="none", **CALL).images
        bright = lambda images, prompts: images.mean((1, 2, 3))  # noqa: E731
        output = guided(prompt=PROMPTS, seed=2, sampler=NoiseSearch(candidates=2, rounds=2), reward=bright, **CALL)
        first = [row[0] for row in output.trace["candidates"]["rewards"]]
        assert np.allclose(first, plain.mean((1, 2, 3)), atol=1e-6)
        assert all(r >= f for r, f in zip(output.rewards, first, strict=True))
        flat = guided(prompt=PROMPTS, seed=2, sampler=NoiseSearch(), reward=lambda i, p: torch.zeros(len(i)), **CALL)
        assert np.array_equal(flat.images, plain)
        with pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler"):
            guided(prompt=PROMPTS, seed=2, sampler=NoiseSearch("paths"), reward=bright, **CALL)
    finally:
        guided.scheduler = before


def test_paths_through_the_pipeline_keep_rows_apart(guided: DiffusionPipeline, drm: rg.DiffusionRewardModel) -> None:
    sampler = NoiseSearch("paths", 2, 2, start=0.9)
    both = guided(prompt=PROMPTS, seed=1, sampler=sampler, reward=drm, **CALL)
    alone = guided(prompt=PROMPTS[1:], seed=1, sampler=sampler, reward=drm, **CALL)
    assert np.abs(both.images[1] - alone.images[0]).max() < 0.01
    plain = guided(prompt=PROMPTS, seed=1, sampler="best-of-n", reward=drm, **CALL)
    assert both.ledger.evaluations < 2.5 * plain.ledger.evaluations


def test_bad_input() -> None:
    for options, words in (
        ({"mode": "first-order"}, "mode must be"),
        ({"candidates": 0}, "candidates must be at least 1"),
        ({"back": 0.0}, r"back is a share in \(0, 1\]"),
        ({"radius": 0.0}, r"radius is a share in \(0, 1\]"),
        ({"start": 1.5}, r"start is a share in \(0, 1\]"),
        ({"mode": "paths", "transition": Transition("glass", inner=2)}, "branch between single levels"),
    ):
        with pytest.raises(ValueError, match=words):
            NoiseSearch(**options)  # type: ignore[arg-type]
    task = problem("ring", SHORT, 1)
    task.value = None
    with pytest.raises(ValueError, match="scores noisy latents"):
        run(NoiseSearch("paths"), task)
    task.reward = None
    with pytest.raises(ValueError, match="compares candidates"):
        run(NoiseSearch(), task)

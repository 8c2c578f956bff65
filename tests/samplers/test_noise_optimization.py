"""Gradient ascent on noises: exact gradients, checkpointing, estimated gradients, priors, and what must not change."""

import json
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

import rsm_guidance as rg
from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.noise_prior import improbability
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.transitions import Transition
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.samplers import Task, Unguided
from rsm_guidance.samplers.noise_optimization import Climb, NoiseOptimization
from rsm_guidance.samplers.run import run
from tests.samplers.cases import ANCESTRAL, CASES, SHORT, exhausted, problem

ODE = Transition("ode")
VARIANTS = [
    {"what": "initial", "transition": ODE},
    {"what": "initial", "transition": Transition("cps", 0.5)},
    {"what": "all", "transition": ANCESTRAL},
    {"what": "all", "transition": Transition("flow_sde", 0.7)},
]


def smooth(images: Tensor, prompts: list[str]) -> Tensor:
    """A reward of images that every pixel moves."""
    return (images[:, 0] - 0.5 * images[:, 1] * images[:, 2]).mean((1, 2))


def shapes(stock: StableDiffusion3Pipeline, seeds: tuple[int, ...] = (3, 4)) -> Task:
    prompts = ["two red circles and a blue square", "a red star"][: len(seeds)]
    call = {
        "prompt": prompts,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "generator": [torch.Generator().manual_seed(s) for s in seeds],
    }
    ledger = Ledger(images=len(prompts))
    return Task(PipelineDenoiser(stock, call), RandomStreams.for_prompts(0, prompts), ledger, reward=smooth)


def gradients(task: Task, **options: Any) -> list[Tensor]:
    climb = Climb(NoiseOptimization(**options), task)
    with torch.no_grad():
        exhausted(climb.evaluate(True))
        found: list[Tensor] = exhausted(climb.gradients(0))
        return found


@pytest.mark.parametrize("options", VARIANTS)
def test_the_gradient_of_a_whole_run_is_exact_and_checkpointing_does_not_change_it(options: dict[str, Any]) -> None:
    checkpointed = gradients(problem("linear", SHORT, 3), **options)
    kept = gradients(problem("linear", SHORT, 3), **options, checkpoint=False)
    assert len(kept) == (8 if options["what"] == "all" else 1)
    for a, b in zip(checkpointed, kept, strict=True):
        assert torch.equal(a, b)
    for place in range(len(kept)):  # against differences of whole runs

        def run(shift: float, place: int = place) -> Tensor:
            climb = Climb(NoiseOptimization(**options), problem("linear", SHORT, 3))
            climb.noises[place] = climb.noises[place] + shift
            exhausted(climb.evaluate(False))
            return climb.history[0]

        slope = (run(1e-3) - run(-1e-3)) / 2e-3
        assert torch.allclose(slope, kept[place][:, 0].double(), rtol=2e-2, atol=2e-2), place


@pytest.mark.parametrize("what", ["initial", "all"])
def test_checkpointing_through_the_pipeline_gives_the_same_gradients(
    stock: StableDiffusion3Pipeline, what: str
) -> None:
    transition = Transition("cps", 0.5)
    results = []
    for checkpoint in (True, False):
        task = shapes(stock)
        with closing(task.denoiser):  # type: ignore[type-var]
            results.append(gradients(task, what=what, transition=transition, checkpoint=checkpoint))
            expected = 2 * 2 * (3 + 2 * checkpoint)
            assert task.ledger.denoiser_evaluations == expected, "two levels are repeated"
            assert task.ledger.backward_passes == 2 * 3 + 2
    for a, b in zip(*results, strict=True):
        assert torch.allclose(a, b, atol=1e-7) and a.flatten(1).norm(dim=1).min() > 0
    task = shapes(stock)
    with closing(task.denoiser), torch.no_grad():  # type: ignore[type-var]
        u = torch.randn(task.initial(0).shape, generator=torch.Generator().manual_seed(1))
        rewards = []
        for h in (0.005, -0.005):
            climb = Climb(NoiseOptimization(what=what, transition=transition), task)  # type: ignore[arg-type]
            climb.noises[0] = climb.noises[0] + h * u
            exhausted(climb.evaluate(False))
            rewards.append(climb.history[0])
    slope = (rewards[0] - rewards[1]) / 0.01
    assert torch.allclose(slope, (results[0][0] * u).flatten(1).sum(1).double(), rtol=0.1, atol=1e-4)


def test_the_estimated_gradient_agrees_with_the_exact_one() -> None:
    exact = gradients(problem("ring", SHORT, 4), transition=ANCESTRAL, what="all")
    estimated = gradients(
        problem("ring", SHORT, 4), transition=ANCESTRAL, what="all", gradient="zeroth-order", perturbations=4000
    )
    for a, b in zip(exact, estimated, strict=True):
        assert (a - b).flatten(1).norm(dim=1).mean() < 0.1 * a.flatten(1).norm(dim=1).mean() + 1e-6


@pytest.mark.parametrize("gradient", ["exact", "zeroth-order"])
@pytest.mark.parametrize("options", VARIANTS)
def test_it_climbs(options: dict[str, Any], gradient: Any) -> None:
    output = run(NoiseOptimization(8, gradient=gradient, **options), problem("linear", SHORT, 60))
    table = torch.tensor(json.loads(json.dumps(output.trace))["candidates"]["rewards"], dtype=torch.float64)
    assert table.shape == (60, 9) and output.rewards is not None
    plain = run(Unguided(options["transition"]), problem("linear", SHORT, 60)).rewards
    assert plain is not None and torch.equal(table[:, 0], plain), "the climb starts at the unguided image"
    assert torch.equal(table.amax(1), output.rewards)
    assert output.rewards.mean() > plain.mean() + 0.5
    assert torch.equal(table.argmax(1), torch.tensor(output.trace["candidates"]["chosen"]))


def test_black_box_rewards_need_an_estimate_and_get_one() -> None:
    def black_box(x: Tensor, prompts: list[str]) -> Tensor:
        return torch.tensor((x.detach()[:, 0] > 0).double().numpy() + 0.1 * x.detach()[:, 0].numpy())

    task = problem("linear", SHORT, 40)
    task.reward = black_box
    with pytest.raises(ValueError, match="black_box is not differentiable.*zeroth-order"):
        run(NoiseOptimization(), task)
    task = problem("linear", SHORT, 40)
    task.reward = black_box
    output = run(NoiseOptimization(8, gradient="zeroth-order"), task)
    first = torch.tensor(output.trace["candidates"]["rewards"])[:, 0]
    assert output.rewards is not None and output.rewards.mean() > first.mean() + 0.02


@pytest.mark.parametrize("options", VARIANTS)
def test_a_constant_reward_and_no_iterations_are_the_unguided_run(options: dict[str, Any]) -> None:
    plain = run(Unguided(options["transition"]), problem("ring", SHORT, 4)).latents
    task = problem("ring", SHORT, 4)
    task.reward = lambda x, p: 2 + 0 * x.sum(1)
    assert torch.equal(run(NoiseOptimization(3, **options), task).latents, plain)
    assert torch.equal(run(NoiseOptimization(0, **options), problem("ring", SHORT, 4)).latents, plain)


@pytest.mark.parametrize("options", VARIANTS)
def test_prompts_are_independent_and_the_rewards_unit_does_not_matter(options: dict[str, Any]) -> None:
    sampler = NoiseOptimization(3, gradient="zeroth-order", **options)
    together = run(sampler, problem("ring", SHORT, 5)).latents
    for row in (0, 3):
        task = problem("ring", SHORT, 5)
        task.denoiser.prompts[:] = [f"point {row}"]
        task.streams = RandomStreams.for_prompts(0, [f"point {row}"])
        assert torch.allclose(run(sampler, task).latents[0], together[row], atol=1e-6)
    task = problem("ring", SHORT, 5)
    inner = CASES["ring"][1]
    task.reward = lambda x, p: 1e6 * inner(x, p)
    assert torch.allclose(run(sampler, task).latents, together, atol=1e-4)


def test_gradients_that_are_not_finite_are_skipped_and_the_step_shrinks() -> None:
    def fragile(x: Tensor, prompts: list[str]) -> Tensor:
        """Finite everywhere; beyond x = 1 its derivative is 0 / 0."""
        zero = 0 * x[:, 0]
        return 3 * x[:, 0] + torch.where(x[:, 0] > 1, zero, 1 + zero).sqrt()

    task = problem("linear", SHORT, 30)
    task.reward = fragile
    output = run(NoiseOptimization(6), task)
    assert output.latents.isfinite().all() and output.rewards is not None
    rates = torch.tensor([entry["rate"] for entry in output.trace["iterations"]])
    norms = [[n is None for n in entry["gradient_norm"]] for entry in output.trace["iterations"]]
    assert torch.equal(rates < 0.1, torch.tensor(norms).cumsum(0) > 0), "only rows that met NaN go on in smaller steps"
    assert 0 < torch.tensor(norms).float().mean() < 1


def test_a_run_that_overflows_keeps_the_best_image() -> None:
    task = problem("ring", SHORT, 6)
    inner, calls = task.denoiser.predict, []

    def overflowing(x: Tensor, level: int, rows: Tensor | None = None) -> Any:
        calls.append(level)
        prediction = inner(x, level, rows)
        if calls.count(SHORT.steps - 1) > 2 and level == SHORT.steps - 1:
            prediction.velocity[::2] = torch.nan  # type: ignore[index]
        return prediction

    object.__setattr__(task.denoiser, "predict", overflowing)
    with torch.no_grad():
        output = run(NoiseOptimization(5), task)
    assert output.latents.isfinite().all() and output.rewards is not None and output.rewards.isfinite().all()
    plain = run(Unguided(ODE), problem("ring", SHORT, 6)).rewards
    assert plain is not None and (output.rewards >= plain).all()


def test_the_priors_know_noise_when_they_see_it() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20, 4096, generator=generator, dtype=torch.float64)
    assert improbability(noise).mean() < 1
    for wrong in (noise + 0.1, 1.2 * noise, 0.5 * noise, torch.ones(1, 4096, dtype=torch.float64)):
        assert improbability(wrong).min() > 2
    pairs = noise[:, ::2].repeat_interleave(2, 1)  # every number twice
    assert improbability(pairs).min() > 10
    for what in ("initial", "all"):
        free, held = (NoiseOptimization(20, 0.1, what=what, prior=p, transition=ANCESTRAL) for p in (0.0, 20.0))  # type: ignore[arg-type]
        lengths = []
        for sampler in (free, held):
            climb = Climb(sampler, problem("linear", SHORT, 30))
            for i in range(20):
                exhausted(climb.evaluate(True))
                exhausted(climb.ascend(i))
            lengths.append(torch.cat(climb.noises[: climb.free], 1).norm(dim=1).mean())
        assert lengths[1] < lengths[0] - 0.3, "a prior keeps the noises short"


@pytest.mark.parametrize("gradient", ["exact", "zeroth-order"])
@pytest.mark.parametrize("cap", [8.0, 30.0, 60.0])
def test_budget_is_a_hard_cap(cap: float, gradient: Any) -> None:
    sampler = NoiseOptimization(50, gradient=gradient)
    output = run(sampler, problem("ring", SHORT, 3, evaluations=cap))
    assert output.ledger.evaluations <= 3 * cap and output.ledger.stopped == "budget"
    steps = len(output.trace["candidates"]["rewards"][0]) - 1
    assert steps == (cap - 8) // (8 + 7 + 16)
    calls = 2 + 33
    task = problem("ring", SHORT, 3, reward_calls=calls)
    assert run(sampler, task).ledger.reward_calls <= 3 * calls


@pytest.mark.parametrize("when", [3, 14, 40])
def test_an_interrupted_climb_returns_the_best_so_far(when: int) -> None:
    calls = []

    def interrupt(progress: Any) -> None:
        calls.append(progress.level)
        if len(calls) == when:
            raise KeyboardInterrupt

    task = problem("ring", SHORT, 3)
    task.progress = interrupt
    output = run(NoiseOptimization(8), task)
    assert output.ledger.stopped == "interrupted" and output.latents.isfinite().all()
    assert output.rewards is not None and output.latents.shape == (3, 2)


def test_through_the_pipeline(guided: DiffusionPipeline, drm: rg.DiffusionRewardModel) -> None:
    call = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "np", "seed": 1}
    prompts = ["two red circles and a blue square", "three blue crosses"]  # "a red star" has the highest score at once
    plain = guided(prompt=prompts, sampler=rg.Unguided(ODE), reward=drm, **call)
    none = guided(prompt=prompts, sampler=NoiseOptimization(0), reward=drm, **call)
    assert np.array_equal(none.images, plain.images)
    climbed = guided(prompt=prompts, sampler=NoiseOptimization(6), reward=drm, **call)
    assert all(a >= b for a, b in zip(climbed.rewards, plain.rewards, strict=True))
    assert sum(climbed.rewards) > sum(plain.rewards)
    estimated = guided(prompt=prompts, sampler=NoiseOptimization(2, gradient="zeroth-order"), reward=smooth_, **call)
    base = guided(prompt=prompts, sampler=rg.Unguided(ODE), reward=smooth_, **call)
    assert sum(estimated.rewards) > sum(base.rewards)
    alone = guided(prompt=prompts[1:], sampler=NoiseOptimization(6), reward=drm, **call)
    assert np.abs(alone.images[0] - climbed.images[1]).max() < 0.02


def smooth_(images: Tensor, prompts: list[str]) -> Tensor:
    return smooth(images.detach(), prompts)


def test_bad_input() -> None:
    for options, words in (
        ({"iterations": -1}, "iterations must be at least 0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"what": "some"}, "what must be one of initial, all"),
        ({"gradient": "second"}, "gradient must be one of"),
        ({"transition": Transition("scheduler")}, "the gradient goes back"),
    ):
        with pytest.raises(ValueError, match=words):
            NoiseOptimization(**options)  # type: ignore[arg-type]
    task = problem("ring", SHORT, 1)
    task.value = task.reward = None
    with pytest.raises(ValueError, match="compares candidates"):
        run(NoiseOptimization(), task)


@pytest.mark.parametrize("steps", [1, 2])
def test_one_and_few_step_models(guided: DiffusionPipeline, steps: int) -> None:
    """ReNO's case: the start alone decides the image."""

    def redness(images: Tensor, prompts: list[str]) -> Tensor:
        return (images[:, 0] - images[:, 2]).mean((1, 2))

    call: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": 1.0, "seed": 0, "reward": redness}
    prompts = ["a red star", "two blue circles"]
    plain = guided(prompts, sampler=Unguided(Transition("ode")), **call)
    out = guided(prompts, sampler=NoiseOptimization(4), **call)
    first = [row[0] for row in out.trace["candidates"]["rewards"]]
    assert first == pytest.approx(plain.rewards, abs=1e-4), "it begins with the unguided image"
    assert all(after > before + 0.01 for after, before in zip(out.rewards, plain.rewards, strict=True))

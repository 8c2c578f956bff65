"""Reward-gradient guidance on Gaussian mixtures: it climbs, its scale is its own, and zero strength is no guidance."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.oracles.cases import MixtureValue
from rsm_guidance.oracles.mixture import GaussianMixture, GaussianMixtureDenoiser, QuadraticReward, posterior, tilt
from rsm_guidance.samplers import RewardGradient, Task, Unguided
from rsm_guidance.samplers.gradients import value_and_gradient
from rsm_guidance.samplers.run import run
from tests.samplers.cases import ANCESTRAL, CASES, SCHEDULES, SHORT, ConstantValue, problem

CPS = Transition("cps", 0.9)


def mean_reward(sampler: Any, exact: bool = True, count: int = 200) -> float:
    output = run(sampler, problem("ring", SHORT, count, exact))
    assert output.latents.isfinite().all() and output.rewards is not None
    return float(output.rewards.mean())


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"push": "noise", "strength": 0.5},
        {"push": "drift", "strength": 0.3},
        {"push": "velocity", "strength": 0.3},
        {"push": "velocity", "strength": 0.3, "transition": Transition("ode")},
        {"scale": "plain", "strength": 1.0},
        {"trajectories": 3},
        {"transition": Transition("ode"), "strength": 0.3},
        {"recurrence": 3},
        {"jacobian": False},
        {"window": (0.2, 0.9)},
    ],
)
def test_it_climbs(options: dict[str, Any], exact: bool) -> None:
    sampler = RewardGradient(**{"transition": ANCESTRAL, **options})
    plain = mean_reward(Unguided(sampler.transition))
    assert mean_reward(sampler, exact) > plain + 0.5


def test_more_strength_climbs_higher_and_the_rewards_unit_does_not_matter() -> None:
    scores = [mean_reward(RewardGradient(strength, transition=ANCESTRAL)) for strength in (0.0, 0.1, 0.4)]
    assert scores[0] < scores[1] < scores[2]
    task = problem("ring", SHORT, 5)
    inner = task.value.inner

    class Scaled(ConstantValue):
        def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
            assert inner is not None
            return 1e6 * inner(x, level, rows)

    plain = run(RewardGradient(transition=ANCESTRAL), problem("ring", SHORT, 5)).latents
    task.value = Scaled()
    assert torch.allclose(run(RewardGradient(transition=ANCESTRAL), task).latents, plain, atol=1e-6)


@pytest.mark.parametrize("transition", [CPS, ANCESTRAL, Transition("ode")])
def test_no_strength_and_no_gradient_are_the_unguided_run(transition: Transition) -> None:
    plain = run(Unguided(transition), problem("ring", SHORT, 4)).latents
    assert torch.equal(run(RewardGradient(0.0, transition=transition), problem("ring", SHORT, 4)).latents, plain)
    for push in ("mean", "drift", "noise", "velocity"):
        if transition.name == "ode" and push == "noise":
            continue
        task = problem("ring", SHORT, 4)
        task.value = ConstantValue()
        guided = run(RewardGradient(0.5, push=push, transition=transition), task)  # type: ignore[arg-type]
        assert torch.equal(guided.latents, plain)
        assert guided.ledger.backward_passes == 4 * (SHORT.steps - (1 if push == "velocity" else 2))


def test_budget_interruption_and_bad_input() -> None:
    for sampler in (RewardGradient(transition=ANCESTRAL), RewardGradient(transition=ANCESTRAL, recurrence=3)):
        whole = run(sampler, problem("ring", SHORT, 3)).ledger.evaluations / 3
        output = run(sampler, problem("ring", SHORT, 3, evaluations=whole - 1))
        assert output.ledger.stopped == "budget" and output.ledger.evaluations <= 3 * (whole - 1) + 1e-6
    thrice = RewardGradient(transition=ANCESTRAL, trajectories=3)
    output = run(thrice, problem("ring", SHORT, 3, evaluations=2.5 * 20))
    assert len(output.trace["candidates"]["rewards"][0]) == 2 and output.ledger.evaluations <= 3 * 50

    def interrupt(progress: Any) -> None:
        if progress.level == 3:
            raise KeyboardInterrupt

    task = problem("ring", SHORT, 3)
    task.progress = interrupt
    output = run(RewardGradient(), task)
    assert output.ledger.stopped == "interrupted" and output.latents.isfinite().all()
    for options, words in (
        ({"strength": -1.0}, "strength must be finite"),
        ({"strength": 1.5, "push": "noise"}, "at most 1"),
        ({"recurrence": 0}, "recurrence must be at least 1"),
        ({"trajectories": 0}, "trajectories must be at least 1"),
        ({"push": "drift", "scale": "plain"}, "normalised by definition"),
        ({"push": "latents"}, "push must be one of"),
        ({"largest": 0.0}, "largest must be positive"),
        ({"largest": math.inf}, "None for no bound"),
        ({"damping": 2.0}, "scale='plain'"),
        ({"damping": -1.0, "scale": "plain"}, "damping must be finite"),
        ({"push": "noise", "transition": Transition("ode")}, "cannot be pushed"),
        ({"window": (0.5, 0.2)}, "window must be"),
    ):
        with pytest.raises(ValueError, match=words):
            RewardGradient(**options)  # type: ignore[arg-type]
    task = problem("ring", SHORT, 1)
    task.value = None
    with pytest.raises(ValueError, match="differentiable reward or value model"):
        run(RewardGradient(), task)


@pytest.mark.parametrize("name", ["flow", "vp"])
@pytest.mark.parametrize("kind", ["ode", "ddim"])
def test_plain_velocity_guidance_with_the_exact_value_is_exact(name: str, kind: Any) -> None:
    """The gradient of V is the tilted law's score minus the base's, so the run must reach the tilted posterior."""
    mixture, reward = CASES["linear"]
    tilted, _ = tilt(mixture, reward)
    sampler = RewardGradient(1.0, "velocity", "plain", None, transition=Transition(kind, 1.0))
    output = run(sampler, problem("linear", SCHEDULES[name], 2000))
    x = output.latents[:, 0]
    assert abs(float(x.mean() - tilted.mean)) < 4 * float(tilted.variance.sqrt()) / 2000**0.5 + 0.05
    assert abs(float((x > 0).double().mean()) - 0.982014) < 0.015


def test_plain_scale_is_bounded_and_broken_gradients_back_off() -> None:
    task = problem("ring", SHORT, 4)
    inner = task.value.inner

    class Exploding(ConstantValue):
        def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
            assert inner is not None
            return 1e8 * inner(x, level, rows)

    task.value = Exploding()
    for push in ("mean", "velocity"):
        latents = run(RewardGradient(1.0, push, "plain", transition=ANCESTRAL), task).latents  # type: ignore[arg-type]
        assert latents.isfinite().all() and latents.abs().max() < 50

    class Flaky(ConstantValue):
        """No gradient for row 1 at level 3."""

        def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
            assert inner is not None
            if level != 3:
                return inner(x, level, rows)
            bad = 0 * x.square().sum(1) + (rows != 1)  # the root of 0 has no derivative
            return inner(x, level, rows) + bad.sqrt()

    task = problem("ring", SHORT, 4)
    task.value = Flaky()
    output = run(RewardGradient(transition=ANCESTRAL), task)
    assert output.latents.isfinite().all()
    last = output.trace["levels"][-1]["strength"]
    assert [row[0] for row in last] == [0.2, 0.1, 0.2, 0.2]


def test_the_direct_gradient_is_that_of_the_reward_at_the_estimate() -> None:
    task = problem("ring", SHORT, 3, exact=False)
    prediction, _, gradient, _ = value_and_gradient(task, task.initial(0), 3, task.rows, jacobian=False)
    x0 = prediction.x0.clone().requires_grad_()
    (direct,) = torch.autograd.grad(CASES["ring"][1](x0).sum(), x0)
    assert torch.allclose(gradient, direct / SHORT.coefficients(3)[0])


@pytest.mark.parametrize(("push", "strength"), [("mean", 0.3), ("drift", 0.3), ("noise", 0.6)])
def test_pushes_follow_their_formulas(push: Any, strength: float) -> None:
    task = problem("ring", SHORT, 3)
    x, level = task.initial(0), 3
    prediction = task.denoiser.predict(x, level)
    gaussian = ANCESTRAL(prediction, SHORT, level, level + 1)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype)
    scale = torch.full((3,), strength, dtype=torch.float64)
    noise, jump = task.noise(task.rows, x.shape[1:], level, [0] * 3), (level, level + 1)
    pushed = RewardGradient(strength, push, transition=ANCESTRAL).pushed(SHORT, prediction, g, scale, jump, noise)
    plain = gaussian.sample(noise)
    d = g / g.square().mean(1, keepdim=True).sqrt()
    expected = {
        "mean": plain + strength * gaussian.std * d,
        "drift": plain + strength * g / g.norm(dim=1, keepdim=True),
        "noise": gaussian.mean + (1 - strength**2) ** 0.5 * (plain - gaussian.mean) + strength * gaussian.std * d,
    }[push]
    assert torch.allclose(pushed, expected, atol=1e-5)


def gaussian_task(schedule: NoiseSchedule, count: int, curvature: float = 6.0) -> tuple[Task, GaussianMixture]:
    """Anisotropy aside, what damping is exact for: one Gaussian, a round quadratic reward, Tweedie's estimate; and the answer."""
    mixture, reward = (
        GaussianMixture.from_weights([1.0], [[-1.0, 0.5]], 0.6),
        QuadraticReward.around([1.0, 0.0], curvature / 2),
    )
    prompts = [f"point {i}" for i in range(count)]
    denoiser = GaussianMixtureDenoiser(mixture, schedule, prompts)
    task = Task(
        denoiser,
        RandomStreams.for_prompts(0, prompts),
        Ledger(),
        reward,
        MixtureValue(mixture, reward, denoiser, False),
    )
    return task, tilt(mixture, reward, 0.5)[0]


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_damped_plug_in_guidance_of_a_gaussian_is_exact_and_undamped_it_overshoots(schedule: NoiseSchedule) -> None:
    for damping in (6.0, 0.0):
        task, tilted = gaussian_task(schedule, 1000)
        guided = RewardGradient(2.0, "velocity", "plain", None, damping, transition=Transition("ddim", 1.0))
        x = run(guided, task).latents
        bias, spread = (x.mean(0) - tilted.mean) / tilted.variance.sqrt(), x.var(0) / tilted.variance
        if damping:
            assert bias.abs().max() < 0.15 and ((0.75 < spread) & (spread < 1.2)).all()
        else:
            assert bias[0] > 0.5 and spread.max() < 0.6, "too near to the best, and too narrow"


@pytest.mark.parametrize("jacobian", [True, False])
def test_the_variance_along_the_gradient_is_that_of_the_posterior(jacobian: bool) -> None:
    task = problem("linear", SHORT, 6, exact=False)
    for level in (2, 5):
        x, (alpha, sigma) = task.initial(0), SHORT.coefficients(level)
        found = value_and_gradient(task, x, level, task.rows, jacobian)[3]
        exact = posterior(CASES["linear"][0], x, alpha, sigma).variance[:, 0]
        assert torch.allclose(found, exact if jacobian else torch.full_like(exact, sigma**2 / alpha**2))
    assert value_and_gradient(problem("linear", SHORT, 2), x[:2], 3, torch.arange(2))[3] is None, "no estimate is read"
    with pytest.raises(ValueError, match="damping makes up for estimates"):
        run(RewardGradient(1.0, "velocity", "plain", damping=2.0), problem("linear", SHORT, 2))


def test_plain_velocity_guidance_has_the_coefficient_of_flow_nrg() -> None:
    """v' = v - w t / (1 - t) grad r, and what follows for the step, at every level but the noisiest."""
    task, w = problem("ring", SHORT, 3), 0.7
    sampler = RewardGradient(w, "velocity", "plain", None, transition=Transition("ode"))
    for level in range(1, SHORT.steps):
        x = task.initial(0)
        prediction, _, g, _ = value_and_gradient(task, x, level, task.rows)
        t, later = float(SHORT.sigma[level]), float(SHORT.sigma[level + 1])
        strength = torch.full((3,), w, dtype=torch.float64)
        step = sampler.pushed(SHORT, prediction, g, strength, (level, level + 1), torch.zeros_like(x))
        assert prediction.velocity is not None
        assert torch.allclose(step, x + (later - t) * (prediction.velocity - w * t / (1 - t) * g)), level
    levels = [entry["level"] for entry in run(sampler, problem("ring", SHORT, 3)).trace["levels"]]
    assert levels == list(range(1, SHORT.steps))

"""Reward-gradient guidance on Gaussian mixtures: it climbs, its scale is its own, and zero strength is no guidance."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.oracles.mixture import tilt
from rsm_guidance.samplers import RewardGradient, Unguided
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
        assert guided.ledger.backward_passes == 4 * (SHORT.steps - 2)


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
    sampler = RewardGradient(1.0, "velocity", "plain", math.inf, transition=Transition(kind, 1.0))
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
    prediction, _, gradient = value_and_gradient(task, task.initial(0), 3, task.rows, jacobian=False)
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

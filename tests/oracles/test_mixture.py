"""The exact test world against published numbers, quadrature and Monte Carlo."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rsm_guidance.core.contracts import Denoiser, Reward
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import Transition
from rsm_guidance.oracles.mixture import (
    GaussianMixture,
    GaussianMixtureDenoiser,
    QuadraticReward,
    expected_reward,
    posterior,
    tilt,
    tilt_divergence,
    value,
)
from rsm_guidance.rewards import as_reward


def quoted(number: float, digits: int) -> object:
    """A printed number: right to half a unit of its last digit (and a little for the printer's own rounding)."""
    return pytest.approx(number, abs=0.51 * 10**-digits)


def pair_of_modes(variance: float = 0.25) -> GaussianMixture:
    return GaussianMixture.from_weights([0.5, 0.5], [[-2.0], [2.0]], variance)


def uneven() -> GaussianMixture:
    """Three unequal components in two dimensions with different variances; one weight is zero."""
    return GaussianMixture.from_weights(
        [3.0, 1.0, 2.0, 0.0],
        [[-1.5, 0.5], [2.0, 1.0], [0.5, -2.0], [9.0, 9.0]],
        [[0.3, 0.1], [0.05, 0.4], [0.2, 0.2], [1.0, 1.0]],
    )


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- closed-form tilts: the numbers of shared/reference/inference_guidance.md (d)


def test_grid_of_nine_gaussians() -> None:
    means = list(itertools.product((-4.0, 0.0, 4.0), repeat=2))
    p = GaussianMixture.from_weights([1.0] * 9, means, 0.3)
    r = QuadraticReward.around([0.0, 0.0], [0.01, 1.0])
    star, log_z = tilt(p, r)
    assert float(expected_reward(p, r)) == quoted(-11.076333, 6)
    assert float(expected_reward(star, r)) == quoted(-0.290720, 6)
    assert float(log_z) == quoted(-1.439687, 6)
    assert float(tilt_divergence(p, r)) == quoted(1.148966, 6)
    for (_, y), w in zip(means, star.weights.tolist(), strict=True):
        assert w < 1.7e-5 if y else w > 0.3
    middle = [w for (_, y), w in zip(means, star.weights.tolist(), strict=True) if y == 0]
    assert middle == [quoted(0.315191, 6), quoted(0.369527, 6), quoted(0.315191, 6)]
    assert star.variances[0].tolist() == [quoted(0.298211, 6), quoted(0.1875, 6)]


def test_ring_of_eight_gaussians() -> None:
    angles = [i * math.pi / 4 for i in range(8)]
    means = [[4 * math.cos(a), 4 * math.sin(a)] for a in angles]
    p = GaussianMixture.from_weights([1.0] * 8, means, 0.3)
    r = QuadraticReward.around([0.0, 1.0], [1.0, 0.1])
    star, log_z = tilt(p, r)
    assert float(expected_reward(p, r)) == pytest.approx(-9.23, abs=1e-10)
    assert float(expected_reward(star, r)) == quoted(-1.340043, 6)
    assert float(log_z) == quoted(-2.967804, 6)
    assert float(tilt_divergence(p, r)) == quoted(1.627761, 6)
    w = star.weights.tolist()
    assert w[2] == quoted(0.798652, 6) and w[6] == quoted(0.176530, 6)
    assert w[1] == quoted(0.009176, 6) and w[3] == quoted(0.009176, 6)
    assert w[5] == quoted(0.003156, 6) and w[7] == quoted(0.003156, 6)
    assert w[0] == quoted(7.7e-5, 6) and w[4] == quoted(7.7e-5, 6)


@pytest.mark.parametrize(
    ("beta", "weight", "mean", "log_z", "kl"),
    [
        (0.5, 0.880797, 1.648188, 0.465031, 0.359063),
        (1.0, 0.982014, 2.178055, 1.450003, 0.728052),
        (2.0, 0.999665, 2.498659, 3.807188, 1.190129),
    ],
)
def test_linear_tilt(beta: float, weight: float, mean: float, log_z: float, kl: float) -> None:
    p, r = pair_of_modes(), QuadraticReward(torch.tensor([beta]), torch.zeros(1))
    star, z = tilt(p, r)
    assert float(star.weights[1]) == quoted(weight, 6)
    assert float(star.mean) == quoted(mean, 6)
    assert float(z) == quoted(log_z, 6) and float(z) == pytest.approx(beta**2 / 8 + math.log(math.cosh(2 * beta)))
    assert float(tilt_divergence(p, r)) == quoted(kl, 6)
    # a temperature divides the reward
    hot, hot_z = tilt(p, QuadraticReward(torch.tensor([3 * beta]), torch.zeros(1)), temperature=3.0)
    torch.testing.assert_close(hot.means, star.means)
    torch.testing.assert_close(hot_z, z)


@pytest.mark.parametrize(
    ("x", "alpha_bar", "exact", "of_mean", "mean_of"),
    [
        (0, 0.01, -0.8955, -4.000, -8.229),
        (0, 0.1, -0.8933, -4.000, -8.030),
        (0, 0.5, -0.9756, -4.000, -6.760),
        (0, 0.9, -2.4123, -4.000, -4.456),
        (-1, 0.5, -5.0348, -14.811, -15.120),
        (1, 0.5, -0.1888, -0.0229, -0.3315),
    ],
)
def test_value_function(x: float, alpha_bar: float, exact: float, of_mean: float, mean_of: float) -> None:
    """V, the reward of the posterior mean, and the posterior mean of the reward."""
    p, r = pair_of_modes(), QuadraticReward.around([2.0], 1.0)
    level = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    x_t = torch.tensor([[float(x)]])
    given_x = posterior(p, x_t, *level)
    assert float(value(p, r, x_t, *level)) == quoted(exact, 4)
    assert float(r(given_x.mean)) == quoted(of_mean, 4 if x == 1 else 3)
    assert float(expected_reward(given_x, r)) == quoted(mean_of, 4 if x == 1 else 3)


# --- against quadrature


def grid_2d(points: int = 601, half: float = 8.0) -> tuple[Tensor, float]:
    axis = torch.linspace(-half, half, points, dtype=torch.float64)
    return torch.cartesian_prod(axis, axis), math.log((axis[1] - axis[0]) ** 2)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_tilt_is_the_tilted_density(temperature: float) -> None:
    p = uneven()
    r = QuadraticReward(torch.tensor([0.7, -0.4]), torch.tensor([0.5, -0.3]), 1.25)
    star, log_z = tilt(p, r, temperature)
    x, log_cell = grid_2d()
    log_tilted = p.log_prob(x) + r(x) / temperature
    assert float(log_tilted.logsumexp(0) + log_cell) == pytest.approx(float(log_z), abs=1e-8)
    near = log_tilted > -40
    torch.testing.assert_close(star.log_prob(x)[near], (log_tilted - log_z)[near], rtol=1e-8, atol=1e-8)
    mass = (log_tilted - log_z + log_cell).exp()
    assert float(expected_reward(star, r)) == pytest.approx(float((mass * r(x)).sum()), abs=1e-6)
    kl = (mass * (star.log_prob(x) - p.log_prob(x)))[near].sum()
    assert float(tilt_divergence(p, r, temperature)) == pytest.approx(float(kl), abs=1e-6)


SCHEDULES = {"vp": NoiseSchedule.variance_preserving(10), "flow": NoiseSchedule.flow(10, 2.0)}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("level", [0, 1, 5, 8])
def test_denoiser_against_a_grid(name: str, level: int) -> None:
    schedule = SCHEDULES[name]
    p, r = uneven(), QuadraticReward.around([1.0, -1.0], [0.4, 0.2])
    denoiser = GaussianMixtureDenoiser(p, schedule, ["a"])
    alpha, sigma = schedule.coefficients(level)
    x_t = 1.5 * torch.randn(6, 2, generator=generator(level), dtype=torch.float64)
    prediction = denoiser.predict(x_t, level)
    x0, _ = grid_2d()
    for row in range(6):
        noise = (x_t[row] - alpha * x0) / sigma
        log_joint = p.log_prob(x0) - 0.5 * noise.square().sum(-1)
        mass = log_joint.softmax(0)
        torch.testing.assert_close(prediction.x0[row], mass @ x0, rtol=1e-7, atol=1e-7)
        torch.testing.assert_close(prediction.eps[row], mass @ noise, rtol=1e-6, atol=1e-6)
        exact = (log_joint + r(x0) / 0.7).logsumexp(0) - log_joint.logsumexp(0)
        assert float(value(p, r, x_t[row : row + 1], alpha, sigma, 0.7)) == pytest.approx(float(exact), abs=1e-7)
    torch.testing.assert_close(alpha * prediction.x0 + sigma * prediction.eps, x_t)
    if name == "flow":
        assert prediction.velocity is not None
        torch.testing.assert_close(prediction.velocity, prediction.eps - prediction.x0)
    else:
        assert prediction.velocity is None


def test_score_identity() -> None:
    """Tweedie: the gradient of the noised log-density is -eps / sigma."""
    p, (alpha, sigma) = uneven(), (0.6, 0.8)
    schedule = NoiseSchedule(torch.tensor([alpha, 1.0]), torch.tensor([sigma, 0.0]), torch.tensor([1.0, 0.0]))
    x = torch.randn(5, 2, generator=generator(), dtype=torch.float64, requires_grad=True)
    (score,) = torch.autograd.grad(p.noised(*schedule.coefficients(0)).log_prob(x).sum(), x)
    torch.testing.assert_close(score, -GaussianMixtureDenoiser(p, schedule, []).predict(x, 0).eps / sigma)


# --- against Monte Carlo


def test_value_against_monte_carlo() -> None:
    p, r = uneven(), QuadraticReward.around([1.0, -1.0], [0.4, 0.2])
    x_t = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-1.0, 2.0]], dtype=torch.float64)
    n = 40000
    for alpha, sigma in ((0.3, 0.7), (math.sqrt(0.5), math.sqrt(0.5)), (0.0, 1.0)):
        x0 = posterior(p, x_t, alpha, sigma).sample(n, generator(1))
        assert x0.shape == (3, n, 2)
        weights = r(x0).exp()
        estimate, error = weights.mean(-1), weights.std(-1) / n**0.5
        exact = value(p, r, x_t, alpha, sigma).exp()
        assert bool(((estimate - exact).abs() < 4 * error).all())


def test_value_is_a_martingale() -> None:
    """E[exp V(x_t)] = Z at every level, and V at the clean level is the reward."""
    p, r = uneven(), QuadraticReward.around([1.0, -1.0], [0.4, 0.2])
    schedule = NoiseSchedule.flow(10)
    z = tilt(p, r)[1].exp()
    for level in range(11):
        x = p.noised(*schedule.coefficients(level)).sample(20000, generator(level))
        weights = value(p, r, x, *schedule.coefficients(level)).exp()
        assert abs(float(weights.mean() - z)) <= 4 * float(weights.std()) / 20000**0.5 + 1e-12
    torch.testing.assert_close(value(p, r, x, 1.0, 0.0), r(x))


def test_samples_have_the_moments_of_the_mixture() -> None:
    p, n = uneven(), 40000
    x = p.sample(n, generator())
    assert x.shape == (n, 2) and x.dtype == torch.float64
    error = (p.variance / n).sqrt()
    assert bool(((x.mean(0) - p.mean).abs() < 4 * error).all())
    torch.testing.assert_close(x.var(0), p.variance, rtol=0.03, atol=0)
    assert float(x.max()) < 6  # nothing from the component of weight zero
    assert torch.equal(x, p.sample(n, generator()))


def run(denoiser: GaussianMixtureDenoiser, transition: Transition, x: Tensor, seed: int) -> Tensor:
    g = generator(seed)
    for level in range(denoiser.schedule.steps):
        step = transition(denoiser.predict(x, level), denoiser.schedule, level, level + 1)
        x = step.sample(torch.randn(x.shape, generator=g, dtype=x.dtype))
    return x


@pytest.mark.parametrize("kind", ["ode", "ddim"])
@pytest.mark.parametrize("name", ["vp", "flow"])
def test_many_steps_recover_the_mixture(kind: str, name: str) -> None:
    """Enough steps that the discretisation stays well below the Monte-Carlo error."""
    p, n, steps = uneven(), 5000, 250 if kind == "ode" else 600
    schedule = NoiseSchedule.flow(steps) if name == "flow" else NoiseSchedule.variance_preserving(steps)
    denoiser = GaussianMixtureDenoiser(p, schedule, [""])
    start = p.noised(*schedule.coefficients(0)).sample(n, generator(11))
    x = run(denoiser, Transition(kind, 1.0), start, seed=12)  # type: ignore[arg-type]
    for sample, exact in ((x, p.mean), (x.square(), p.variance + p.mean.square())):
        assert bool(((sample.mean(0) - exact).abs() < 4 * (sample.var(0) / n).sqrt()).all())
    # the shares of the modes: a point belongs to the component that most likely made it
    share = torch.bincount(p.component_log_prob(x).argmax(-1), minlength=4) / n
    torch.testing.assert_close(share.double(), p.weights, rtol=0, atol=4 * 0.5 / n**0.5)


# --- the denoiser as a Denoiser


def test_protocols() -> None:
    denoiser: Denoiser = GaussianMixtureDenoiser(pair_of_modes(), NoiseSchedule.flow(4), ["a", "b"])
    assert denoiser.evaluations_per_row == 1 and denoiser.evaluations == 0
    reward: Reward = as_reward(QuadraticReward.around([2.0], 1.0))
    x = denoiser.initial()
    assert x.shape == (2, 1) and x.dtype == torch.float64
    assert torch.equal(denoiser.decode(x), x)
    assert reward(denoiser.decode(x), denoiser.prompts).shape == (2,)


def test_initial_latents_belong_to_their_prompts() -> None:
    for schedule in SCHEDULES.values():
        one = GaussianMixtureDenoiser(uneven(), schedule, ["a", "b", "c"], seed=3).initial()
        other = GaussianMixtureDenoiser(uneven(), schedule, ["c", "a"], seed=3).initial()
        assert torch.equal(other, one[[2, 0]])
        assert not torch.equal(one, GaussianMixtureDenoiser(uneven(), schedule, ["a", "b", "c"], seed=4).initial())
        assert GaussianMixtureDenoiser(uneven(), schedule, []).initial().shape == (0, 2)


@pytest.mark.parametrize("name", SCHEDULES)
def test_initial_latents_follow_the_law_of_level_0(name: str) -> None:
    p, n = GaussianMixture.from_weights([0.2, 0.8], [[-9.0], [9.0]], 0.5), 4000
    law = p.noised(*SCHEDULES[name].coefficients(0))
    x = GaussianMixtureDenoiser(p, SCHEDULES[name], ["same"] * n).initial()
    assert abs(float(x.mean() - law.mean)) < 4 * float(law.variance / n) ** 0.5
    assert float(x.var()) == pytest.approx(float(law.variance), rel=4 * (2 / n) ** 0.5)


def test_pure_noise_says_nothing() -> None:
    p, x = uneven(), torch.randn(4, 2, generator=generator(), dtype=torch.float64)
    prediction = GaussianMixtureDenoiser(p, NoiseSchedule.flow(4), ["a"]).predict(x, 0)
    torch.testing.assert_close(prediction.x0, p.mean.expand(4, 2))
    torch.testing.assert_close(prediction.eps, x)
    r = QuadraticReward.around([1.0, -1.0], 0.3)
    torch.testing.assert_close(value(p, r, x, 0.0, 1.0), tilt(p, r)[1].expand(4))


def test_dtype_and_gradient() -> None:
    denoiser = GaussianMixtureDenoiser(uneven(), NoiseSchedule.flow(4), ["a"])
    x = torch.randn(3, 2, generator=generator(), requires_grad=True)
    prediction = denoiser.predict(x, 2)
    assert prediction.x is x and prediction.x0.dtype == prediction.eps.dtype == torch.float32
    prediction.x0.sum().backward()
    assert x.grad is not None and bool((x.grad != 0).all())
    with torch.no_grad():
        assert not denoiser.predict(x, 2).x0.requires_grad


@settings(max_examples=40, deadline=None)
@given(st.floats(-1e5, 1e5), st.floats(1e-6, 1e3), st.integers(0, 9))
def test_far_points_stay_finite(position: float, variance: float, level: int) -> None:
    denoiser = GaussianMixtureDenoiser(pair_of_modes(variance), SCHEDULES["vp"], ["a"])
    prediction = denoiser.predict(torch.tensor([[position]], dtype=torch.float64), level)
    assert bool(prediction.x0.isfinite().all()) and bool(prediction.eps.isfinite().all())


def test_point_masses() -> None:
    """Variance zero: discrete data, whose tilt reweights and whose posterior mean is a softmax over the points."""
    p = GaussianMixture.from_weights([1, 3], [[-1.0], [1.0]], 0.0)
    r = QuadraticReward(torch.tensor([0.8]), torch.zeros(1))
    star, log_z = tilt(p, r)
    assert float(log_z) == pytest.approx(math.log(0.25 * math.exp(-0.8) + 0.75 * math.exp(0.8)))
    assert star.means.tolist() == [[-1.0], [1.0]]
    x0 = posterior(p, torch.tensor([[0.3]], dtype=torch.float64), 0.5, 0.5).mean
    assert float(x0) == pytest.approx(math.tanh(0.5 * (math.log(3) + 2 * 0.3 * 0.5 / 0.25)))
    with pytest.raises(ValueError, match="no density"):
        p.log_prob(torch.zeros(1, 1))


# --- errors


def test_a_reward_that_outgrows_the_tails() -> None:
    p = GaussianMixture.from_weights([1, 1], [[0.0], [5.0]], [[0.25], [0.5]])
    for curvature in (-2.0, -3.0):
        with pytest.raises(ValueError, match="cannot be normalised"):
            tilt(p, QuadraticReward(torch.zeros(1), torch.tensor([curvature])))
    tilt(p, QuadraticReward(torch.zeros(1), torch.tensor([-3.0])), temperature=2.0)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.inf, math.nan])
def test_bad_temperatures(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be positive"):
        tilt(pair_of_modes(), QuadraticReward.around([2.0], 1.0), temperature)


def test_bad_shapes_and_numbers() -> None:
    p = pair_of_modes()
    with pytest.raises(ValueError, match=r"log_weights \[..., K\]"):
        GaussianMixture(torch.zeros(3), torch.zeros(2, 1), torch.ones(1))
    with pytest.raises(ValueError, match="do not broadcast"):
        GaussianMixture(torch.zeros(2), torch.zeros(2, 1), torch.ones(3))
    with pytest.raises(ValueError, match="not negative"):
        GaussianMixture.from_weights([1, 1], [[0.0], [1.0]], -1.0)
    with pytest.raises(ValueError, match="means must be finite"):
        GaussianMixture.from_weights([1, 1], [[0.0], [math.nan]], 1.0)
    with pytest.raises(ValueError, match="negative or NaN"):
        GaussianMixture.from_weights([1, -1], [[0.0], [1.0]], 1.0)
    with pytest.raises(ValueError, match="weight zero"):
        GaussianMixture.from_weights([0, 0], [[0.0], [1.0]], 1.0)
    with pytest.raises(ValueError, match="1 dimensions"):
        p.log_prob(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="one mixture and points"):
        posterior(p, torch.zeros(4, 2), 0.5, 0.5)
    with pytest.raises(ValueError, match="2 dimensions"):
        tilt(p, QuadraticReward.around([0.0, 0.0], 1.0))
    with pytest.raises(ValueError, match=r"points \[..., 1\]"):
        QuadraticReward.around([2.0], 1.0)(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="one length"):
        QuadraticReward(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="must be finite"):
        QuadraticReward(torch.zeros(1), torch.tensor([math.inf]))
    with pytest.raises(ValueError, match="level 4 is clean"):
        GaussianMixtureDenoiser(p, NoiseSchedule.flow(4), ["a"]).predict(torch.zeros(1, 1), 4)

"""One-step transitions: marginals, the DDPM posterior, diffusers' Euler step, the published flow SDE."""

import itertools
import math

import pytest
import torch
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import (
    CPS,
    DDIM,
    GLASS,
    ODE,
    FlowSDE,
    Gaussian,
    GaussianTransition,
    Transition,
    parse_transition,
    require_gaussian,
)
from rsm_guidance.oracles.mixture import GaussianMixture, GaussianMixtureDenoiser

FLOAT32 = {"rtol": 2e-6, "atol": 2e-6}


def schedules() -> st.SearchStrategy[NoiseSchedule]:
    flow = st.builds(NoiseSchedule.flow, st.integers(2, 8), st.floats(0.5, 5.0))
    vp = st.builds(NoiseSchedule.variance_preserving, st.integers(2, 8), st.floats(0.01, 0.3))
    exploding = st.integers(2, 8).map(
        lambda n: NoiseSchedule(torch.ones(n + 1), torch.linspace(9, 0, n + 1), torch.linspace(1, 0, n + 1))
    )
    return st.one_of(flow, vp, exploding)


def truth(schedule: NoiseSchedule, level: int, x0: Tensor, eps: Tensor) -> Prediction:
    velocity = eps - x0 if schedule.is_flow else None
    return Prediction(schedule.add_noise(x0, eps, level), x0, eps, velocity)


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    x0, eps = torch.randn(2, 4, 3, 2, generator=torch.Generator().manual_seed(seed))
    return x0, eps


@settings(max_examples=80, deadline=None)
@given(schedules(), st.data(), st.floats(0, 1), st.sampled_from([DDIM, CPS]))
def test_marginals_are_kept_exactly(schedule: NoiseSchedule, data: st.DataObject, eta: float, step) -> None:
    """With the true x0 and eps, the next state is alpha' x0 + N(0, sigma'^2): mean alpha', kept^2 + std^2 = sigma'^2."""
    level = data.draw(st.integers(0, schedule.steps - 1))
    target = data.draw(st.integers(level + 1, schedule.steps))
    alpha, sigma = schedule.coefficients(target)
    zero, one = torch.zeros(1, 1), torch.ones(1, 1)
    signal = step(eta)(truth(schedule, level, one, zero), schedule, level, target)
    noise = step(eta)(truth(schedule, level, zero, one), schedule, level, target)
    assert signal.std == noise.std
    assert float(signal.mean) == pytest.approx(alpha, rel=1e-6, abs=1e-7)
    kept = float(noise.mean)
    assert kept >= 0
    assert kept**2 + noise.std**2 == pytest.approx(sigma**2, rel=1e-6, abs=1e-9)
    if target < schedule.steps and eta > 0.01:
        assert noise.std > 0


@settings(max_examples=40, deadline=None)
@given(schedules(), st.data(), st.sampled_from([DDIM, CPS]))
def test_no_noise_is_ode(schedule: NoiseSchedule, data: st.DataObject, step) -> None:
    level = data.draw(st.integers(0, schedule.steps - 1))
    target = data.draw(st.integers(level + 1, schedule.steps))
    p = truth(schedule, level, *pair())
    plain, none = ODE()(p, schedule, level, target), step(0.0)(p, schedule, level, target)
    assert plain.std == none.std == 0
    torch.testing.assert_close(none.mean, plain.mean, **FLOAT32)
    torch.testing.assert_close(plain.mean, schedule.add_noise(p.x0, p.eps, target), **FLOAT32)


def test_flow_sde_without_noise_is_ode() -> None:
    schedule = NoiseSchedule.flow(5, 3.0)
    for level in range(5):
        p = truth(schedule, level, *pair())
        step = FlowSDE(0.0)(p, schedule, level, level + 1)
        assert step.std == 0
        torch.testing.assert_close(step.mean, ODE()(p, schedule, level, level + 1).mean, **FLOAT32)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.floats(0.01, 0.3), st.data())
def test_full_ddim_is_the_ddpm_posterior(steps: int, start: float, data: st.DataObject) -> None:
    """Ho et al. 2020, eq. 7, in their own notation."""
    schedule = NoiseSchedule.variance_preserving(steps, start)
    level = data.draw(st.integers(0, steps - 1))
    target = data.draw(st.integers(level + 1, steps))
    bar, bar_prev = float(schedule.alpha[level]) ** 2, float(schedule.alpha[target]) ** 2
    alpha = bar / bar_prev
    beta = 1 - alpha
    p = truth(schedule, level, *pair())
    mean = math.sqrt(bar_prev) * beta / (1 - bar) * p.x0 + math.sqrt(alpha) * (1 - bar_prev) / (1 - bar) * p.x
    step = DDIM(1.0)(p, schedule, level, target)
    torch.testing.assert_close(step.mean, mean, rtol=1e-5, atol=1e-5)
    assert step.std**2 == pytest.approx((1 - bar_prev) / (1 - bar) * beta, rel=1e-6, abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(schedules(), st.data())
def test_full_ddim_is_gaussian_conditioning(schedule: NoiseSchedule, data: st.DataObject) -> None:
    """q(x' | x, x0) for any alpha and sigma, by conditioning in the Markov chain x = (alpha / alpha') x' + noise."""
    level = data.draw(st.integers(0, schedule.steps - 1))
    target = data.draw(st.integers(level + 1, schedule.steps))
    (a, s), (b, r) = schedule.coefficients(level), schedule.coefficients(target)
    ratio = a / b
    p = truth(schedule, level, *pair())
    mean = b * p.x0 + ratio * r**2 / s**2 * (p.x - a * p.x0)
    step = DDIM(1.0)(p, schedule, level, target)
    torch.testing.assert_close(step.mean, mean, rtol=1e-5, atol=1e-5)
    assert step.std**2 == pytest.approx(r**2 - ratio**2 * r**4 / s**2, rel=1e-6, abs=1e-9)


def sd3_schedule(steps: int) -> tuple[FlowMatchEulerDiscreteScheduler, NoiseSchedule]:
    """diffusers' shift-3 scheduler as Stable Diffusion 3 uses it, and its levels."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(steps)
    sigma = scheduler.sigmas.double()
    return scheduler, NoiseSchedule(1 - sigma, sigma, sigma * 1000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ode_is_bitwise_the_euler_step_of_diffusers(dtype: torch.dtype) -> None:
    scheduler, schedule = sd3_schedule(10)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=g).to(dtype)
    for level, t in enumerate(scheduler.timesteps):
        v = torch.randn(2, 4, 8, 8, generator=g).to(dtype)
        alpha, sigma = schedule.coefficients(level)
        step = ODE()(Prediction(x, x - sigma * v, x + alpha * v, v), schedule, level, level + 1)
        theirs = scheduler.step(v, t, x, return_dict=False)[0]
        assert step.center.dtype == theirs.dtype
        assert torch.equal(step.center, theirs)
        assert step.std == 0
        x = theirs


def test_flow_sde_is_as_published() -> None:
    """Flow-GRPO's step on the ten-step grid of Stable Diffusion 3.5, and the standard deviations quoted for it."""
    _, schedule = sd3_schedule(10)
    grid = [1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0]
    torch.testing.assert_close(schedule.sigma, torch.tensor(grid, dtype=torch.float64), rtol=0, atol=1e-4)
    quoted = [0.70, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225]
    a = 0.7
    for level in range(9):
        t, t_next = schedule.coefficients(level)[1], schedule.coefficients(level + 1)[1]
        p = truth(schedule, level, *pair(level))
        v = p.eps - p.x0
        sig = a * math.sqrt(t / (1 - (schedule.coefficients(1)[1] if t == 1 else t)))
        dt = t - t_next
        mu = p.x * (1 - sig**2 / (2 * t) * dt) - v * (1 + sig**2 * (1 - t) / (2 * t)) * dt
        step = FlowSDE(a)(p, schedule, level, level + 1)
        torch.testing.assert_close(step.mean, mu, rtol=1e-5, atol=1e-5)
        assert step.std == pytest.approx(sig * math.sqrt(dt))
        assert step.std == pytest.approx(quoted[level], abs=6e-4)
        # the velocity is rebuilt where the model did not predict it
        rebuilt = FlowSDE(a)(Prediction(p.x, p.x0, p.eps), schedule, level, level + 1)
        torch.testing.assert_close(rebuilt.mean, step.mean, **FLOAT32)
    last = FlowSDE(a)(truth(schedule, 9, *pair()), schedule, 9, 10)
    assert last.std == 0  # ours: the clean level gets no noise (published: 0.006)
    torch.testing.assert_close(last.mean, pair()[0], **FLOAT32)


def moments(transition: Transition, steps: int, mean: float, variance: float) -> tuple[float, float]:
    """Exact mean and variance at the clean level: on Gaussian data with the exact denoiser every step is affine."""
    mixture = GaussianMixture(torch.zeros(1), torch.tensor([[mean]]), torch.tensor(variance))
    denoiser = GaussianMixtureDenoiser(mixture, NoiseSchedule.flow(steps), [""])
    m, v = 0.0, 1.0
    probe = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    for level in range(steps):
        step = transition(denoiser.predict(probe, level), denoiser.schedule, level, level + 1)
        offset = float(step.mean[0])
        slope = float(step.mean[1]) - offset
        m, v = slope * m + offset, slope**2 * v + step.std**2
    return m, v


@pytest.mark.parametrize("transition", [Transition("flow_sde", 1.2), Transition("ddim", 1.0), Transition("ode")])
def test_marginals_converge_as_steps_grow(transition: Transition) -> None:
    """To first order: four times the steps, about a quarter of the error."""
    errors = []
    for steps in (32, 128, 512):
        m, v = moments(transition, steps, mean=1.5, variance=0.3)
        errors.append(abs(m - 1.5) + abs(v - 0.3))
    assert all(fine < 0.32 * coarse for coarse, fine in itertools.pairwise(errors)), errors
    assert errors[-1] < 0.005, errors


def test_flow_sde_converges_at_the_published_noise() -> None:
    """At a < 1 what the first steps next to sigma = 1 get wrong fades like N^(-a^2), slower than 1 / N."""
    coarse, medium, fine = (abs(moments(Transition("flow_sde", 0.7), n, 1.5, 0.3)[1] - 0.3) for n in (8, 32, 2048))
    assert medium < 0.25 * coarse
    assert fine < 0.25 * medium and fine < 0.001


@settings(max_examples=30, deadline=None)
@given(st.floats(1e-3, 50), st.integers(0, 100))
def test_log_prob_matches_torch(std: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    mean, x = torch.randn(2, 3, 2, 4, generator=g, dtype=torch.float64)
    expected = torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1)
    torch.testing.assert_close(Gaussian(mean, std).log_prob(x), expected, rtol=1e-10, atol=1e-8)


def test_deterministic_gaussian() -> None:
    mean, noise = pair()
    assert torch.equal(Gaussian(mean, 0.0).sample(noise), mean)
    assert Gaussian(mean[:1], 0.0).sample(noise).shape == noise.shape
    with pytest.raises(ValueError, match="deterministic"):
        Gaussian(mean, 0.0).log_prob(mean)


def test_sample() -> None:
    mean, noise = pair()
    assert torch.equal(Gaussian(mean, 0.5).sample(noise), mean + 0.5 * noise)
    half = Gaussian(mean, 0.5, torch.float16).sample(noise)
    assert half.dtype == torch.float16 and torch.equal(half, (mean + 0.5 * noise).half())


@pytest.mark.parametrize("kind", ["ode", "ddim", "cps", "flow_sde"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_gradient_pass_through(kind: str, dtype: torch.dtype) -> None:
    schedule = NoiseSchedule.flow(4)
    x0, eps = (v.to(dtype).requires_grad_() for v in pair())
    step = Transition(kind, 0.5)(truth(schedule, 1, x0, eps), schedule, 1, 2)  # type: ignore[arg-type]
    assert step.mean.dtype == torch.promote_types(dtype, torch.float32), "means keep their digits"
    assert step.center.dtype == step.sample(torch.zeros_like(x0)).dtype == dtype
    step.mean.sum().backward()
    assert x0.grad is not None and bool((x0.grad != 0).all())


def test_transition_dispatch() -> None:
    schedule = NoiseSchedule.flow(4)
    p = truth(schedule, 1, *pair())
    direct = {
        "ode": ODE()(p, schedule, 1, 3),
        "ddim": DDIM(0.5)(p, schedule, 1, 3),
        "cps": CPS(0.5)(p, schedule, 1, 3),
        "flow_sde": FlowSDE(0.5)(p, schedule, 1, 3),
    }
    for kind, expected in direct.items():
        step = Transition(kind, 0.5)(p, schedule, 1, 3)  # type: ignore[arg-type]
        assert torch.equal(step.mean, expected.mean) and step.std == expected.std


def test_errors() -> None:
    with pytest.raises(ValueError, match="unknown transition"):
        Transition("euler")  # type: ignore[arg-type]
    for kind, noise in (("ddim", 1.1), ("cps", -0.1), ("flow_sde", -1.0), ("ddim", float("nan"))):
        with pytest.raises(ValueError, match="noise level"):
            Transition(kind, noise)  # type: ignore[arg-type]
    vp = NoiseSchedule.variance_preserving(4)
    p = truth(vp, 0, *pair())
    with pytest.raises(ValueError, match="flow schedule"):
        FlowSDE(0.7)(p, vp, 0, 1)
    for target in (0, 1):
        with pytest.raises(ValueError, match="cleaner level"):
            Transition("ode")(p, vp, 1, target)


# --- GLASS ---


def glass_run(schedule: NoiseSchedule, inner: int, count: int) -> list[tuple[int, Tensor]]:
    """A run of `count` exact starts by GLASS transitions: the states [count, 1] at every stop."""
    mixture = GaussianMixture.from_weights([0.3, 0.7], [[-2.0], [1.0]], 0.25)
    denoiser = GaussianMixtureDenoiser(mixture, schedule, [])
    generator = torch.Generator().manual_seed(0)
    x = mixture.noised(*schedule.coefficients(0)).sample(count, generator)
    states = []
    for level, target in Transition("glass", inner=inner).jumps(schedule):
        noise = torch.randn(count, 1, generator=generator, dtype=torch.float64)
        x = GLASS(1).step(denoiser.predict, denoiser.predict(x, level), schedule, level, target, noise)
        states.append((target, x))
    return states


@pytest.mark.parametrize(
    "schedule", [NoiseSchedule.flow(64), NoiseSchedule.variance_preserving(64)], ids=["flow", "vp"]
)
def test_glass_preserves_the_marginal_of_every_level(schedule: NoiseSchedule) -> None:
    """Mean, variance and the whole distribution function (Kolmogorov-Smirnov) at every stop, with 4 wide transitions."""
    mixture = GaussianMixture.from_weights([0.3, 0.7], [[-2.0], [1.0]], 0.25)
    count = 20_000
    for level, x in glass_run(schedule, 16, count):
        exact = mixture.noised(*schedule.coefficients(level))
        spread = float(exact.variance.sqrt())
        assert abs(float(x.mean() - exact.mean)) < 4 * spread / count**0.5 + 0.02, level
        assert abs(float(x.var() / exact.variance) - 1) < 0.05, level
        points = torch.linspace(-4, 4, 201, dtype=torch.float64)
        z = (points[:, None] - exact.means[:, 0]) / exact.variances[:, 0].sqrt()
        cdf = (exact.weights * torch.special.ndtr(z)).sum(1)
        assert float(((x[:, 0] <= points[:, None]).double().mean(1) - cdf).abs().max()) < 0.025, level


def test_wide_glass_transitions_beat_wide_ancestral_steps() -> None:
    """With the same 64 evaluations, and noise as often, the inner ODE has the smaller error of the final variance."""
    mixture = GaussianMixture.from_weights([0.3, 0.7], [[-2.0], [1.0]], 0.25)
    errors = []
    for inner in (1, 16):
        schedule = NoiseSchedule.flow(4 * inner)
        _, x = glass_run(schedule, inner, 20_000)[-1]
        errors.append(abs(float(x.var() / mixture.variance) - 1))
    assert errors[1] < 0.3 * errors[0]


@pytest.mark.parametrize("schedule", [NoiseSchedule.flow(6), NoiseSchedule.variance_preserving(6)], ids=["flow", "vp"])
def test_glass_without_inner_steps_is_ancestral(schedule: NoiseSchedule) -> None:
    denoiser = GaussianMixtureDenoiser(GaussianMixture.from_weights([1.0], [[0.5, -1.0]], 0.4), schedule, [])
    x, noise = torch.randn(2, 9, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64).unbind()
    for level in range(1, 6):
        prediction = denoiser.predict(x, level)
        expected = Transition("ddim", 1.0)(prediction, schedule, level, level + 1).sample(noise)
        got = GLASS(1).step(denoiser.predict, prediction, schedule, level, level + 1, noise)
        assert torch.allclose(got, expected, atol=1e-5)


def test_glass_is_refused_where_children_share_an_evaluation() -> None:
    schedule = NoiseSchedule.flow(4)
    denoiser = GaussianMixtureDenoiser(GaussianMixture.from_weights([1.0], [[0.5]], 0.4), schedule, [])
    assert not isinstance(Transition("glass"), GaussianTransition)
    with pytest.raises(ValueError, match="does not serve: children share"):
        require_gaussian(Transition("glass"), "children share their parent's evaluation")
    with pytest.raises(ValueError, match="'scheduler' cannot step between single levels"):
        x = torch.zeros(1, 1)
        Transition("scheduler").step(denoiser.predict, denoiser.predict(x, 1), schedule, 1, 2, x)
    with pytest.raises(ValueError, match="inner is a number of levels"):
        Transition("ddim", inner=2)
    with pytest.raises(ValueError, match="inner is a number of levels"):
        Transition("glass", inner=0)


@pytest.mark.parametrize(
    ("text", "transition"),
    [("ode", ODE()), ("ddim", DDIM(1.0)), ("cps 0.9", CPS(0.9)), ("flow_sde 0.7", FlowSDE(0.7)), ("glass 4", GLASS(4))],
)
def test_transitions_are_read_from_text_and_by_name_and_say_it_again(text: str, transition: Transition) -> None:
    assert parse_transition(text) == transition == parse_transition(str(transition))
    name, _, number = text.partition(" ")
    options = {} if not number else {"inner": int(number)} if name == "glass" else {"noise": float(number)}
    made = Transition(name, **options)
    assert made == transition and type(made) is type(transition) and hash(made) == hash(transition)


def test_text_that_names_no_transition_is_refused() -> None:
    for text in ("walk", "cps x", "ode 0.5", "cps 2", "glass 0", "glass 1.5", ""):
        with pytest.raises(ValueError, match="cannot read the transition"):
            parse_transition(text)

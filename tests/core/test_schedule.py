"""Noise schedules and conversions between prediction types."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rsm_guidance.core.schedule import NoiseSchedule, Prediction, PredictionType, from_prediction, to_prediction

KINDS: list[PredictionType] = ["epsilon", "sample", "v_prediction", "flow", "score"]


def levels() -> st.SearchStrategy[tuple[float, float]]:
    """(alpha, sigma) of variance-preserving, flow and variance-exploding models, away from the singular ends."""
    inside = st.floats(0.02, 0.98)
    vp = inside.map(lambda u: (math.cos(u * math.pi / 2), math.sin(u * math.pi / 2)))
    flow = inside.map(lambda s: (1 - s, s))
    exploding = st.floats(0.01, 80.0).map(lambda s: (1.0, s))
    return st.one_of(vp, flow, exploding)


def truth(seed: int, alpha: float, sigma: float) -> Prediction:
    g = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 3, 4, generator=g, dtype=torch.float64)
    return Prediction(alpha * x0 + sigma * eps, x0, eps)


@settings(max_examples=60, deadline=None)
@given(levels(), st.integers(0, 1000), st.sampled_from(KINDS))
def test_every_kind_recovers_the_truth(level: tuple[float, float], seed: int, kind: PredictionType) -> None:
    p = truth(seed, *level)
    back = to_prediction(p.x, from_prediction(p, *level, kind), *level, kind)
    torch.testing.assert_close(back.x0, p.x0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(back.eps, p.eps, rtol=1e-9, atol=1e-9)
    assert (back.velocity is not None) == (kind == "flow")


@settings(max_examples=60, deadline=None)
@given(levels(), st.integers(0, 1000), st.sampled_from(KINDS), st.sampled_from(KINDS))
def test_kinds_convert_into_each_other(
    level: tuple[float, float], seed: int, first: PredictionType, second: PredictionType
) -> None:
    """Any output, right or wrong, survives the way through another kind; and x = alpha x0 + sigma eps always."""
    x, output = truth(seed, *level).x, truth(seed + 1, *level).eps
    p = to_prediction(x, output, *level, first)
    torch.testing.assert_close(level[0] * p.x0 + level[1] * p.eps, x, rtol=1e-9, atol=1e-9)
    q = to_prediction(x, from_prediction(p, *level, second), *level, second)
    torch.testing.assert_close(from_prediction(q, *level, first), output, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["flow", "v_prediction", "sample"])
def test_pure_noise_can_be_read(kind: PredictionType) -> None:
    p = truth(0, 0.0, 1.0)
    back = to_prediction(p.x, from_prediction(p, 0.0, 1.0, kind), 0.0, 1.0, kind)
    torch.testing.assert_close(back.x0, p.x0)
    torch.testing.assert_close(back.eps, p.eps)


@pytest.mark.parametrize(
    ("kind", "alpha", "sigma", "message"),
    [
        ("epsilon", 0.0, 1.0, "alpha = 0"),
        ("score", 0.0, 1.0, "alpha = 0"),
        ("sample", 1.0, 0.0, "sigma = 0"),
        ("noise", 0.5, 0.5, "unknown prediction type"),
    ],
)
def test_impossible_conversions(kind: PredictionType, alpha: float, sigma: float, message: str) -> None:
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match=message):
        to_prediction(x, x, alpha, sigma, kind)


def test_other_errors() -> None:
    x = torch.ones(1, 2)
    with pytest.raises(ValueError, match="shape"):
        to_prediction(x, torch.ones(2, 2), 0.5, 0.5, "epsilon")
    with pytest.raises(ValueError, match="unknown prediction type"):
        from_prediction(Prediction(x, x, x), 0.5, 0.5, "noise")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="score is infinite"):
        from_prediction(Prediction(x, x, x), 1.0, 0.0, "score")


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.floats(0.2, 10.0))
def test_flow_levels(steps: int, shift: float) -> None:
    s = NoiseSchedule.flow(steps, shift)
    assert s.steps == steps and s.is_flow
    assert s.coefficients(0) == (0.0, 1.0) and s.coefficients(steps) == (1.0, 0.0)
    assert s.alpha.dtype == s.sigma.dtype == torch.float64
    # the shift divides every signal-to-noise ratio alpha / sigma by itself
    plain = NoiseSchedule.flow(steps)
    torch.testing.assert_close(s.alpha[:-1] / s.sigma[:-1], plain.alpha[:-1] / plain.sigma[:-1] / shift)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.floats(0.001, 0.5))
def test_variance_preserving_levels(steps: int, start: float) -> None:
    s = NoiseSchedule.variance_preserving(steps, start)
    torch.testing.assert_close(s.alpha**2 + s.sigma**2, torch.ones(steps + 1, dtype=torch.float64))
    assert not s.is_flow
    assert s.coefficients(0)[0] == pytest.approx(math.sin(start * math.pi / 2))
    assert s.coefficients(steps) == (1.0, 0.0)


@pytest.mark.parametrize("shift", [0.2, 0.7, 1.15, 3.0])
def test_the_shift_keeps_the_ends_exact(shift: float) -> None:
    """Regression: shift / (1 + (shift - 1)) exceeds one in floating point for some shifts."""
    s = NoiseSchedule.flow(7, shift)
    assert s.coefficients(0) == (0.0, 1.0) and s.coefficients(7) == (1.0, 0.0)


def test_add_noise() -> None:
    s = NoiseSchedule.flow(4)
    x0, eps = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(s.add_noise(x0, eps, 0), eps)
    assert torch.equal(s.add_noise(x0, eps, 4), x0)
    torch.testing.assert_close(s.add_noise(x0, eps, 1), 0.25 * x0 + 0.75 * eps)


def vector(*values: float) -> Tensor:
    return torch.tensor(values)


@pytest.mark.parametrize(
    ("alpha", "sigma", "message"),
    [
        (vector(0, 1), vector(1, 0.5, 0), "one length"),
        (vector(0, 0.5, 1), vector(1, 1, 0), "fall strictly"),
        (vector(0, 1), vector(1, -0.1), "fall strictly"),
        (vector(0, 1), vector(float("nan"), 0), "fall strictly"),
        (vector(1), vector(0), "two levels"),
        (vector(0, 0), vector(1, 0), "alpha must be positive"),
        (vector(-0.1, 1), vector(1, 0), "alpha must be positive"),
    ],
)
def test_bad_schedules(alpha: Tensor, sigma: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(alpha, sigma, sigma)


@pytest.mark.parametrize("level", [-1, 5])
def test_levels_are_bounded(level: int) -> None:
    with pytest.raises(ValueError, match=f"level {level} does not exist"):
        NoiseSchedule.flow(4).coefficients(level)

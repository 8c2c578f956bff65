"""Losses of pairs against closed forms, numerical integrals, and what exchanging the two images does."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rsm_guidance.reward_models.outputs import mean_of, ordered, probability_above, variance_of
from rsm_guidance.training.reward_model.config import LossConfig
from rsm_guidance.training.reward_model.pair_losses import (
    LOSSES,
    bradley_terry,
    fidelity,
    margin,
    noise_variance,
    ordinal_cross_entropy,
    thurstone_nll,
    win_tie,
)

SIZES: dict[str, int] = {"scalar": 1, "gaussian": 2, "ordinal": 5}


def outputs(kind: str, seed: int, count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, count, SIZES[kind], generator=generator, dtype=torch.float64)
    return a, b


@pytest.mark.parametrize("name", LOSSES)
@given(seed=st.integers(0, 50), p=st.sampled_from([0.0, 0.25, 0.5, 0.8, 1.0]))
@settings(max_examples=15, deadline=None)
def test_exchanging_both_images_and_the_label_changes_nothing(name: str, seed: int, p: float) -> None:
    loss = LOSSES[name]
    a, b = outputs(loss.output, seed)
    sigma = torch.full((len(a),), 0.3, dtype=torch.float64)
    probability = torch.full_like(sigma, p)
    one, other = loss.call(a, b, probability, sigma, 1.0), loss.call(b, a, 1 - probability, sigma, 1.0)
    assert torch.allclose(one, other, atol=1e-9) and one.isfinite().all()
    if name not in ("margin", "win-tie", "oprm"):
        assert (one >= -3e-4).all(), "at least 0"


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_raise_the_winner_and_are_right(name: str) -> None:
    loss = LOSSES[name]
    a, b = outputs(loss.output, 3)
    sigma, won = torch.full((len(a),), 0.5, dtype=torch.float64), torch.ones(len(a), dtype=torch.float64)
    a.requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: loss.call(x, b, won, sigma, 0.5), (a,))
    (slope,) = torch.autograd.grad(loss.call(a, b, won, sigma, 0.5).sum(), a)
    kind: Any = loss.output
    raised = mean_of((a - 0.01 * slope).detach(), kind) - mean_of(a.detach(), kind)
    assert (raised > 0).all()


def test_the_least_loss_is_at_the_probability_that_is_asked_for() -> None:
    d = torch.linspace(-6, 6, 2401, dtype=torch.float64)
    for p in (0.1, 0.5, 0.9):
        probability = torch.full_like(d, p)
        found = d[bradley_terry(d, probability).argmin()]
        assert float(found) == pytest.approx(math.log(p / (1 - p)), abs=0.01)
        assert float(bradley_terry(d, probability).min()) == pytest.approx(0, abs=1e-5)
        for law in (thurstone_nll, fidelity):
            found = d[law(d, torch.full_like(d, 2.0), probability).argmin()]
            quantile = torch.special.ndtri(torch.tensor(p, dtype=torch.float64))
            assert float(found) == pytest.approx(float(quantile) * math.sqrt(2), abs=0.01)


def test_ties_are_pulled_together() -> None:
    d, half = torch.linspace(-4, 4, 801, dtype=torch.float64), torch.full((801,), 0.5, dtype=torch.float64)
    tied = win_tie(d, half, 3.0)
    assert float(d[tied.argmin()]) == pytest.approx(0, abs=1e-9)
    assert float(tied.min()) == pytest.approx(2 * math.log1p(math.exp(3.0)))
    won = torch.ones_like(d)
    assert torch.equal(win_tie(d, won, 3.0), margin(d, won, 3.0))
    assert torch.allclose(margin(d, won, 0.0), bradley_terry(d, won))


def test_thurstone_is_the_probability_that_one_of_two_gaussian_scores_is_higher() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.tensor([[0.4, 0.2]]), torch.tensor([[-0.1, -0.5]])
    draws = [
        o[:, :1] + variance_of(o, "gaussian").sqrt()[:, None] * torch.randn(1, 400_000, generator=generator)
        for o in (a, b)
    ]
    share = float((draws[0] > draws[1]).float().mean())
    assert float(probability_above(a, b, "gaussian")) == pytest.approx(share, abs=0.003)
    sigma = torch.tensor([0.0, 0.4, 1.0])
    assert noise_variance(sigma).tolist() == pytest.approx([0.05, 0.37, 2.05])


def test_far_out_tails_are_finite() -> None:
    d, one = torch.tensor([-60.0, 60.0], requires_grad=True), torch.ones(2)
    for law in (thurstone_nll, fidelity):
        loss = law(d, 0.1 * one, one)
        (slope,) = torch.autograd.grad(loss.sum(), d)
        assert loss.isfinite().all() and slope.isfinite().all()


@given(seed=st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_orders_of_grades_are_counted_completely(seed: int) -> None:
    a, b = outputs("ordinal", seed, 1)
    p, q = a.softmax(-1)[0].tolist(), b.softmax(-1)[0].tolist()
    above = sum(x * y for i, x in enumerate(p) for j, y in enumerate(q) if i > j)
    same = sum(x * y for x, y in zip(p, q, strict=True))
    found = ordered(a, b)
    assert (float(found[0]), float(found[1])) == pytest.approx((above, same))
    assert float(found[0] + found[1] + ordered(b, a)[0]) == pytest.approx(1)
    assert float(probability_above(a, b, "ordinal") + probability_above(b, a, "ordinal")) == pytest.approx(1)


def test_the_soft_target_of_grades_has_the_target_as_its_mean() -> None:
    target = torch.tensor([0.0, 0.1, 0.25, 0.6, 0.99, 1.0], dtype=torch.float64)
    logits = torch.zeros(len(target), 5, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], lr=1.0, max_iter=400, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = ordinal_cross_entropy(logits, target).sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert mean_of(logits.detach(), "ordinal").tolist() == pytest.approx(target.tolist(), abs=2e-3)


def test_the_configuration_says_what_each_loss_needs() -> None:
    assert {name: LossConfig(name=name).output for name in LOSSES} == {n: loss.output for n, loss in LOSSES.items()}  # type: ignore[arg-type]

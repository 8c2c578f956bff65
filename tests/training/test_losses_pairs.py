"""Losses of pairs: closed forms, numerical integration, gradients, and what swapping the members may not change."""

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.reward_models.outputs import RewardOutput, gaussian, ordinal, scalar
from rsm_guidance.training.reward_model.losses import (
    LOSSES,
    NEEDS_ORDINAL,
    PairLabel,
    informs,
    log_order,
    rating_distribution,
    weighted_mean,
)

RATINGS = (1.0, 2.0, 4.0, 5.0)


def label(win: list[float], tie: list[bool] | None = None, **more: Any) -> PairLabel:
    n = len(win)
    sigma = torch.linspace(0, 1, n, dtype=torch.float64)
    return PairLabel(torch.tensor(win).double(), torch.tensor(tie or [False] * n), more.pop("sigma", sigma), **more)


def mirrored(known: PairLabel) -> PairLabel:
    """The label of the pairs with their members exchanged."""
    ratings = None if known.ratings is None else known.ratings.flip(1)
    return PairLabel(1 - known.win, known.tie, known.sigma, ratings)


def random(name: str, count: int = 6, seed: int = 0) -> tuple[RewardOutput, RewardOutput, PairLabel]:
    """Outputs of the kind a loss reads, and labels with ties, soft ones and ratings, some of them missing."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if name in NEEDS_ORDINAL:
        first, second = (ordinal(draw(count, 4), RATINGS) for _ in range(2))
    elif name in ("thurstone", "fidelity"):
        first, second = (gaussian(draw(count, 2)) for _ in range(2))
    else:
        first, second = (scalar(2 * draw(count)) for _ in range(2))
    ratings = torch.tensor([[1.0, 5.0], [2.5, 4.0], [math.nan, 3.0], [math.nan, math.nan], [4.9, 0.0], [2.0, 2.0]])
    known = label([1, 0, 0.5, 0.8, 0.1, 0.5], [False, False, True, False, False, True], ratings=ratings)
    return first, second, known


def scores(*values: float) -> RewardOutput:
    return scalar(torch.tensor(values, dtype=torch.float64))


def value(name: str, gap: float, win: float, tie: bool = False, sigma: float = 0.5, **constants: float) -> float:
    known = label([win], [tie], sigma=torch.tensor([sigma], dtype=torch.float64))
    return LOSSES[name](scores(gap + 0.3), scores(0.3), known, **constants).item()


# --- identities that all share ---


@pytest.mark.parametrize("name", LOSSES)
def test_swapping_members_and_label_changes_nothing(name: str) -> None:
    first, second, known = random(name)
    loss = LOSSES[name](first, second, known)
    assert loss.shape == (6,) and loss.isfinite().all() and (loss >= 0).all()
    assert torch.allclose(loss, LOSSES[name](second, first, mirrored(known)), rtol=1e-12)
    assert torch.equal(informs(name, known), informs(name, mirrored(known)))


@pytest.mark.parametrize("name", LOSSES)
def test_pairs_do_not_touch_each_other(name: str) -> None:
    first, second, known = random(name)
    whole, index = LOSSES[name](first, second, known), torch.tensor([4, 1])
    some = PairLabel(known.win[index], known.tie[index], known.sigma[index], known.ratings[index])  # type: ignore[index]
    assert torch.allclose(LOSSES[name](first.pick(index), second.pick(index), some), whole[index], rtol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    kind = {True: ("ordinal", 4)}.get(name in NEEDS_ORDINAL, ("gaussian", 2))
    read = partial(ordinal, ratings=RATINGS) if kind[0] == "ordinal" else gaussian
    _, _, known = random(name)
    raw = torch.randn(2, 6, kind[1], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    raw.requires_grad_()

    def loss(x: Tensor) -> Tensor:
        total: Tensor = LOSSES[name](read(x[0]), read(x[1]), known)
        return total

    assert torch.autograd.gradcheck(loss, (raw,))


@pytest.mark.parametrize("name", ["bradley-terry", "margin", "soft", "win-tie", "thurstone", "fidelity", "oprm"])
def test_a_pair_pulls_its_members_apart(name: str) -> None:
    logits = torch.zeros(2, 1, 4, dtype=torch.float64, requires_grad=True)
    first, second = (ordinal(x, RATINGS) for x in logits)
    LOSSES[name](first, second, label([1.0])).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0] @ torch.tensor(RATINGS).double() < 0, "the first member's score rises"
    assert torch.allclose(logits.grad[0], -logits.grad[1])


@pytest.mark.parametrize("name", LOSSES)
def test_extreme_scores_give_finite_losses_and_gradients(name: str) -> None:
    for size in (60.0, 1e4):
        raw = torch.tensor([[[-size, 0, 0, size]], [[size, 0, 0, -size]]], requires_grad=True)
        read = partial(ordinal, ratings=RATINGS) if name in NEEDS_ORDINAL else lambda x: scalar(x[:, 0])
        for win, tie in ((1.0, False), (0.0, False), (0.5, True)):
            known = PairLabel(
                torch.tensor([win]), torch.tensor([tie]), torch.tensor([0.0]), torch.tensor([[1.0, math.nan]])
            )
            loss = LOSSES[name](read(raw[0]), read(raw[1]), known)  # type: ignore[operator]
            (gradient,) = torch.autograd.grad(loss.sum(), raw)
            assert loss.isfinite().all() and gradient.isfinite().all(), (size, win)


# --- closed forms ---


def test_bradley_terry_is_the_log_of_a_logistic_probability_and_hears_no_tie() -> None:
    for gap in (-2.0, 0.0, 0.7):
        assert value("bradley-terry", gap, 1.0) == pytest.approx(-math.log(1 / (1 + math.exp(-gap))))
        assert value("bradley-terry", gap, 0.9) == value("bradley-terry", gap, 1.0), (
            "only which side is preferred counts"
        )
        assert math.exp(-value("bradley-terry", gap, 1.0)) + math.exp(
            -value("bradley-terry", gap, 0.0)
        ) == pytest.approx(1)
        assert value("bradley-terry", gap, 0.5, tie=True) == value("bradley-terry", gap, 0.5) == 0


def test_a_margin_asks_for_a_larger_gap() -> None:
    assert value("margin", 0.7, 1.0, margin=2.0) == pytest.approx(value("bradley-terry", -1.3, 1.0))
    assert value("margin", 0.7, 1.0) == pytest.approx(value("bradley-terry", -0.3, 1.0)), "1 by default"


def test_soft_labels_are_met_exactly_and_cost_nothing_then() -> None:
    for win in (0.0, 0.2, 0.5, 0.9, 1.0):
        gap = 30.0 if win == 1 else -30.0 if win == 0 else math.log(win / (1 - win))
        assert value("soft", gap, win) == pytest.approx(0, abs=1e-9)
        p = 1 / (1 + math.exp(-0.7))
        direct = sum(w * math.log(w / q) for w, q in ((win, p), (1 - win, 1 - p)) if w)
        assert value("soft", 0.7, win) == pytest.approx(direct)
    assert value("soft", 0.7, 1.0) == pytest.approx(value("bradley-terry", 0.7, 1.0))
    assert value("soft", 0.7, 1.0, tie=True) == value("soft", 0.7, 0.5), "a tie is a half, whatever its label says"


def test_three_pairs_of_pick_a_pic_weigh_by_their_prompts() -> None:
    """Each pair weighs 1 / (pairs of its prompt), over the whole batch; a tie costs log .5 less than its cross-entropy."""
    known = label([1.0, 0.0, 0.5], [False, False, True])
    losses = LOSSES["soft"](scores(1.0, 1.0, 0.4), scores(0.0, 0.5, 0.0), known)
    weights = torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64)
    tie = -0.5 * math.log(1 / (1 + math.exp(-0.4))) - 0.5 * math.log(1 / (1 + math.exp(0.4))) + math.log(0.5)
    by_hand = (math.log1p(math.exp(-1)) + 0.5 * math.log1p(math.exp(0.5)) + 0.5 * tie) / 2
    assert weighted_mean(losses, weights).item() == pytest.approx(by_hand)
    gap = torch.zeros(1, requires_grad=True)
    weighted_mean(gap * 3, torch.zeros(1)).backward()
    assert gap.grad is not None and gap.grad.item() == 0


def test_win_tie_is_least_at_no_gap_for_ties() -> None:
    for m in (0.5, 3.0):
        costs = [value("win-tie", gap, 0.5, tie=True, margin=m) for gap in np.linspace(-2, 2, 41)]
        assert int(np.argmin(costs)) == 20 and costs[20] == pytest.approx(2 * math.log1p(math.exp(m)))
        assert value("win-tie", 0.7, 1.0, margin=m) == pytest.approx(value("margin", 0.7, 1.0, margin=m))
        assert value("win-tie", 0.7, 0.0, margin=m) == pytest.approx(value("margin", 0.7, 0.0, margin=m))


@pytest.mark.parametrize("sigma", [0.0, 0.4, 1.0])
def test_thurstone_is_the_chance_that_one_noisy_score_exceeds_the_other(sigma: float) -> None:
    """By integration: two normal scores of variance 2 sigma^2 + .05 each."""
    deviation, gap = math.sqrt(2 * sigma**2 + 0.05), 0.7
    grid = np.linspace(-12, 12, 20001) * deviation
    p = np.trapezoid(norm.pdf(grid, gap, deviation) * norm.cdf(grid, 0, deviation), grid)
    assert value("thurstone", gap, 1.0, sigma=sigma) == pytest.approx(-math.log(p), rel=1e-6)
    assert value("fidelity", gap, 1.0, sigma=sigma) == pytest.approx(1 - math.sqrt(p), rel=1e-6)
    assert value("thurstone", gap, 0.0, sigma=sigma) == pytest.approx(-math.log(1 - p), rel=1e-5)
    mixed = 1 - math.sqrt(0.8 * p) - math.sqrt(0.2 * (1 - p))
    assert value("fidelity", gap, 0.8, sigma=sigma) == pytest.approx(mixed, rel=1e-5)


def test_variances_of_the_model_add_to_that_of_the_noise() -> None:
    raw = torch.tensor([[0.7, 0.2]], dtype=torch.float64), torch.tensor([[0.0, -1.0]], dtype=torch.float64)
    first, second = (gaussian(r) for r in raw)
    known = label([1.0], sigma=torch.tensor([0.5]).double())
    own = sum(math.log1p(math.exp(r[0, 1].item())) + 1e-4 for r in raw)
    for noise, floor in ((2.0, 0.05), (0.0, 0.0)):
        p = norm.cdf(0.7 / math.sqrt(own + 2 * (noise * 0.25 + floor)))
        loss = LOSSES["thurstone"](first, second, known, noise=noise, floor=floor)
        assert loss.item() == pytest.approx(-math.log(p))
    with pytest.raises(UsageError, match="set a floor"):
        LOSSES["thurstone"](scores(1.0), scores(0.0), known, noise=0.0, floor=0.0)
    with pytest.raises(UsageError, match="not negative"):
        LOSSES["fidelity"](first, second, known, noise=-1.0)


def test_more_noise_makes_the_same_gap_count_less() -> None:
    costs = [value("thurstone", 1.0, 1.0, sigma=s) for s in (0.0, 0.3, 0.6, 1.0)]
    assert costs == sorted(costs)


def test_order_of_two_distributions_is_counted() -> None:
    first, second, known = random("oprm")
    p, q = first.log_probs.exp(), second.log_probs.exp()  # type: ignore[union-attr]
    order = [sum(float(p[i, a] * q[i, b]) for a in range(4) for b in range(4) if a > b) for i in range(6)]
    equal = (p * q).sum(-1).tolist()
    above, same, below = (x.exp().tolist() for x in log_order(first.log_probs, second.log_probs))  # type: ignore[arg-type]
    assert above == pytest.approx(order) and same == pytest.approx(equal)
    assert [a + s + b for a, s, b in zip(above, same, below, strict=True)] == pytest.approx([1.0] * 6)
    losses = LOSSES["oprm"](first, second, known).tolist()
    assert losses[0] == pytest.approx(-math.log(order[0])) and losses[2] == pytest.approx(-math.log(equal[2]))
    assert losses[3] == pytest.approx(-0.8 * math.log(order[3]) - 0.2 * math.log(below[3]))


def test_the_gradient_of_the_order_is_the_other_members_distribution() -> None:
    p = torch.tensor([[0.1, 0.2, 0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    q = torch.tensor([[0.25, 0.35, 0.3, 0.1]], dtype=torch.float64)
    (gradient,) = torch.autograd.grad(log_order(p.log(), q.log())[0].exp().sum(), p)
    assert gradient[0].tolist() == pytest.approx([0, 0.25, 0.6, 0.9]), "P(b < k)"


def test_ratings_lie_on_the_two_classes_around_them() -> None:
    values = torch.tensor(RATINGS).double()
    ratings = torch.tensor([1.0, 1.25, 2.0, 3.0, 4.9, 5.0, 0.0, 9.0])
    spread = rating_distribution(ratings, values)
    assert torch.allclose(spread.sum(1), torch.ones(8).double()) and (spread > 0).sum(1).max() == 2
    assert torch.allclose(spread @ values, ratings.double().clamp(1, 5), atol=1e-6)
    first, second, known = random("ordinal")
    losses = LOSSES["ordinal"](first, second, known)
    log_p, log_q = first.log_probs, second.log_probs
    assert log_p is not None and log_q is not None
    by_hand = -(log_p[1] @ spread.new_tensor([0, 0.75, 0.25, 0]) + log_q[1, 2]) / 2
    assert losses[1].item() == pytest.approx(by_hand.item())
    assert losses[2].item() == pytest.approx(-(log_q[2, 1] + log_q[2, 2]).item() / 2), "the one that has a rating"
    assert losses[3] == 0 and informs("ordinal", known).tolist() == [True, True, True, False, True, True]


def test_what_a_loss_cannot_read_is_named() -> None:
    for name in NEEDS_ORDINAL:
        with pytest.raises(UsageError, match=f"{name}.*output: ordinal"):
            LOSSES[name](scores(1.0), scores(0.0), label([1.0], ratings=torch.ones(1, 2)))
    first, second, _ = random("ordinal")
    with pytest.raises(UsageError, match="needs ratings"):
        LOSSES["ordinal"](first, second, label([1.0] * 6))


def test_ties_inform_the_losses_that_know_them() -> None:
    known = label([1.0, 0.5, 0.5], [False, True, False])
    for name in ("bradley-terry", "margin"):
        assert informs(name, known).tolist() == [True, False, False]
    for name in ("soft", "win-tie", "thurstone", "fidelity", "oprm"):
        assert informs(name, known).all()


@pytest.mark.parametrize("name", ["soft", "thurstone", "fidelity"])
def test_a_tie_is_met_by_equal_scores(name: str) -> None:
    costs = [value(name, gap, 0.5, tie=True) for gap in np.linspace(-1, 1, 21)]
    assert int(np.argmin(costs)) == 10 and costs[10] == pytest.approx(
        math.log(2) if name == "thurstone" else 0, abs=1e-12
    )

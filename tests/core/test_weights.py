"""Log-domain weights: closed forms, invariances, and the float traps of inversion sampling."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsm_guidance.core.weights import choose, effective_sample_size, log_mean_exp, normalize

INF = float("inf")
LARGEST = (math.nextafter(1.0, 0.0), 1 - 2.0**-24)  # of float64 and of float32 below one

finite_rows = st.lists(st.floats(-300, 300), min_size=1, max_size=12)
rows = st.lists(st.one_of(st.floats(-300, 300), st.just(-INF)), min_size=1, max_size=12).filter(
    lambda r: any(v > -INF for v in r)
)


def tensor(values: object, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype)


@given(rows)
@settings(max_examples=60, deadline=None)
def test_normalized_weights_sum_to_one(row: list[float]) -> None:
    lw = normalize(tensor(row))
    assert float(lw.exp().sum()) == pytest.approx(1, abs=1e-12)
    assert lw.dtype == torch.float64
    assert torch.equal(lw == -INF, tensor(row) == -INF)


@given(finite_rows, st.floats(-1e4, 1e4), st.floats(0, 0.999))
@settings(max_examples=60, deadline=None)
def test_a_constant_changes_nothing(row: list[float], shift: float, u: float) -> None:
    lw, moved = tensor(row), tensor(row) + shift
    torch.testing.assert_close(normalize(moved), normalize(lw), rtol=0, atol=1e-8)
    torch.testing.assert_close(effective_sample_size(moved), effective_sample_size(lw), rtol=1e-8, atol=0)
    torch.testing.assert_close(log_mean_exp(moved), log_mean_exp(lw) + shift, rtol=0, atol=1e-8)


def test_effective_sample_size_closed_forms() -> None:
    for k in (1, 2, 7, 64):
        assert float(effective_sample_size(torch.zeros(k))) == pytest.approx(k)
    assert float(effective_sample_size(tensor([0, -INF, -INF]))) == pytest.approx(1)
    assert float(effective_sample_size(tensor([5.0, 5.0, -INF, -INF]))) == pytest.approx(2)
    for w in (0.1, 0.5, 3.0):  # two particles of weights 1 and w
        ess = float(effective_sample_size(tensor([700.0, 700 + math.log(w)])))
        assert ess == pytest.approx((1 + w) ** 2 / (1 + w**2))
    geometric = tensor([i * math.log(0.5) for i in range(40)])  # weights 2^-i: (sum)^2 / sum of squares = 4 / (4 / 3)
    assert float(effective_sample_size(geometric)) == pytest.approx(3)


@given(rows)
@settings(max_examples=60, deadline=None)
def test_effective_sample_size_is_bounded(row: list[float]) -> None:
    alive = sum(v > -INF for v in row)
    assert 1 - 1e-9 <= float(effective_sample_size(tensor(row))) <= alive + 1e-9


def test_log_mean_exp() -> None:
    assert float(log_mean_exp(tensor([math.log(1), math.log(2), math.log(6)]))) == pytest.approx(math.log(3))
    assert float(log_mean_exp(tensor([-2000.0, -2000.0]))) == pytest.approx(-2000)
    assert float(log_mean_exp(tensor([2000.0, -INF]))) == pytest.approx(2000 - math.log(2))
    assert log_mean_exp(torch.zeros(3, 2, 5)).shape == (3, 2)


def test_batches_are_rows() -> None:
    lw = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    u = torch.rand(3, 4, generator=torch.Generator().manual_seed(1))
    index = choose(lw, u)
    assert index.shape == (3, 4) and index.dtype == torch.int64
    assert effective_sample_size(lw).shape == (3, 4)
    for i in range(3):
        for j in range(4):
            assert int(index[i, j]) == int(choose(lw[i, j], u[i, j]))


def test_choice_inverts_the_cumulative_weights() -> None:
    lw = tensor([0.2, 0.0, 0.5, 0.3, 0.0]).log()
    uniforms = [0.0, 0.19, 0.21, 0.69, 0.71, 0.999999, *LARGEST]
    assert [int(choose(lw, tensor(u))) for u in uniforms] == [0, 0, 2, 2, 3, 3, 3, 3]


def test_choice_has_the_right_frequencies() -> None:
    w = tensor([0.1, 0.0, 0.6, 0.3])
    u = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    counts = torch.bincount(choose((w.log() - 900).expand(10000, 4), u), minlength=4)
    assert counts.tolist() == [1000, 0, 6000, 3000]


@given(rows, st.one_of(st.floats(0, 1, exclude_max=True), st.sampled_from((0.0, *LARGEST))))
@settings(max_examples=200, deadline=None)
def test_zero_weights_are_never_chosen(row: list[float], u: float) -> None:
    index = int(choose(tensor(row), tensor(u)))
    assert row[index] > -INF


def test_the_float32_trap() -> None:
    """In float32, searchsorted(cumsum, 1 - 2^-24) lands on trailing zero weights in 139 of 2000 such rows."""
    g = torch.Generator().manual_seed(0)
    lw = torch.randn(2000, 64, generator=g)
    dead = torch.arange(64) >= torch.randint(1, 64, (2000, 1), generator=g)
    lw[dead] = -INF
    for u in (0.0, *LARGEST):
        index = choose(lw, torch.full((2000,), u, dtype=torch.float64))
        assert bool(torch.gather(lw, 1, index[:, None]).isfinite().all())
    flipped = lw.flip(-1)  # leading zeros and a uniform of exactly zero
    index = choose(flipped, torch.zeros(2000))
    assert bool(torch.gather(flipped, 1, index[:, None]).isfinite().all())
    naive = torch.searchsorted(lw.softmax(-1).cumsum(-1), torch.full((2000, 1), 1 - 2.0**-24), right=True)
    trapped = torch.gather(lw, 1, naive.clamp(max=63)) == -INF
    assert bool(trapped.any())  # the trap exists


@pytest.mark.parametrize("bad", [float("nan"), INF])
def test_not_a_weight(bad: float) -> None:
    for lw in (tensor([0.0, bad]), tensor([[0.0, 0.0], [bad, -INF]])):
        for reject in (normalize, effective_sample_size, lambda w: choose(w, torch.zeros(w.shape[:-1]))):
            with pytest.raises(ValueError, match="finite or -inf"):
                reject(lw)


def test_no_weight_at_all() -> None:
    for lw in (tensor([-INF, -INF]), tensor([[0.0, 0.0], [-INF, -INF]])):
        for reject in (normalize, effective_sample_size, lambda w: choose(w, torch.zeros(w.shape[:-1]))):
            with pytest.raises(ValueError, match="weight zero"):
                reject(lw)

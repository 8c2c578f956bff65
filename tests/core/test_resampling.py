"""Resampling: right expectation, bounded counts, no particle of weight zero."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsm_guidance.core.resampling import SCHEMES, resample
from rsm_guidance.core.weights import normalize


def counts(log_weights: torch.Tensor, scheme: str, repeats: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    k = len(log_weights)
    uniform = torch.rand(repeats, k, generator=generator, dtype=torch.float64)
    ancestors = resample(log_weights.expand(repeats, k), uniform, scheme)  # type: ignore[arg-type]
    return torch.nn.functional.one_hot(ancestors, k).sum(1).double()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_counts_have_the_right_expectation_and_schemes_their_variance_order(scheme: str) -> None:
    weights = torch.tensor([0.42, 0.03, 0.0, 0.25, 0.3], dtype=torch.float64)
    drawn = counts(weights.log(), scheme, 20_000)
    error = (drawn.mean(0) - 5 * weights).abs()
    assert (error <= 4 * drawn.std(0) / 20_000**0.5 + 1e-9).all()
    assert (drawn[:, 2] == 0).all()
    if scheme in ("systematic", "ssp"):
        assert ((drawn - 5 * weights).abs() < 1).all(), "counts differ from their expectation by less than one"
    if scheme != "multinomial":
        assert drawn.var(0).sum() < counts(weights.log(), "multinomial", 20_000).var(0).sum()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-300, 5) | st.just(-torch.inf), min_size=1, max_size=40).filter(lambda w: max(w) > -torch.inf),
    st.integers(0, 2**31),
    st.sampled_from(sorted(SCHEMES)),
)
def test_any_weights(log_weights: list[float], seed: int, scheme: str) -> None:
    lw = torch.tensor(log_weights, dtype=torch.float64)
    uniform = torch.rand(1, len(lw), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    ancestors = resample(lw[None], uniform, scheme)[0]  # type: ignore[arg-type]
    assert len(ancestors) == len(lw)
    assert (lw[ancestors] > -torch.inf).all(), "a particle of weight zero was chosen"
    assert torch.equal(ancestors, ancestors.sort().values)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_single_precision_cumulative_sums_would_fail_here(scheme: str) -> None:
    """100,000 equal weights followed by zeros: a float32 cumulative sum misses 1 and reaches into the zeros."""
    if scheme in ("ssp", "residual"):
        pytest.skip("no cumulative sum over all particles")
    lw = torch.full((100_200,), 0.1, dtype=torch.float64).log()
    lw[100_000:] = -torch.inf
    uniform = torch.full((1, len(lw)), 1 - 1e-9, dtype=torch.float64)
    assert resample(lw[None], uniform, scheme).max() < 100_000  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_weights_keep_everyone(scheme: str) -> None:
    if scheme == "multinomial":
        pytest.skip("multinomial counts vary even then")
    uniform = torch.rand(3, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(resample(torch.zeros(3, 8), uniform, scheme), torch.arange(8).expand(3, 8))  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if s != "multinomial"])
def test_whole_copies_survive_rounding(scheme: str) -> None:
    """Weights whose expected counts are whole, but come out a rounding error below: these counts, whatever is drawn."""
    generator = torch.Generator().manual_seed(0)
    short = 0
    for k in (6, 9, 13, 24, 38):
        for copies in (torch.ones(k), torch.randint(0, 4, (k,), generator=generator)):
            wanted = copies.double()
            wanted[int(wanted.argmax())] += k - wanted.sum() if wanted.sum() < k else 0
            while wanted.sum() > k:
                wanted[int(wanted.argmax())] -= 1
            weights = normalize(wanted.log() + 0.7).exp()
            short += int(((k * weights / weights.sum()).floor() < wanted).sum())
            for _ in range(20):
                uniform = 0.1 + 0.8 * torch.rand(1, k, generator=generator, dtype=torch.float64)
                ancestors = resample(wanted.log()[None] + 0.7, uniform, scheme)[0]  # type: ignore[arg-type]
                assert ancestors.bincount(minlength=k).tolist() == wanted.tolist()
    assert short > 50, "the weights do round down"


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="unknown resampling scheme 'best'"):
        resample(torch.zeros(1, 2), torch.zeros(1, 2), "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weight zero"):
        resample(torch.full((1, 2), -torch.inf), torch.zeros(1, 2))
    with pytest.raises(ValueError, match="finite or -inf"):
        resample(torch.full((1, 2), torch.nan), torch.zeros(1, 2))

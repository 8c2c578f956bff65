"""Named random streams: a number depends on its name alone."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rsm_guidance.core.random import RandomStreams, derive_seed, generator_of

PROMPTS = ["a red circle", "a blue square", "", "a red circle", "ein grüner Kreis", "a red circle"]


def draw(streams: RandomStreams, row: int) -> tuple[torch.Tensor, float]:
    return streams.normal(row, (2, 3), "noise", 4), streams.uniform(row, "choice", 4)


def test_same_name_same_numbers() -> None:
    first, second = (RandomStreams.for_prompts(7, PROMPTS) for _ in range(2))
    for row in range(len(PROMPTS)):
        a, b = draw(first, row), draw(second, row)
        assert torch.equal(a[0], b[0]) and a[1] == b[1]


def test_names_are_the_same_on_every_machine() -> None:
    """Fixed numbers: a change here changes every published result."""
    assert derive_seed(0, "a red circle", 0, "noise") == 1140095999733085339
    drawn = torch.randn(3, generator=generator_of(0, "a red circle", 0, "noise"))
    assert drawn.tolist() == pytest.approx([0.4763, -0.3095, -1.7052], abs=1e-4)
    streams = RandomStreams.for_prompts(0, ["a red circle"])
    assert streams.normal(0, (3,), "noise").tolist() == pytest.approx([-1.1267, -0.8151, -0.2623], abs=1e-4)
    assert streams.uniform(0, "noise") == pytest.approx(0.7539816644291295, abs=1e-12)


@settings(max_examples=30, deadline=None)
@given(st.permutations(range(len(PROMPTS))))
def test_permuted_prompts_permute_the_numbers(order: list[int]) -> None:
    """Distinct prompts keep their numbers; equal prompts share theirs out in the order of occurrence."""
    plain = RandomStreams.for_prompts(7, PROMPTS)
    permuted = RandomStreams.for_prompts(7, [PROMPTS[i] for i in order])
    by_name = {name: row for row, name in enumerate(plain.names)}
    assert sorted(permuted.names) == sorted(plain.names)
    for row, name in enumerate(permuted.names):
        assert name[0] == PROMPTS[order[row]]
        a, b = draw(permuted, row), draw(plain, by_name[name])
        assert torch.equal(a[0], b[0]) and a[1] == b[1]


def test_repeated_prompts_differ() -> None:
    streams = RandomStreams.for_prompts(7, ["same"] * 6)
    noise = [streams.normal(row, (8,), "noise") for row in range(6)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(noise, 2))


def test_batch_mates_do_not_matter() -> None:
    alone = RandomStreams.for_prompts(7, PROMPTS[:1])
    for size in range(1, len(PROMPTS) + 1):
        batch = RandomStreams.for_prompts(7, PROMPTS[:size])
        assert torch.equal(draw(batch, 0)[0], draw(alone, 0)[0])
        assert draw(batch, 0)[1] == draw(alone, 0)[1]


def test_every_part_of_the_name_matters() -> None:
    base: tuple[int | str, ...] = (7, "prompt", 0, "noise", 3, 1)
    others: list[tuple[int | str, ...]] = [
        (8, "prompt", 0, "noise", 3, 1),
        (7, "Prompt", 0, "noise", 3, 1),
        (7, "prompt", 1, "noise", 3, 1),
        (7, "prompt", 0, "choice", 3, 1),
        (7, "prompt", 0, "noise", 1, 3),
        (7, "prompt", 0, "noise", 31),
        (7, "prompt", 0, "noise", 3, "1"),
        (7, "prompt", 0, "noise", 3),
    ]
    seeds = [derive_seed(*name) for name in [base, *others]]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= s < 2**63 for s in seeds)


def test_draws_of_one_stream_do_not_move_another() -> None:
    streams = RandomStreams.for_prompts(7, PROMPTS)
    before = streams.normal(0, (4,), "noise", 1)
    streams.normal(0, (1000,), "noise", 0)
    streams.uniform(1, "noise", 1)
    assert torch.equal(streams.normal(0, (4,), "noise", 1), before)


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    streams = RandomStreams.for_prompts(7, PROMPTS)
    streams.normal(0, (100,), "noise")
    streams.uniform(0, "choice")
    assert torch.equal(torch.get_rng_state(), state)


def test_shapes_and_types() -> None:
    streams = RandomStreams.for_prompts(7, PROMPTS)
    noise = streams.normal(0, torch.Size((2, 3, 4)), "noise")
    assert noise.shape == (2, 3, 4) and noise.dtype == torch.float32 and noise.device.type == "cpu"
    with pytest.raises(IndexError):
        streams.normal(len(PROMPTS), (1,))


def test_numbers_across_streams_are_independent_and_distributed_as_said() -> None:
    """One number from each of many neighbouring streams: mean, variance, correlation of neighbours, uniformity."""
    streams = RandomStreams.for_prompts(7, ["p"])
    n = 4000
    z = torch.stack([streams.normal(0, (2,), "noise", i) for i in range(n)]).double()
    tolerance = 4 / n**0.5
    assert float(z.mean(0).abs().max()) < tolerance
    assert float((z.var(0) - 1).abs().max()) < tolerance * 2**0.5
    assert abs(float((z[1:, 0] * z[:-1, 0]).mean())) < tolerance
    assert abs(float((z[:, 0] * z[:, 1]).mean())) < tolerance
    u = torch.tensor([streams.uniform(0, "choice", i) for i in range(n)], dtype=torch.float64).sort().values
    assert 0 <= float(u[0]) and float(u[-1]) < 1
    distance = (u - (torch.arange(n, dtype=torch.float64) + 0.5) / n).abs().max()
    assert float(distance) < 1.95 / n**0.5  # Kolmogorov-Smirnov at 0.1 %


def test_the_state_of_a_stream_is_wholly_its_names() -> None:
    """`manual_seed` uses 32 bits, so that seeds equal in these give one stream; ours differ, and nowhere share a word."""
    a, b = (torch.Generator().manual_seed(seed) for seed in (5, 5 + 2**32))
    assert torch.equal(torch.randn(4, generator=a), torch.randn(4, generator=b)), "torch's own seeds do collide"
    states = torch.stack([generator_of(seed, "a").get_state() for seed in (5, 5 + 2**32, 6)])
    words = states[:, 24 : 24 + 8 * 624].contiguous().view(torch.int64)
    assert words.min() >= 0 and words.max() < 2**32 and len(set(words.flatten().tolist())) > 3 * 624 - 5
    assert all(int(word) > 2**16 for word in words.double().mean(1)), "the words fill their 32 bits"


def test_streams_are_standard_normal_and_independent_of_each_other() -> None:
    drawn = torch.stack([torch.randn(200, generator=generator_of("stream", i)) for i in range(400)]).double()
    assert abs(float(drawn.mean())) < 4 / 80_000**0.5 and abs(float(drawn.var()) - 1) < 4 * (2 / 80_000) ** 0.5
    first = drawn[:, :50]
    correlation = torch.corrcoef(first.T) - torch.eye(50)
    assert float(correlation.abs().max()) < 5.2 / 400**0.5, "what streams draw first is not alike"

"""Composition of rewards, by hand-computed numbers and through samplers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rsm_guidance as rg
from rsm_guidance.rewards import Composite, Term, as_reward, is_sum, parts_of
from rsm_guidance.rewards.compose import normalized
from rsm_guidance.samplers import FKSteering, RewardGradient

IMAGES = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "a", "a"]


def red(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


def blue(images: Tensor, prompts: list[str]) -> Tensor:
    return images[:, 2].mean((1, 2))


def test_sums_ands_and_floors_are_as_by_hand() -> None:
    r, b = red(IMAGES, PROMPTS), blue(IMAGES, PROMPTS)
    total = Composite((Term(red, 2.0), Term(blue, -0.5)))
    assert torch.allclose(total(IMAGES, PROMPTS), 2 * r - 0.5 * b) and total.name == "2 red + -0.5 blue"
    both = Composite((Term(red), Term(blue, 3.0)), "and")
    assert torch.allclose(both(IMAGES, PROMPTS), r.sigmoid().log() + 3 * b.sigmoid().log())
    floor = float(r.median())
    kept = Composite((Term(blue), Term(red, 0.0, floor)), penalty=1000.0)(IMAGES, PROMPTS)
    assert torch.allclose(kept, b - 1000 * (floor - r).clamp(min=0))


def test_normalisation_is_within_prompts() -> None:
    scores = torch.tensor([1.0, 50.0, 3.0, 2.0])
    assert torch.allclose(normalized(scores, PROMPTS, "zscore"), torch.tensor([-1.0, 0, 1, 0]) * math.sqrt(1.5))
    assert normalized(scores, PROMPTS, "rank").tolist() == [0.0, 0.0, 1.0, 0.5]
    assert normalized(torch.ones(4), PROMPTS, "zscore").tolist() == [0.0] * 4
    assert normalized(torch.ones(3), ["a"] * 3, "rank").tolist() == [0.5] * 3


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=12), st.floats(1, 3), st.floats(-5, 5))
def test_ranks_survive_every_rising_map_and_stay_in_range(values: list[float], scale: float, shift: float) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    ranks = normalized(scores, ["p"] * len(values), "rank")
    assert ((ranks >= 0) & (ranks <= 1)).all()
    assert float(ranks.mean()) == pytest.approx(0.5 if len(values) > 1 else 0.0)
    moved = normalized(scores.round(decimals=2) * scale + shift, ["p"] * len(values), "rank")
    assert torch.equal(moved, normalized(scores.round(decimals=2), ["p"] * len(values), "rank"))


def test_windows_open_and_close_terms() -> None:
    composite = Composite((Term(red, window=(0.0, 0.4)), Term(blue, window=(0.3, 1.0))))
    assert [len(composite.at(p).terms) for p in (0.1, 0.35, 1.0)] == [1, 2, 1]
    assert composite.at(1.0).terms[0].reward == as_reward(blue)
    closed = Composite((Term(red, window=(0.0, 0.1)),))
    assert closed.at(0.9).terms == closed.terms


def test_composites_guide_and_carry_gradients(guided: DiffusionPipeline) -> None:
    call: dict[str, Any] = {"prompt": ["a star"] * 4, "seed": 0, "num_inference_steps": 6, "guidance_scale": 3.0}
    composite = Composite((Term(red), Term(blue, -1.0, window=(0.5, 1.0))), normalize="none")
    step = RewardGradient().transition
    plain = guided(**call, sampler=rg.Unguided(step), reward=composite)
    best = FKSteering(4, transition=step, returned="best")
    for sampler in (rg.BestOfN(4, step), best, RewardGradient(0.4)):
        assert sum(guided(**call, sampler=sampler, reward=composite).rewards) > sum(plain.rewards)
    ranked = Composite((Term(red), Term(blue, -1.0)), normalize="rank")
    out = guided(**call, sampler=rg.StepwiseSampling(3), reward=ranked)
    assert all(0 <= s + 1 <= 2 for level in out.trace["levels"] for s in level["scores"][0])


def test_texts_with_weights_are_composites_of_known_rewards(drm: rg.DiffusionRewardModel) -> None:
    judge: Any = rg.resolve_reward("shapes-verifier + 0.25 * shapes-drm")
    images, prompts = torch.rand(2, 3, 64, 64), ["a red star", "a blue circle"]
    expected = rg.resolve_reward("shapes-verifier")(images, prompts) + 0.25 * drm.score_images(images, prompts)
    assert torch.allclose(judge(images, prompts).double(), expected.double(), atol=1e-4)
    for text, words in (("much * shapes-drm", "no number"), ("shapes-drm + nobody", "unknown reward 'nobody'")):
        with pytest.raises(ValueError, match=words):
            rg.resolve_reward(text)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Composite(()), "at least one term"),
        (lambda: Composite((Term(red),), "xor"), "combine is"),  # type: ignore[arg-type]
        (lambda: Term(red, float("nan")), "weight must be finite"),
        (lambda: Term("red"), "a function \\(images"),  # type: ignore[arg-type]
        (lambda: Term(red, window=(0.5, 0.5)), "window must be"),
        (lambda: Composite((Term(lambda i, p: torch.zeros(3)),))(IMAGES, PROMPTS), "returned shape"),
    ],
)
def test_bad_input_is_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_floors_are_of_the_plain_reward() -> None:
    r, prompts = red(IMAGES, PROMPTS), ["a"] * 4
    floor = float(r.median())
    kept = Composite((Term(red, floor=floor),), normalize="zscore", penalty=10.0)(IMAGES, prompts)
    z = (r - r.mean()) / r.std(correction=0)
    assert torch.allclose(kept, z - 10 * (floor - r).clamp(min=0), atol=1e-5)


def test_windows_include_their_ends() -> None:
    composite = Composite((Term(red, window=(0.0, 0.4)), Term(red, window=(0.4, 1.0))))
    assert [len(composite.at(progress).terms) for progress in (0.0, 0.4, 1.0)] == [1, 2, 1]


@pytest.mark.parametrize("value", [0.1, 0.3, 7.7])
def test_equal_scores_have_standard_score_zero_and_a_gradient(value: float) -> None:
    scores = torch.full((7,), value, requires_grad=True)
    standard = normalized(scores, ["a"] * 7, "zscore")
    assert standard.tolist() == [0.0] * 7
    assert torch.autograd.grad(standard.sum(), scores)[0].isfinite().all()


def test_signs_in_quotes_and_brackets_are_part_of_an_option(tmp_path: Path) -> None:
    text = "0.5 * vqa:model=x:question='is it red + blue * 2?' + compressibility"
    assert parts_of(text) == ["vqa:model=x:question='is it red + blue * 2?'", "compressibility"]
    assert not is_sum("vqa:model=x:question='red + blue'") and is_sum("2 * compressibility")
    apostrophe = tmp_path / "o'neil"
    assert parts_of(f"{apostrophe} + compressibility") == [str(apostrophe), "compressibility"]

"""The shapes world: grammar, renderer and verifier agree with each other."""

import random

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from rsm_guidance.shapes import CATEGORIES, caption_set, parse_caption, random_caption, render_spec, verify
from rsm_guidance.shapes.model import _merges, build_tokenizer
from rsm_guidance.shapes.render import Placed, render
from rsm_guidance.shapes.scenes import COLORS, SHAPES, Group, SceneSpec, is_held_out, vocabulary, wordings
from rsm_guidance.shapes.training.hard_negatives import hard_negative
from rsm_guidance.shapes.verify import see


@given(st.sampled_from(CATEGORIES), st.integers(0, 10**6), st.booleans())
def test_every_caption_parses_back_to_its_specification(category: str, seed: int, held_out: bool) -> None:
    caption = random_caption(category, random.Random(seed), held_out)
    assert caption.category == category
    assert is_held_out(caption) == held_out
    assert parse_caption(caption.text).spec.canonical() == caption.spec.canonical()


@given(st.sampled_from(CATEGORIES[1:]), st.integers(0, 10**6))
def test_no_wording_leaks_a_held_out_composition(category: str, seed: int) -> None:
    spec = random_caption(category, random.Random(seed), held_out=True).spec
    assert all(is_held_out(parse_caption(w)) for w in wordings(spec))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(CATEGORIES), st.integers(0, 10**6))
def test_renders_satisfy_their_caption_and_hard_negatives_do_not(category: str, seed: int) -> None:
    rng = random.Random(seed)
    caption = random_caption(category, rng)
    right = verify(render_spec(caption.spec, rng), caption.text)
    assert right.correct and right.score == 1.0
    wrong = verify(render_spec(hard_negative(caption.spec, rng), rng), caption.text)
    assert not wrong.correct and wrong.score < 1.0


def test_renders_through_the_autoencoder_keep_their_verdict(stock: StableDiffusion3Pipeline) -> None:
    rng = random.Random(0)
    captions = [random_caption(CATEGORIES[i % 6], rng) for i in range(300)]
    specs = [c.spec if i % 2 else hard_negative(c.spec, rng) for i, c in enumerate(captions)]
    images = np.stack([render_spec(s, rng) for s in specs])
    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        decoded = torch.cat([stock.vae.decode(stock.vae.encode(b).latent_dist.mean).sample for b in batch.split(50)])
    again = ((decoded + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
    same = [
        verify(a, c.text).correct == verify(b, c.text).correct for a, b, c in zip(images, again, captions, strict=True)
    ]
    assert np.mean(same) >= 0.99


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_every_object_is_recognised(shape: str, color: str) -> None:
    for radius in (6.5, 9.0, 15.0):
        [seen] = see(render([Placed(color, shape, 30.3, 33.7, radius)]))
        assert (seen.color, seen.shape) == (color, shape)
        assert abs(seen.x + 0.5 - 30.3) < 1 and abs(seen.y + 0.5 - 33.7) < 4  # a triangle weighs low


def test_verifier_is_strict_on_colour_count_and_relation_and_tolerates_sloppy_outlines() -> None:
    red, star = Placed("red", "circle", 18, 32, 9), Placed("blue", "star", 46, 32, 9)
    image = render([red, star])
    assert verify(image, "a red circle left of a blue star").correct
    assert verify(image, "a blue star to the right of a red circle").correct
    for wrong in (
        "a blue circle and a red star",
        "a red circle right of a blue star",
        "two red circles",
        "a red circle",
    ):
        verdict = verify(image, wrong)
        assert not verdict.correct and verdict.score < 1
    assert verify(image, "a red circle above a blue star").score > verify(image, "four green squares").score
    blurred = np.asarray(Image.fromarray(image).filter(ImageFilter.BoxBlur(1)))
    assert verify(blurred, "a red circle left of a blue star").correct
    assert verify(np.full((64, 64, 3), 240, np.uint8), "a red circle").score == 0


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.0, 1.0))
def test_no_image_breaks_the_verifier(seed: int, strength: float) -> None:
    """Pale, blurred and noisy images are judged, not refused."""
    rng = np.random.default_rng(seed)
    clean = render_spec(random_caption("counting", random.Random(seed)).spec, random.Random(seed)).astype(float)
    pale = 244 + strength * (clean - 244) + rng.normal(0, 40 * (1 - strength), clean.shape)
    verdict = verify(pale.clip(0, 255).round().astype(np.uint8), "two red circles and a blue square")
    assert 0 <= verdict.score <= 1


def test_caption_sets_are_unique_disjoint_and_reproducible() -> None:
    held, train = caption_set(512), caption_set(3000, held_out=False)
    assert len({c.text for c in held}) == 512
    assert held == caption_set(512)
    assert not {c.text for c in held} & {c.text for c in train}
    specs = {c.spec.canonical() for c in train if c.category != "single_object"}
    assert not [c for c in held if c.category != "single_object" and c.spec.canonical() in specs]
    assert {c.category for c in held} == set(CATEGORIES)
    with pytest.raises(ValueError, match="unique captions exist"):
        caption_set(100_000, categories=("single_object",))


@pytest.mark.parametrize(
    "text",
    ["", "a", "a pink circle", "five circles", "a red circle on a blue square", "a cat", "two stars above a cross"],
)
def test_captions_outside_the_grammar_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="cannot verify the caption"):
        parse_caption(text)


def test_the_tokenizer_knows_every_word_and_survives_others() -> None:
    assert _merges(["ab", "cab", "dc"]) == [("a", "b</w>"), ("d", "c</w>"), ("c", "ab</w>")], "ties break in one way"
    tokenizer = build_tokenizer()
    assert all(len(tokenizer.tokenize(word)) == 1 for word in vocabulary())
    assert len(tokenizer.tokenize("zebra")) > 1
    longest = max(
        (w for w in wordings(SceneSpec((Group(1, "red", "cross"), Group(1, "blue", "star")), "left of"))), key=len
    )
    assert len(tokenizer(longest).input_ids) <= tokenizer.model_max_length


def test_images_of_the_wrong_form_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8 images"):
        see(np.zeros((64, 64, 3), np.float32))

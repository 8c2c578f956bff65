"""Published reward models: small ones in the real layouts against calculations of their own, and what they refuse."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPModel

from rsm_guidance.core.errors import UsageError
from rsm_guidance.rewards import resolve_reward
from rsm_guidance.rewards.images import OPENAI_MEAN, OPENAI_STD, longest_side, shortest_side, standardized
from tests.rewards import layouts
from tests.rewards.cases import PUBLISHED, Case, made, processor
from tests.rewards.layouts import PROMPTS, SIDE, pictures, tensor_of

SIZES = [(64, 64), (40, 75), (97, 41), (32, 32), (33, 32), (24, 16)]


@pytest.mark.parametrize("size", [*SIZES, (300, 517)])
def test_clip_preparation_is_that_of_the_processor_to_the_last_bit_of_a_byte(size: tuple[int, int]) -> None:
    side = 224 if max(size) > 200 else SIDE
    images = pictures(*size)
    found = standardized(shortest_side(tensor_of(images), side))
    assert torch.allclose(found, processor(side)(images, return_tensors="pt")["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
def test_hpsv2_preparation_resizes_floats_by_the_longest_side_and_pads(size: tuple[int, int]) -> None:
    images = pictures(*size)
    scale = SIDE / max(size)
    height, width = (round(s * scale) for s in size)
    expected = torch.zeros(3, 3, SIDE, SIDE)
    top, left = (SIDE - height) // 2, (SIDE - width) // 2
    for i, image in enumerate(images):
        for c, band in enumerate(image.split()):
            levels = Image.fromarray(np.asarray(band, dtype=np.float32) / 255).resize((width, height), Image.BICUBIC)
            expected[i, c, top : top + height, left : left + width] = torch.from_numpy(np.array(levels))
    assert torch.allclose(longest_side(tensor_of(images), SIDE), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(40, 75), (75, 40), (45, 32)])
def test_image_reward_rounds_half_of_an_odd_margin_to_even(size: tuple[int, int]) -> None:
    images = pictures(*size)
    height, width = (int(SIDE * s / min(size)) for s in size)
    top, left = int(round((height - SIDE) / 2.0)), int(round((width - SIDE) / 2.0))
    crop = [i.resize((width, height), Image.BICUBIC).crop((left, top, left + SIDE, top + SIDE)) for i in images]
    assert torch.allclose(shortest_side(tensor_of(images), SIDE, rounded_crop=True), tensor_of(crop), atol=1e-6)


def test_constants_are_those_of_the_papers_code() -> None:
    from rsm_guidance.rewards import image_reward

    assert tuple(processor().image_mean) == OPENAI_MEAN and tuple(processor().image_std) == OPENAI_STD
    assert OPENAI_MEAN == (0.48145466, 0.4578275, 0.40821073)
    assert OPENAI_STD == (0.26862954, 0.26130258, 0.27577711)
    assert (image_reward.MEAN, image_reward.STD) == (0.16717362830052426, 1.0333394966054072)
    assert image_reward.TOKENS == 35


@pytest.fixture(scope="module", params=PUBLISHED)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A reward by name, from files in its real layout, and what it should say of images under PROMPTS."""
    torch.manual_seed(5)
    folder = tmp_path_factory.mktemp(request.param)
    return made(request.param, folder)


@pytest.mark.parametrize("size", [(64, 64), (40, 75), (97, 41)])
def test_scores_are_those_of_an_independent_calculation(case: Case, size: tuple[int, int]) -> None:
    reward, expected = case
    images = pictures(*size)
    with torch.no_grad():
        truth = expected(images).double()
        found = reward(tensor_of(images), PROMPTS)
    assert found.dtype == torch.float32 and truth.std() > 3e-3
    assert (found - truth).abs().max() < 2e-3 * truth.std(), (found, truth)
    low, high = reward.range
    assert ((found >= low) & (found <= high)).all()


def test_scores_do_not_depend_on_the_batch_and_carry_a_graph_only_where_asked(case: Case) -> None:
    import dataclasses

    reward, _ = case
    images = tensor_of(pictures(40, 40))
    whole = reward(images, PROMPTS)
    single = dataclasses.replace(reward, micro_batch=1, offload=True).load()
    assert torch.allclose(single(images, PROMPTS), whole, atol=1e-4)
    assert not whole.requires_grad and reward(images[:0], []).shape == (0,)
    video = torch.stack([images, images.flip(-1)], 1)
    frames = (reward(images, PROMPTS) + reward(images.flip(-1), PROMPTS)) / 2
    assert torch.allclose(reward(video, PROMPTS), frames, atol=1e-4)


def test_gradients_point_to_better_images(case: Case) -> None:
    reward, _ = case
    assert reward.differentiable
    images = tensor_of(pictures(64, 64)).mul(0.5).add(0.25).requires_grad_()
    scores = reward(images, PROMPTS)
    [slope] = torch.autograd.grad(scores.sum(), images)
    assert slope.isfinite().all() and (slope.flatten(1).norm(dim=1) > 0).all()
    step = slope / slope.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    assert (reward((images + 2 * step).detach().clamp(0, 1), PROMPTS) > scores).all()


def test_half_precision_is_close(case: Case) -> None:
    import dataclasses

    reward, _ = case
    images = tensor_of(pictures(40, 40))
    half = dataclasses.replace(reward, dtype="bfloat16").load()
    assert {p.dtype for p in half.network.parameters()} == {torch.bfloat16}
    scores, exact = half(images, PROMPTS), reward(images, PROMPTS)
    assert scores.dtype == torch.float32 and (scores - exact).abs().max() < 0.1 * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((PROMPTS, tensor_of(pictures(40, 40))), TypeError, "takes \\(images, prompts\\)"),
        ((tensor_of(pictures(40, 40)), PROMPTS[:2]), UsageError, "3 images and 2 prompts"),
        ((tensor_of(pictures(40, 40)), "star"), TypeError, "list of B texts"),
        ((tensor_of(pictures(40, 40)) * 255, PROMPTS), UsageError, "images in \\[0, 1\\]"),
        ((tensor_of(pictures(40, 40))[:, :2], PROMPTS), UsageError, "\\[B, 3, H, W\\]"),
    ],
)
def test_wrong_arguments_are_refused(case: Case, arguments: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        case[0](*arguments)


def test_an_image_that_is_no_number_has_no_score_and_spoils_no_other(case: Case) -> None:
    images = tensor_of(pictures(40, 40))
    whole = case[0](images, PROMPTS)
    images[1, 0, 3, 3] = torch.nan
    scores = case[0](images, PROMPTS)
    assert scores.isnan().tolist() == [False, True, False] and torch.allclose(scores[[0, 2]], whole[[0, 2]], atol=1e-5)


def test_long_prompts_are_cut_with_a_word_about_it(case: Case) -> None:
    reward, _ = case
    images = tensor_of(pictures(40, 40, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = reward(images, ["star " * 60])
    told = [str(w.message) for w in caught if "reads the first" in str(w.message)]
    assert scores.isfinite().all() and len(told) == int(reward.reads_prompt)


def test_checkpoints_are_read_strictly_and_nothing_in_them_is_run(tmp_path: Path) -> None:
    tensors = layouts.write_hpsv2(tmp_path)
    path = tmp_path / "HPS_v2.1_compressed.pt"

    def refused(data: Any, words: str, name: str = f"hpsv2:model={path}:tokenizer={tmp_path}") -> None:
        torch.save(data, path)
        with pytest.raises(UsageError, match=words):
            resolve_reward(name)

    refused({n: t for n, t in tensors.items() if n != "visual.proj"}, "visual.proj")
    refused({n: t for n, t in tensors.items() if n != "ln_final.bias"}, "lacks text_model.final_layer_norm.bias")
    refused(tensors | {"extra.weight": torch.zeros(2)}, "unknown extra.weight")
    refused(tensors | {"ln_final.bias": torch.zeros(2)}, "shape \\[2\\]")
    refused({"state_dict": tensors, "run": Path("x").touch}, "more than tensors")
    path.write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(UsageError, match="cannot read the checkpoint"):
        resolve_reward(f"hpsv2:model={path}:tokenizer={tmp_path}")
    with pytest.raises(UsageError, match="holds none of HPS_v2_compressed.pt"):
        resolve_reward(f"hpsv2:model={tmp_path}:version=v2.0")


def test_safetensors_and_wrapped_names_are_the_same_model(tmp_path: Path) -> None:
    tensors = layouts.write_image_reward(tmp_path)
    images = tensor_of(pictures(40, 40))
    expected = resolve_reward(f"image-reward:model={tmp_path}")(images, PROMPTS)
    save_file(tensors, tmp_path / "other.safetensors")
    torch.save({f"module.{n}": t for n, t in tensors.items()}, tmp_path / "wrapped.pt")
    for file in ("other.safetensors", "wrapped.pt"):
        assert torch.equal(resolve_reward(f"image-reward:model={tmp_path / file}")(images, PROMPTS), expected)


def test_a_clip_without_all_its_tensors_is_refused(tmp_path: Path) -> None:
    clip = layouts.hf_clip(tmp_path)
    state = {n: t for n, t in clip.state_dict().items() if n != "visual_projection.weight"}
    CLIPModel(clip.config).save_pretrained(tmp_path, state_dict=state | {"stray": torch.zeros(1)})
    with pytest.raises(UsageError, match="lacks visual_projection.weight and has unknown stray"):
        resolve_reward(f"clip-score:model={tmp_path}")


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("hpsv2:versio=2.0", "no option 'versio'"),
        ("hpsv2:version=3", "version=3"),
        ("pickscore:dtype=int8", "dtype='int8'"),
        ("pickscore:micro_batch=0", "at least 1"),
        ("pickscore:device=gpu", "no device"),
        ("clip-score:model=/nowhere/at/all", "cannot load '/nowhere/at/all'"),
        ("aesthetic:model=./nothing.pth", "no file or folder"),
        ("shapes-verifier:model=x", "takes no options"),
    ],
)
def test_bad_options_are_refused(spec: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        resolve_reward(spec)

"""OCR, compressibility and colours: by hand, on rendered text, and steering samples."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import DDIM
from rsm_guidance.oracles.mixture import GaussianMixture, GaussianMixtureDenoiser
from rsm_guidance.rewards import resolve_reward
from rsm_guidance.rewards.ocr import agreement, edit_distance, quoted
from rsm_guidance.samplers import BestOfN, RewardGradient, Task
from rsm_guidance.samplers.run import run
from tests.rewards.layouts import pictures, tensor_of


def written(text: str, side: int = 160, size: int = 28) -> Tensor:
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).text((10, side // 3), text, fill="black", font=ImageFont.load_default(size))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def ocr() -> Any:
    pytest.importorskip("rapidocr")
    return resolve_reward("ocr:threads=1")


def test_ocr_reads_rendered_text(ocr: Any) -> None:
    images = torch.cat([written("OPEN"), written("Hello you"), written(""), written("HELP")])
    wanted = ['a sign that says "open"', "the words “hello you”", 'a blank "page"', 'a card with "HELLO"']
    scores = ocr(images, wanted)
    assert scores[:3].tolist() == [1.0, 1.0, 0.0] and scores[3] == pytest.approx(0.6)


def test_ocr_takes_the_text_from_a_column() -> None:
    pytest.importorskip("rapidocr")
    reward = resolve_reward("ocr:column=target:threads=1")
    assert reward.requires == ("target",) and not reward.reads_prompt
    assert reward(written("OPEN"), ["a shop"], target=["Open"]).tolist() == [1.0]
    with pytest.raises(UsageError, match="'target' is None"):
        reward(written("OPEN"), ["a shop"], target=[None])


@pytest.mark.parametrize("prompt", ["a sign", 'a "', 'an empty "" sign', 'spaces "  " only', "it's 'single'"])
def test_ocr_refuses_prompts_without_a_text(prompt: str, guided: DiffusionPipeline) -> None:
    with pytest.raises(UsageError, match="needs a text to look for"):
        guided(prompt, num_inference_steps=3, sampler="best-of-n", reward="ocr:threads=1")


def test_edit_distances_and_agreement_are_as_by_hand() -> None:
    pairs = {("", "abc"): 3, ("kitten", "sitting"): 3, ("flaw", "lawn"): 2, ("same", "same"): 0, ("abc", ""): 3}
    assert {pair: edit_distance(*pair) for pair in pairs} == pairs
    assert agreement("xxopenyy", "open") == 1 and agreement("oqen", "open") == 0.75
    assert agreement("something else altogether", "no") == 0
    assert quoted('say "one" and "two"') == "one" and quoted("nothing") is None


def test_compressibility_is_the_size_of_the_file_that_pillow_writes() -> None:
    images = [*pictures(48, 32), Image.new("RGB", (32, 48), "red")]
    sizes = []
    for image in images[:3]:
        image.save(file := io.BytesIO(), "JPEG", quality=80)
        sizes.append(-len(file.getvalue()) / 1000)
    found = resolve_reward("compressibility:quality=80")(tensor_of(images[:3]), [""] * 3)
    assert found.tolist() == pytest.approx(sizes)
    flat = resolve_reward("compressibility")(torch.ones(1, 3, 48, 32), [""])
    assert flat > resolve_reward("compressibility")(tensor_of(images[:1]), [""])
    with pytest.raises(UsageError, match="quality must be 1 to 95"):
        resolve_reward("compressibility:quality=100")


def test_colours_are_as_by_hand(tmp_path: Path) -> None:
    images = torch.zeros(2, 3, 4, 4)
    images[1, 0] = 1
    assert resolve_reward("color")(images, ["", ""]).tolist() == pytest.approx([-1 / 3, 0])
    assert resolve_reward('color:color="#0000ff"')(images, ["", ""]).tolist() == pytest.approx([-1 / 3, -2 / 3])
    Image.new("RGB", (4, 4), "red").save(tmp_path / "red.png")
    same = resolve_reward(f"color-histogram:image={tmp_path / 'red.png'}")
    assert same(images, ["", ""]).tolist() == pytest.approx([2 / 3, 1])
    named = resolve_reward("color-histogram")
    paths = [str(tmp_path / "red.png")] * 2
    assert named(images, ["", ""], reference=paths).tolist() == pytest.approx([2 / 3, 1])
    with pytest.raises(UsageError, match="must hold image files"):
        named(images, ["", ""], reference=["nothing.png", None])
    with pytest.raises(UsageError, match="no colour"):
        resolve_reward("color:color=reddish")
    with pytest.raises(UsageError, match="bins must be"):
        resolve_reward("color-histogram:bins=1")


@pytest.mark.parametrize("spec", ["color:color=red", "color-histogram:image=IMAGE:bins=8"])
def test_differentiable_ones_guide_by_gradients(spec: str, guided: DiffusionPipeline, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    reward = spec.replace("IMAGE", str(tmp_path / "red.png"))
    call: dict[str, Any] = {"prompt": ["a star"] * 4, "seed": 0, "num_inference_steps": 6, "guidance_scale": 3.0}
    plain = guided(**call, sampler=RewardGradient(0.0), reward=reward)
    pushed = guided(**call, sampler=RewardGradient(1.0), reward=reward)
    assert sum(pushed.rewards) > sum(plain.rewards)


WORDS = ("STOP", "OPEN", "SALE", "TAXI")


class Lettering(GaussianMixtureDenoiser):
    """An exact generator of signs: its latents are pictures, spread a little around renderings of WORDS."""

    def decode(self, x0: Tensor, rows: Tensor | None = None) -> Tensor:
        return x0.unflatten(-1, (1, 40, 80)).expand(-1, 3, -1, -1).float().add(1).div(2).clamp(0, 1)


def test_ocr_steers_what_is_written(ocr: Any) -> None:
    signs = []
    for word in WORDS:
        sign = Image.new("L", (80, 40), "white")
        ImageDraw.Draw(sign).text((8, 4), word, fill="black", font=ImageFont.load_default(20))
        signs.append(torch.from_numpy(np.array(sign)).double().flatten() / 127.5 - 1)
    mixture = GaussianMixture(torch.zeros(len(WORDS)), torch.stack(signs), 0.01)
    prompts = ['a sign that says "taxi"']
    found = []
    for count in (1, 8):
        denoiser = Lettering(mixture, NoiseSchedule.flow(6), prompts)
        task = Task(denoiser, RandomStreams.for_prompts(1, prompts), reward=ocr)
        found.append(float(run(BestOfN(count, DDIM(1.0)), task).rewards[0]))
    assert found[0] < 0.5 and found[1] == 1.0

"""What `sample` writes, and the options of the model: videos, text of PNG files, LoRA, scheduler, sizes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor

from rsm_guidance.cli.main import main
from rsm_guidance.evaluation.media import parameters_text
from tests.zoo import ZOO

SMALL = ["--height", "32", "--width", "32", "--steps", "2", "--reward", f"{__name__}:redness"]
CALLS: list[int] = []


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    CALLS.append(len(images))
    return (images[..., 0, :, :] - images[..., 2, :, :]).flatten(1).mean(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name in ("sd15", "sd3", "wan"):
        ZOO[name].build().save_pretrained(folder / name)
    return folder


def sample(model: Path, out: Path, *options: str) -> Image.Image:
    main(["sample", "a cat", "--model", str(model), "--out", str(out), *SMALL, *options])
    return Image.open(out)


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    CALLS.clear()
    with pytest.raises(SystemExit) as end:
        main([*words])
    assert end.value.code == 2 and not CALLS, "before the run"
    error = capsys.readouterr().err.strip()
    assert error.count("\n") == 0
    return error


@pytest.mark.parametrize("sampler", ["none", "stepwise:candidates=2"])
def test_video_models_write_animations_or_are_refused_before_the_run(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sampler: str
) -> None:
    moving = sample(folders / "wan", tmp_path / "o.gif", "--frames", "5", "--sampler", sampler)
    assert moving.n_frames == 5 and moving.size == (32, 32)  # type: ignore[attr-defined]
    words = ["sample", "a cat", "--model", str(folders / "wan"), "--out", str(tmp_path / "o.png"), *SMALL]
    assert "name a file that ends in .mp4, .gif, .webp" in refused(capsys, *words)
    assert not (tmp_path / "o.png").exists()


def test_png_files_say_what_made_them(folders: Path, tmp_path: Path) -> None:
    options = ["--negative-prompt", "a dog, red", "--guidance-scale", "4", "--seed", "7", "--sampler", "best-of-n"]
    first = sample(folders / "sd15", tmp_path / "a.png", *options, "--scheduler", "EulerDiscreteScheduler")
    lines = first.text["parameters"].split("\n")  # type: ignore[attr-defined]
    assert lines[:2] == ["a cat", "Negative prompt: a dog, red"]
    for part in (
        "Steps: 2",
        "Sampler: best-of-n",
        "CFG scale: 4.0",
        "Seed: 7",
        "Size: 32x32",
        "EulerDiscreteScheduler",
    ):
        assert part in lines[2]
    made = json.loads(first.text["rsm-guidance"])  # type: ignore[attr-defined]
    assert made["model"]["reward"] == f"{__name__}:redness" and made["sampler"]["candidates"] == 4
    kept = made["model"]
    again = [
        "--negative-prompt",
        kept["negative_prompt"],
        "--guidance-scale",
        str(kept["guidance_scale"]),
        "--seed",
        "7",
    ]
    again += ["--scheduler", kept["scheduler"], "--sampler", "best-of-n:candidates=4"]
    assert np.array_equal(np.asarray(sample(folders / "sd15", tmp_path / "b.png", *again)), np.asarray(first))
    assert not np.array_equal(
        np.asarray(sample(folders / "sd15", tmp_path / "c.png", "--seed", "7")), np.asarray(first)
    )


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1), st.text())
def test_settings_of_any_text_stay_on_lines_of_their_own(prompt: str, model: str) -> None:
    text = parameters_text({"Prompt": prompt, "Steps": 3, "Model": model, "Seed": None})
    assert text.startswith(prompt + "\nSteps: 3, Model: ") and "Seed" not in text[len(prompt) :].split("Model")[0]
    assert "\n" not in text[len(prompt) + 1 :]


def lora(folder: Path, name: str) -> Path:
    pipe = ZOO[name].build()
    denoiser = pipe.unet if name == "sd15" else pipe.transformer
    denoiser.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    state = get_peft_model_state_dict(denoiser)
    drawn = torch.Generator().manual_seed(1)
    state = {k: torch.randn(v.shape, generator=drawn) for k, v in state.items()}
    part = "unet" if name == "sd15" else "transformer"
    type(pipe).save_lora_weights(folder, **{f"{part}_lora_layers": state})
    return folder / "pytorch_lora_weights.safetensors"


def test_loras_act_at_their_scale_and_those_of_other_models_are_refused(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, foreign = lora(tmp_path / "own", "sd15"), lora(tmp_path / "foreign", "sd3")
    images = {
        scale: np.asarray(sample(folders / "sd15", tmp_path / "o.png", *scale.split()))
        for scale in ("", f"--lora {own}:0", f"--lora {own}", f"--lora {own.parent}:0.5 {own}:0.5")
    }
    plain, zero, whole, halves = images.values()
    assert np.array_equal(plain, zero) and not np.array_equal(plain, whole)
    assert abs(halves.astype(int) - whole).max() <= 1
    words = ["sample", "a cat", "--model", str(folders / "sd15"), "--out", str(tmp_path / "p.png"), *SMALL]
    (tmp_path / "old.ckpt").write_bytes(b"x")
    (tmp_path / "broken.safetensors").write_bytes(b"x" * 100)
    for path, reason in (
        (foreign, "LoRA"),
        (tmp_path / "none.safetensors", "there is no LoRA"),
        (tmp_path / "old.ckpt", "can run code"),
        (tmp_path / "broken.safetensors", "cannot load the LoRA"),
        (f"{own}:inf", "finite"),
    ):
        assert reason in refused(capsys, *words, "--lora", str(path))
    assert not (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["--scheduler", "FlowMatchEulerDiscreteScheduler"],
            "does not suit StableDiffusionPipeline; choose one of DDIM",
        ),
        (["--device", "tpu"], "cannot use the device 'tpu'"),
        (["--offload", "model"], "there is none; leave it out"),
        (["--height", "0"], "--height must be at least 1"),
        (["--width", "10000000000"], "--width must be at least 1 and at most"),
        (["--frames", "3"], "takes no num_frames; leave --frames out"),
        (["--guidance-scale", "inf"], "finite"),
        (["--steps", "1000000000"], "--steps must be at least 1 and at most"),
        (["--out", "x.mp3"], "no image format"),
    ],
)
def test_options_that_do_not_suit_are_refused_before_the_run(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    words = ["sample", "a cat", "--model", str(folders / "sd15"), "--out", str(tmp_path / "p.png"), *SMALL, *options]
    assert reason in refused(capsys, *words) and not list(tmp_path.iterdir())

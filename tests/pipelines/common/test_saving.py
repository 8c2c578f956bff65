"""Signature, components, outputs; saving, loading, and sharing modules."""

import inspect
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import rsm_guidance as rg
from tests.pipelines.common.helpers import (
    CLASSES,
    FEW,
    KINDS,
    NAMES,
    SAVED,
    build,
    close,
    guided_of,
    modules_of,
    redness,
    run,
    under_guidance,
    unguided,
)
from tests.zoo import ZOO

# --- signature, components, outputs ---


@pytest.mark.parametrize("name", NAMES)
def test_pipeline_call_signature(name: str) -> None:
    stock = type(ZOO[name].build())
    ours = inspect.signature(rg.reward_guided(stock).__call__).parameters
    for parameter in inspect.signature(stock.__call__).parameters.values():
        assert parameter.kind is parameter.VAR_KEYWORD or ours[parameter.name] == parameter
    for added in ("sampler", "reward", "value", "budget", "seed", "on_step"):
        assert ours[added].default is None and ours[added].kind is inspect.Parameter.KEYWORD_ONLY
    optional = {n for n, p in ours.items() if p.default is not p.empty}
    assert {"num_inference_steps", "generator", "output_type", "return_dict"} <= optional


@pytest.mark.parametrize("name", NAMES)
def test_components_function(name: str) -> None:
    stock = ZOO[name].build()
    ours = guided_of(stock)
    assert ours.components.keys() == stock.components.keys()
    assert all(ours.components[k] is v for k, v in stock.components.items())
    again = type(ours)(**ours.components)
    assert all(again.components[k] is v for k, v in stock.components.items())
    assert ours.config.keys() - stock.config.keys() == set()


@pytest.mark.parametrize("name", KINDS)
def test_dict_tuple_outputs_equivalent(name: str) -> None:
    pipe = build(name)
    call = ZOO[name].call() | {"output_type": "np", "seed": 0}
    for guidance in ({}, {"sampler": rg.BestOfN(2), "reward": redness}):
        by_name = pipe(**call, **guidance)
        plain = pipe(**call, **guidance, return_dict=False)
        assert isinstance(plain, tuple)  # in Stable Diffusion 1.5 with a second entry
        assert same(np.asarray(by_name[0]), np.asarray(plain[0]))
        if guidance:
            assert by_name.images is by_name["images"] is by_name[0]
            assert by_name.to_tuple()[0] is by_name.images


@pytest.mark.parametrize("name", FEW)
def test_pt_np_pil_outputs_equivalent(name: str) -> None:
    pipe = build(name)
    for guidance in ({}, {"sampler": "none"}):
        np_, pt, pil = (run(pipe, name, output_type=t, **guidance) for t in ("np", "pt", "pil"))
        assert close(torch.as_tensor(pt).movedim(-3, -1), np_, 1e-5)
        frames = pil if isinstance(pil[0], Image.Image) else pil[0]  # a video is a list of frames
        assert close(np.stack(frames), (np.asarray(np_) * 255).round().reshape(len(frames), *np_.shape[-3:]), 1.5)


# --- saving and loading ---


def reload(cls: type[DiffusionPipeline], folder: Path, **how: Any) -> DiffusionPipeline:
    pipe = cls.from_pretrained(folder, **how)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def same(images: Any, reference: Any) -> bool:
    """Equal up to the last bits: loaded weights lie elsewhere in memory, for which some CPUs choose other kernels."""
    return bool(np.shape(images) == np.shape(reference) and np.abs(np.subtract(images, reference)).max() < 1e-5)


@pytest.mark.parametrize("name", [n for n in CLASSES if n in SAVED])
def test_save_load_local(name: str, tmp_path: Path) -> None:
    stock, ours = ZOO[name].build(), build(name)
    reference = run(stock, name)
    ours.save_pretrained(tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["_class_name"] == type(stock).__name__, "anyone can load the folder"
    assert same(run(reload(DiffusionPipeline, tmp_path / "ours"), name), reference)
    stock.save_pretrained(tmp_path / "stock")
    loaded = reload(rg.RewardGuidedPipeline, tmp_path / "stock")
    assert type(loaded) is type(ours)
    assert same(unguided(loaded, name), reference)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "chroma"])
def test_save_load_optional_components(name: str, tmp_path: Path) -> None:
    pipe = build(name)
    kept = {"tokenizer", "tokenizer_2", "text_encoder", "text_encoder_2"}  # optional in SDXL, needed for a prompt
    dropped = [part for part in pipe._optional_components if part not in kept]
    assert dropped
    none = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3" else {}  # left out where it is loaded, too
    dropped += none
    for part in dropped:
        setattr(pipe, part, None)
    reference = unguided(pipe, name)
    pipe.save_pretrained(tmp_path)
    for cls in (type(pipe), DiffusionPipeline):
        loaded = reload(cls, tmp_path, **none)
        assert all(getattr(loaded, part) is None for part in dropped)
        assert same(run(loaded, name), reference)
    assert same(unguided(reload(type(pipe), tmp_path, **none), name), reference)


@pytest.mark.parametrize("name", FEW)
def test_serialization_with_variants(name: str, tmp_path: Path) -> None:
    pipe = build(name)
    pipe.save_pretrained(tmp_path / "half", variant="fp16")
    for part in modules_of(pipe):
        assert any(".fp16." in p.name for p in (tmp_path / "half" / part).iterdir()), part
    loaded = reload(type(pipe), tmp_path / "half", variant="fp16")
    for part, module in modules_of(pipe).items():
        weights = dict(getattr(loaded, part).named_parameters())
        assert all(torch.equal(weights[k], v) for k, v in module.named_parameters() if k in weights)
    assert same(unguided(loaded, name), run(pipe, name))
    pipe.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="variant=fp16"):
        rg.RewardGuidedPipeline.from_pretrained(tmp_path / "plain", variant="fp16")


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_save_load_float16(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    pipe = build(name)
    full = run(pipe, name)
    pipe.save_pretrained(tmp_path)
    half, stock = (reload(cls, tmp_path, dtype=dtype) for cls in (type(pipe), DiffusionPipeline))
    dtypes = {part: module.dtype for part, module in modules_of(half).items()}
    assert set(dtypes.values()) == {dtype} and dtypes == {k: m.dtype for k, m in modules_of(stock).items()}
    samples = unguided(half, name)
    assert same(samples, run(stock, name))
    cosine = np.vdot(samples, full) / np.linalg.norm(samples) / np.linalg.norm(full)
    assert cosine > 0.95
    half.save_pretrained(tmp_path / "half")
    assert same(run(reload(DiffusionPipeline, tmp_path / "half", dtype=dtype), name), samples)


@pytest.mark.parametrize("name", KINDS)
def test_to_dtype_and_device(name: str) -> None:
    pipe = build(name)
    assert {module.dtype for module in modules_of(pipe).values()} == {torch.float32}
    reference = run(pipe, name)
    assert pipe.to("cpu") is pipe and pipe.to(torch.device("cpu")).device.type == "cpu"
    assert same(unguided(pipe, name), reference)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert pipe.to(dtype=dtype) is pipe and pipe.dtype == dtype
        assert {module.dtype for module in modules_of(pipe).values()} == {dtype}


@pytest.mark.parametrize("name", FEW)
def test_torch_dtype_dict(name: str, tmp_path: Path) -> None:
    pipe = build(name)
    pipe.save_pretrained(tmp_path)
    part = "text_encoder"
    loaded = reload(rg.RewardGuidedPipeline, tmp_path, dtype={part: torch.bfloat16, "default": torch.float16})
    assert type(loaded) is type(pipe)
    for key, module in modules_of(loaded).items():
        assert module.dtype == (torch.bfloat16 if key == part else torch.float16), key


def test_no_dduf_files(tmp_path: Path) -> None:
    pipe = build("sd15")
    with pytest.raises(ValueError, match="DDUF files is no longer supported"):
        type(pipe).from_pretrained(tmp_path, dduf_file="sd15.dduf")


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_pipeline_with_accelerator_device_map(name: str, tmp_path: Path) -> None:
    pipe = build(name)
    pipe.save_pretrained(tmp_path)
    mapped = reload(rg.RewardGuidedPipeline, tmp_path, device_map="cpu")
    assert same(unguided(mapped, name), run(pipe, name))


def test_a_custom_pipeline_without_trust_says_what_to_pass() -> None:
    with pytest.raises(ValueError, match=r"custom code.*\n?.*Pass `trust_remote_code=True`"):
        DiffusionPipeline.from_pretrained(
            rg.shapes.model_path(), custom_pipeline=rg.custom_pipeline("stable_diffusion_3")
        )


# --- sharing modules ---


def public(pipe: DiffusionPipeline) -> dict[str, Any]:
    return {k: v for k, v in pipe.config.items() if not k.startswith("_")}


@pytest.mark.parametrize("name", CLASSES)
def test_from_pipe_consistent_config_and_forward_pass(name: str) -> None:
    stock = ZOO[name].build()
    reference = run(stock, name)
    ours = guided_of(stock)
    back = type(stock).from_pipe(ours, dtype=ours.dtype)
    back.set_progress_bar_config(disable=True)
    assert type(back) is type(stock) and public(back) == public(ours) == public(stock)
    assert same(unguided(ours, name), reference)
    under_guidance(ours, name)
    assert same(run(back, name), reference)
    assert same(run(stock, name), reference), "the pipeline that was shared is as before"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("sd15", "sd15_img2img"),
        ("sd15", "sd15_inpaint"),
        ("sd15", "sd15_controlnet"),
        ("sdxl", "sdxl_img2img"),
        ("sdxl", "sdxl_inpaint"),
        ("sd3", "sd3_img2img"),
        ("sd3", "sd3_inpaint"),
        ("flux", "flux_kontext"),
    ],
)
def test_from_pipe_between_tasks(first: str, second: str) -> None:
    """As with stock classes, one checkpoint serves several tasks; guided from stock, and guided from guided."""
    source, target = ZOO[first].build(), ZOO[second].build()
    extra = {k: v for k, v in target.components.items() if k not in source.components}
    reference = run(type(target).from_pipe(source, **extra), second)
    for given in (source, guided_of(source)):
        pipe = rg.reward_guided(type(target)).from_pipe(given, **extra)
        pipe.set_progress_bar_config(disable=True)
        assert same(unguided(pipe, second), reference)
        back = type(source).from_pipe(pipe)
        assert public(back) == public(source)
        assert same(run(back, first), run(source, first))

"""What can be switched on, offloading and precision."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import diffusers as df
import numpy as np
import pytest
import torch
from accelerate.hooks import CpuOffload
from diffusers import DiffusionPipeline
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from diffusers.schedulers import KarrasDiffusionSchedulers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from rsm_guidance.engine import PipelineDenoiser
from tests.pipelines.common.helpers import (
    KINDS,
    batch,
    build,
    close,
    denoiser_of,
    guided_of,
    modules_of,
    run,
    thrice,
    under_guidance,
    unguided,
)
from tests.zoo import ZOO

# --- what can be switched on ---


@pytest.mark.parametrize("name", ["sd15", "sd15_controlnet", "sdxl", "sdxl_inpaint"])
def test_attention_slicing_forward_pass(name: str) -> None:
    pipe = build(name)
    reference = unguided(pipe, name)
    for size in (1, 2):
        pipe.enable_attention_slicing(size)
        assert close(unguided(pipe, name), reference, 1e-3)
    under_guidance(pipe, name)
    pipe.disable_attention_slicing()


@pytest.mark.parametrize("name", KINDS)
def test_vae_slicing_and_tiling(name: str) -> None:
    pipe = build(name)
    if not hasattr(pipe.vae, "enable_slicing"):
        pytest.skip("its autoencoder knows neither")
    if issubclass(type(pipe), df.pipelines.pipeline_utils.StableDiffusionMixin):
        assert isinstance(pipe.vae, df.AutoencoderKL) and isinstance(pipe.unet, df.UNet2DConditionModel)
    pair = ["a cat", "a red dog"]
    reference = unguided(pipe, name, **batch(name, pair))
    pipe.vae.enable_slicing()
    assert close(unguided(pipe, name, **batch(name, pair)), reference, 1e-2)
    pipe.vae.enable_tiling()
    tiled = unguided(pipe, name, **batch(name, pair))
    assert name == "lumina2" or close(tiled, reference, 0.5)  # its tiles are much smaller than those of trained ones
    under_guidance(pipe, name)


@pytest.mark.parametrize("name", ["sd15", "sd15_inpaint", "sdxl", "sdxl_img2img"])
def test_freeu(name: str) -> None:
    pipe = build(name)
    plain = unguided(pipe, name)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    changed = thrice(name, lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4))
    assert np.array_equal(unguided(pipe, name), changed)
    under_guidance(pipe, name)
    pipe.disable_freeu()
    assert np.array_equal(unguided(pipe, name), plain)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_fused_qkv_projections(name: str) -> None:
    pipe = build(name)
    plain = unguided(pipe, name)
    switch = pipe if hasattr(pipe, "fuse_qkv_projections") else pipe.transformer
    assert not any(getattr(m, "fused_projections", False) for m in denoiser_of(pipe).modules())
    switch.fuse_qkv_projections()
    assert any(getattr(m, "fused_projections", False) for m in denoiser_of(pipe).modules())
    assert close(unguided(pipe, name), plain, 1e-2)
    under_guidance(pipe, name)
    switch.unfuse_qkv_projections()
    assert close(unguided(pipe, name), plain, 1e-2)


@pytest.mark.parametrize("scheduler", [s.name for s in KarrasDiffusionSchedulers if "SDE" not in s.name])
def test_karras_schedulers(scheduler: str) -> None:
    def change(pipe: DiffusionPipeline) -> None:
        config = dict(pipe.scheduler.config) | {"skip_prk_steps": True}
        pipe.scheduler = getattr(df, scheduler).from_config(config)

    steps = 5 if "KDPM2" in scheduler else 4
    assert thrice("sd15", change, num_inference_steps=steps).shape == (1, 32, 32, 3)


def test_ip_adapter() -> None:
    name = "sd15_ip_adapter"
    weak, strong = (thrice(name, lambda pipe, s=s: pipe.set_ip_adapter_scale(s)) for s in (0.0, 42.0))
    bare = thrice(name, lambda pipe: pipe.unload_ip_adapter(), ip_adapter_image=None)
    assert close(weak, bare, 1e-4) and not close(strong, bare, 1e-2)
    pipe = build(name)
    off, on = (unguided(pipe, name, guidance_scale=scale) for scale in (1.0, 7.5))
    assert off.shape == on.shape and not np.array_equal(off, on)
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., :16] = 1
    masked = unguided(pipe, name, cross_attention_kwargs={"ip_adapter_masks": [mask]})
    assert not np.array_equal(masked, unguided(pipe, name))
    under_guidance(pipe, name, cross_attention_kwargs={"ip_adapter_masks": [mask]})


CACHES: dict[str, Callable[[DiffusionPipeline], Any]] = {
    "first-block": lambda pipe: df.FirstBlockCacheConfig(threshold=0.8),
    "pyramid": lambda pipe: df.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(100, 950),
        spatial_attention_block_identifiers=["transformer_blocks", "blocks"],
        current_timestep_callback=lambda: pipe.current_timestep,
    ),
    "mag": lambda pipe: MagCacheConfig(
        threshold=0.06, max_skip_steps=3, retention_ratio=0.2, num_inference_steps=4, mag_ratios=torch.ones(4)
    ),
    "taylorseer": lambda pipe: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1, max_order=1),
}


@pytest.mark.parametrize(
    ("name", "cache"),
    [
        *(("flux", cache) for cache in CACHES),
        ("qwenimage", "first-block"),
        ("qwenimage", "mag"),
        ("qwenimage", "taylorseer"),
        ("wan", "first-block"),
        ("wan", "mag"),
        ("flux2_klein", "pyramid"),
        ("flux2_klein", "taylorseer"),
    ],
)
def test_caches_of_the_denoiser(name: str, cache: str) -> None:
    pipe = build(name)
    plain = run(pipe, name)
    pipe.transformer.enable_cache(CACHES[cache](pipe))
    cached = unguided(pipe, name)
    assert not np.array_equal(cached, plain), "the cache must do something for this test to mean anything"
    stock = ZOO[name].build()
    stock.transformer.enable_cache(CACHES[cache](stock))
    assert np.array_equal(run(stock, name), cached)
    under_guidance(pipe, name)
    assert np.array_equal(unguided(pipe, name), cached), "a run leaves nothing in the cache"
    pipe.transformer.disable_cache()
    assert np.array_equal(unguided(pipe, name), plain)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan"])
def test_lora(name: str, tmp_path: Path) -> None:
    pipe = build(name)
    part = "unet" if name == "sd15" else "transformer"
    plain = unguided(pipe, name)
    torch.manual_seed(0)
    for adapter in ("one", "two"):
        config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "to_k"], init_lora_weights=False)
        denoiser_of(pipe).add_adapter(config, adapter_name=adapter)
    outputs = []
    for chosen, weights in ((["one"], None), (["two"], None), (["one", "two"], None), (["one", "two"], [0.5, 0.6])):
        pipe.set_adapters(chosen, weights)
        outputs.append(unguided(pipe, name))
    assert all(not np.array_equal(a, b) for i, a in enumerate(outputs) for b in (*outputs[:i], plain))
    assert pipe.get_list_adapters() == {part: ["one", "two"]}
    pipe.set_adapters("one")
    under_guidance(pipe, name)
    layers = {f"{part}_lora_layers": get_peft_model_state_dict(denoiser_of(pipe), adapter_name="one")}
    type(pipe).save_lora_weights(save_directory=tmp_path, **layers)
    pipe.fuse_lora(components=[part], adapter_names=["one"])
    assert close(unguided(pipe, name), outputs[0], 1e-3)
    pipe.unfuse_lora(components=[part])
    assert close(unguided(pipe, name), outputs[0], 1e-3)
    pipe.delete_adapters("two")
    pipe.disable_lora()
    assert close(unguided(pipe, name), plain, 1e-4)
    fresh = build(name)
    fresh.load_lora_weights(tmp_path)
    assert close(unguided(fresh, name), outputs[0], 1e-3)
    fresh.unload_lora_weights()
    assert close(unguided(fresh, name), plain, 1e-4)


# --- offloading and precision, with the CPU as the device ---


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan"])
def test_model_cpu_offload_forward_pass_twice(name: str) -> None:
    pipe = build(name)
    reference = run(pipe, name)
    for _ in range(2):
        pipe.enable_model_cpu_offload(device="cpu")
        assert np.array_equal(unguided(pipe, name), reference)
        under_guidance(pipe, name)
        moved = {k: m for k, m in modules_of(pipe).items() if k not in pipe._exclude_from_cpu_offload}
        assert all(isinstance(m._hf_hook, CpuOffload) for m in moved.values())
    stock = ZOO[name].build()
    shared = guided_of(stock)
    shared.enable_model_cpu_offload(device="cpu")
    assert np.array_equal(unguided(shared, name), reference)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "sana", "qwenimage"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading_inference(name: str, level: str) -> None:
    pipe = build(name)
    reference = run(pipe, name)
    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    cpu = torch.device("cpu")
    denoiser_of(pipe).enable_group_offload(cpu, offload_type=level, **blocks)
    assert np.array_equal(unguided(pipe, name), reference)
    under_guidance(pipe, name)
    whole = build(name)
    whole.enable_group_offload(cpu, offload_type=level, exclude_modules=["vae"], **blocks)
    assert np.array_equal(unguided(whole, name), reference)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "wan"])
def test_layerwise_casting_inference(name: str) -> None:
    def change(pipe: DiffusionPipeline) -> None:
        kinds = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
        denoiser_of(pipe).enable_layerwise_casting(**kinds)

    cast = thrice(name, change)
    assert not np.array_equal(cast, run(ZOO[name].build(), name)), "eight bits must show"
    pipe = build(name)
    change(pipe)
    under_guidance(pipe, name)
    call = ZOO[name].call() | {"generator": torch.Generator().manual_seed(0)}
    with closing(PipelineDenoiser(pipe, call)) as denoiser:
        x = denoiser.initial().detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(denoiser.predict(x, 0).x0.square().sum(), x)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
    rounded = build(name)
    state = {key: weight.float() for key, weight in denoiser_of(pipe).state_dict().items()}
    denoiser_of(rounded).load_state_dict(state)
    call["generator"] = torch.Generator().manual_seed(0)
    with closing(PipelineDenoiser(rounded, call)) as denoiser:
        denoiser.initial()
        (plain,) = torch.autograd.grad(denoiser.predict(x, 0).x0.square().sum(), x)
    assert torch.allclose(gradient, plain, rtol=1e-3, atol=1e-3 * float(plain.abs().max()))


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_gradients_through_a_compiled_denoiser(name: str) -> None:
    pipe = build(name)
    gradients = []
    for compiled in (False, True):
        if compiled:
            part = "unet" if name == "sd15" else "transformer"
            setattr(pipe, part, torch.compile(getattr(pipe, part), backend="aot_eager"))
        call = ZOO[name].call() | {"generator": torch.Generator().manual_seed(0)}
        with closing(PipelineDenoiser(pipe, call)) as denoiser:
            x = denoiser.initial().detach().clone().requires_grad_()
            for level in (0, 2):
                (gradient,) = torch.autograd.grad(denoiser.predict(x, level).x0.square().sum(), x)
                gradients.append(gradient)
    torch._dynamo.reset()
    for plain, compiled_one in zip(gradients[:2], gradients[2:], strict=True):
        assert plain.abs().max() > 0
        assert torch.allclose(compiled_one, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))

"""diffusers' common pipeline tests, restated for reward-guided classes on the tiny pipelines of `tests/zoo.py`.

Upstream these are mixins (tests/pipelines/test_pipelines_common.py and, since 0.40, tests/pipelines/testing_utils/) that
are in no package.  Here each is proven anew, and three ways at once: the stock class, our class without a sampler, and
our class with the sampler `none` give the same bits (`thrice`).  What stands behind each upstream test:

PipelineTesterMixin
  test_save_load_local                              restated; in both directions between our class and the stock one
  test_pipeline_call_signature                      restated, with our arguments
  test_inference_batch_consistent                   restated
  test_inference_batch_single_identical             restated; by seed in test_conformity.py
  test_dict_tuple_outputs_equivalent                restated
  test_components_function                          restated
  test_float16_inference                            restated on the CPU; in bfloat16 in test_behaviour.py
  test_save_load_float16                            restated on the CPU
  test_save_load_optional_components                restated
  test_to_device                                    to the CPU only; to another device it needs an accelerator
  test_to_dtype                                     restated
  test_attention_slicing_forward_pass               restated where the denoiser can slice
  test_xformers_attention_forwardGenerator_pass     not applicable: xformers needs a GPU
  test_num_images_per_prompt                        restated
  test_cfg                                          restated
  test_callback_inputs                              restated
  test_callback_cfg                                 restated
  test_serialization_with_variants                  restated
  test_loading_with_variants                        restated, in the same test
  test_loading_with_incorrect_variants_raises_error restated, in the same test
  test_encode_prompt_works_in_isolation             restated without a sampler; with one, embeddings are refused
  test_StableDiffusionMixin_component               restated with slicing and tiling
  test_torch_dtype_dict                             restated
  test_save_load_dduf                               restated as a refusal: diffusers 0.42 no longer reads these files
PipelineOffloadTesterMixin, GroupOffloadTesterMixin, LayerwiseCastingTesterMixin
  test_sequential_cpu_offload_forward_pass, test_sequential_offload_forward_pass_twice
                                                    need an accelerator: the stock call fails with the CPU as the device
  test_model_cpu_offload_forward_pass, test_cpu_offload_forward_pass_twice,
  test_group_offloading_inference, test_pipeline_level_group_offloading_inference,
  test_pipeline_level_group_offloading_sanity_checks
                                                    restated with the CPU as the device: hooks run, nothing moves
  test_pipeline_with_accelerator_device_map         restated with the map "cpu"
  test_layerwise_casting_inference                  restated
PipelineLatentTesterMixin
  test_pt_np_pil_outputs_equivalent                 restated
  test_pt_np_pil_inputs_equivalent                  restated
  test_latents_input                                restated, for input images and for `latents`
  test_multi_vae                                    restated, without the consistency decoder, which is a pipeline itself
PipelineFromPipeTesterMixin
  test_from_pipe_consistent_config                  restated, in both directions and between tasks
  test_from_pipe_consistent_forward_pass            restated, in both directions and between tasks
  test_from_pipe_consistent_forward_pass_cpu_offload  restated with the CPU as the device
SDFunctionTesterMixin
  test_vae_slicing, test_vae_tiling                 restated
  test_freeu                                        restated
  test_fused_qkv_projections                        restated
PipelineKarrasSchedulerTesterMixin
  test_karras_schedulers_shape                      restated bit for bit; with our transitions in test_behaviour.py;
                                                    DPMSolverSDEScheduler needs torchsde
IPAdapterTesterMixin, FluxIPAdapterTesterMixin
  test_pipeline_signature                           by test_pipeline_call_signature: ours is stock's and more
  test_ip_adapter, test_ip_adapter_cfg, test_ip_adapter_masks  restated for Stable Diffusion, whose zoo has an adapter
  test_ip_adapter_faceid, and those of Flux         not restated: other adapter weights through the same stock code
PyramidAttentionBroadcastTesterMixin, FasterCacheTesterMixin, FirstBlockCacheTesterMixin, TaylorSeerCacheTesterMixin,
MagCacheTesterMixin
  test_pyramid_attention_broadcast_inference, test_first_block_cache_inference, test_taylorseer_cache_inference,
  test_mag_cache_inference                          restated
  test_pyramid_attention_broadcast_layers, test_faster_cache_state, test_faster_cache_basic_warning_or_errors_raised
                                                    not applicable: they look into hooks of diffusers' models
  test_faster_cache_inference                       not restated: it fails in the stock call on models this small
LoraTesterMixin, UNetLoraTesterMixin, LoraMemoryTesterMixin
  test_simple_inference_with_text_denoiser_lora_save_load, test_lora_fuse_unfuse, test_lora_scale_kwargs_match_fusion,
  test_simple_inference_with_text_denoiser_multi_adapter, ..._multi_adapter_weighted, ..._multi_adapter_delete_adapter,
  test_simple_inference_with_text_denoiser_lora_unloaded, test_get_list_adapters
                                                    restated, in one test
  test_simple_inference_with_text_denoiser_lora_and_scale  test_lora_and_its_scale in test_behaviour.py
  the others                                        not applicable: metadata, messages and key formats of LoRA files,
                                                    text encoders under LoRA, which are encoded by stock code, and
                                                    group offloading of LoRA, which needs an accelerator
PipelinePushToHubTester
  test_push_to_hub, test_push_to_hub_in_organization, test_push_to_hub_library_name
                                                    need the network; our save_pretrained refuses push_to_hub, restated
testing_utils/quantization.py                       not applicable: bitsandbytes, torchao, modelopt, and an accelerator
"""

import inspect
import json
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
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback, SD3CFGCutoffCallback, SDCFGCutoffCallback
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from diffusers.schedulers import KarrasDiffusionSchedulers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor, nn

import rsm_guidance as rg
from rsm_guidance.core.transitions import Transition
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.engine.schedulers import refusal
from tests.zoo import ZOO

NAMES = list(ZOO)
CLASSES = [n for n in NAMES if n not in ("sd15_inpaint9", "sd15_ip_adapter", "sd15_lcm", "sdxl_turbo", "flux_schnell")]
SAVED = [n for n in NAMES if n != "qwenimage_edit"]  # whose stand-in for a processor cannot be saved
CALLED_BACK = [n for n in NAMES if not n.startswith("pixart")]  # which knows the older `callback` only
IMAGES = [n for n in SAVED if n in CLASSES and "image" in ZOO[n].call()]
KINDS = [
    "sd15",
    "sd15_inpaint",
    "sdxl",
    "sd3",
    "sd3_img2img",
    "flux",
    "flux2_klein",
    "sana",
    "qwenimage",
    "zimage",
    "wan",
]
FEW = ["sd15", "sdxl", "sd3", "flux", "sana", "qwenimage", "wan"]

ODE = rg.Unguided(Transition("ode"))
JUMPING = rg.StepwiseSampling(candidates=2, transition=Transition("ddim", 1.0))  # restarts the call at every level


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    """A toy reward: mean red minus mean blue."""
    return (images[..., 0, :, :] - images[..., 2, :, :]).flatten(1).mean(1)


def guided_of(stock: DiffusionPipeline) -> DiffusionPipeline:
    """Our class around the modules of a stock pipeline."""
    pipe = rg.RewardGuidedPipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build(name: str) -> DiffusionPipeline:
    return guided_of(ZOO[name].build())


def run(pipe: DiffusionPipeline, name: str, seed: int = 0, **extra: Any) -> Any:
    """The samples of one small call, as an array unless another output type is asked for."""
    call = ZOO[name].call() | {"generator": torch.Generator().manual_seed(seed), "output_type": "np"} | extra
    call = {k: [*v] if isinstance(v, list) else v for k, v in call.items()}  # some stock calls change their lists
    if isinstance(call["generator"], list):
        call["generator"] = [g.clone_state() for g in call["generator"]]
    with torch.no_grad():
        return pipe(**call)[0]


def unguided(pipe: DiffusionPipeline, name: str, **extra: Any) -> Any:
    """What the call gives without a sampler, and with the sampler `none`, to the same bit."""
    plain, none = run(pipe, name, **extra), run(pipe, name, **extra, sampler="none")
    assert type(plain) is type(none)
    assert np.array_equal(np.asarray(plain), np.asarray(none)), "sampler='none' must be the stock call"
    assert np.isfinite(np.asarray(plain)).all()
    return plain


def thrice(name: str, change: Callable[[DiffusionPipeline], object] = lambda pipe: None, **extra: Any) -> Any:
    """What a pipeline gives after a change: the stock class, ours without a sampler, and ours with `none`, to the same bit."""
    stock, ours = ZOO[name].build(), build(name)
    change(stock)
    change(ours)
    reference = run(stock, name, **extra)
    assert np.array_equal(np.asarray(unguided(ours, name, **extra)), np.asarray(reference)), "our class must be stock"
    return reference


def under_guidance(pipe: DiffusionPipeline, name: str, **extra: Any) -> np.ndarray:
    """Finite samples of a sampler that jumps, where the scheduler lets it, else of best-of-n."""
    sampler = JUMPING if refusal(pipe.scheduler) is None else rg.BestOfN(2)
    samples = np.asarray(run(pipe, name, sampler=sampler, reward=redness, **extra))
    assert np.isfinite(samples).all()
    return samples


def batch(name: str, prompts: list[str]) -> dict[str, Any]:
    """Arguments for several prompts, with a generator and input images for each."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    base = ZOO[name].call()
    per_prompt = {k: [base[k]] * len(prompts) for k in ("negative_prompt", "image", "mask_image") if k in base}
    return {"prompt": prompts, "generator": generators, **per_prompt}


def modules_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def denoiser_of(pipe: DiffusionPipeline) -> Any:
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def close(a: Any, b: Any, atol: float) -> bool:
    return bool(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).max() < atol)


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
        assert np.array_equal(np.asarray(by_name[0]), np.asarray(plain[0]))
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


@pytest.mark.parametrize("name", [n for n in CLASSES if n in SAVED])
def test_save_load_local(name: str, tmp_path: Path) -> None:
    stock, ours = ZOO[name].build(), build(name)
    reference = run(stock, name)
    ours.save_pretrained(tmp_path / "ours")
    index = json.loads((tmp_path / "ours" / "model_index.json").read_text())
    assert index["_class_name"] == type(stock).__name__, "anyone can load the folder"
    assert np.array_equal(run(reload(DiffusionPipeline, tmp_path / "ours"), name), reference)
    stock.save_pretrained(tmp_path / "stock")
    loaded = reload(rg.RewardGuidedPipeline, tmp_path / "stock")
    assert type(loaded) is type(ours)
    assert np.array_equal(unguided(loaded, name), reference)


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
        assert np.array_equal(run(loaded, name), reference)
    assert np.array_equal(unguided(reload(type(pipe), tmp_path, **none), name), reference)


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
    assert np.array_equal(unguided(loaded, name), run(pipe, name))
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
    assert np.array_equal(samples, run(stock, name))
    cosine = np.vdot(samples, full) / np.linalg.norm(samples) / np.linalg.norm(full)
    assert cosine > 0.95
    half.save_pretrained(tmp_path / "half")
    assert np.array_equal(run(reload(DiffusionPipeline, tmp_path / "half", dtype=dtype), name), samples)


@pytest.mark.parametrize("name", KINDS)
def test_to_dtype_and_device(name: str) -> None:
    pipe = build(name)
    assert {module.dtype for module in modules_of(pipe).values()} == {torch.float32}
    reference = run(pipe, name)
    assert pipe.to("cpu") is pipe and pipe.to(torch.device("cpu")).device.type == "cpu"
    assert np.array_equal(unguided(pipe, name), reference)
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


def test_folders_only(tmp_path: Path) -> None:
    pipe = build("sd15")
    with pytest.raises(ValueError, match="save first, then upload"):
        pipe.save_pretrained(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="DDUF files is no longer supported"):
        type(pipe).from_pretrained(tmp_path, dduf_file="sd15.dduf")


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_pipeline_with_accelerator_device_map(name: str, tmp_path: Path) -> None:
    pipe = build(name)
    pipe.save_pretrained(tmp_path)
    mapped = reload(rg.RewardGuidedPipeline, tmp_path, device_map="cpu")
    assert np.array_equal(unguided(mapped, name), run(pipe, name))


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
    assert np.array_equal(unguided(ours, name), reference)
    under_guidance(ours, name)
    assert np.array_equal(run(back, name), reference)
    assert np.array_equal(run(stock, name), reference), "the pipeline that was shared is as before"


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
        assert np.array_equal(unguided(pipe, second), reference)
        back = type(source).from_pipe(pipe)
        assert public(back) == public(source)
        assert np.array_equal(run(back, first), run(source, first))


# --- batches and prompts ---


@pytest.mark.parametrize("name", KINDS)
def test_inference_batch_consistent_and_single_identical(name: str) -> None:
    pipe = build(name)
    prompts = ["a cat", "very long " * 30]
    together = np.asarray(unguided(pipe, name, **batch(name, prompts)))
    assert len(together) == 2
    alone = np.asarray(run(pipe, name, **batch(name, prompts[:1])))
    assert close(together[0], alone[0], 2e-3)
    if name in FEW:
        assert len(under_guidance(pipe, name, **batch(name, prompts))) == 2


@pytest.mark.parametrize("name", KINDS)
def test_num_images_per_prompt(name: str) -> None:
    pipe = build(name)
    parameters = inspect.signature(type(pipe).__call__).parameters
    copies = next(n for n in ("num_images_per_prompt", "num_videos_per_prompt") if n in parameters)
    pair = batch(name, ["a cat", "a red dog"])
    del pair["generator"]  # one for all
    assert len(unguided(pipe, name, **{copies: 2})) == 2
    assert len(unguided(pipe, name, **pair, **{copies: 2})) == 4
    if name in FEW:
        assert len(under_guidance(pipe, name, **pair, **{copies: 2})) == 4


@pytest.mark.parametrize("name", [n for n in KINDS if n != "flux2_klein"])
def test_cfg(name: str) -> None:
    pipe = build(name)
    true = "true_cfg_scale" in ZOO[name].call()
    scale = "true_cfg_scale" if true else "guidance_scale"
    no = 0.0 if name == "zimage" else 1.0  # Z-Image adds what others multiply
    off, on = (unguided(pipe, name, **{scale: value}) for value in (no, 7.5))
    assert off.shape == on.shape
    embedded = name.startswith("flux")  # the scale is an input of the denoiser
    assert embedded or not np.array_equal(off, on)
    for value, evaluations in ((no, 1), (7.5, 1 if embedded else 2)):
        out = pipe(**ZOO[name].call() | {scale: value, "sampler": "none", "seed": 0, "output_type": "latent"})
        steps = out.ledger.denoiser_evaluations / evaluations
        assert steps == int(steps) and 1 <= steps <= 5


# The argument that takes each result of `encode_prompt`, for each of its calls; None for results that are made anew.
_POSITIVE_NEGATIVE = [("prompt_embeds", "negative_prompt_embeds")]
_POOLED = [("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")]
_MASKED = [("prompt_embeds", "prompt_attention_mask", "negative_prompt_embeds", "negative_prompt_attention_mask")]
EMBEDDINGS: dict[str, list[tuple[str | None, ...]]] = {
    "sd15": _POSITIVE_NEGATIVE,
    "sd15_img2img": _POSITIVE_NEGATIVE,
    "sd15_inpaint": _POSITIVE_NEGATIVE,
    "sd15_controlnet": _POSITIVE_NEGATIVE,
    "sdxl": _POOLED,
    "sdxl_img2img": _POOLED,
    "sdxl_inpaint": _POOLED,
    "sd3": _POOLED,
    "sd3_img2img": _POOLED,
    "sd3_inpaint": _POOLED,
    "flux": [("prompt_embeds", "pooled_prompt_embeds", None)],
    "flux_kontext": [("prompt_embeds", "pooled_prompt_embeds", None)],
    "flux_fill": [("prompt_embeds", "pooled_prompt_embeds", None)],
    "flux2_klein": [("prompt_embeds", None), ("negative_prompt_embeds", None)],
    "chroma": [
        (
            "prompt_embeds",
            None,
            "prompt_attention_mask",
            "negative_prompt_embeds",
            None,
            "negative_prompt_attention_mask",
        )
    ],
    "pixart_alpha": _MASKED,
    "pixart_sigma": _MASKED,
    "sana": _MASKED,
    "lumina2": _MASKED,
    "qwenimage": [
        ("prompt_embeds", "prompt_embeds_mask"),
        ("negative_prompt_embeds", "negative_prompt_embeds_mask"),
    ],
    "zimage": _POSITIVE_NEGATIVE,
    "wan": _POSITIVE_NEGATIVE,
    "hidream": [
        (
            "prompt_embeds_t5",
            "negative_prompt_embeds_t5",
            "prompt_embeds_llama3",
            "negative_prompt_embeds_llama3",
            "pooled_prompt_embeds",
            "negative_pooled_prompt_embeds",
        )
    ],
}


@pytest.mark.parametrize("name", list(EMBEDDINGS))
def test_encode_prompt_works_in_isolation(name: str) -> None:
    """A pipeline with text encoders alone encodes for one without; without a sampler our class is stock there too."""
    whole = build(name)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    stock_encode = whole.encode_prompt

    def encode(*args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return stock_encode(*args, **kwargs)

    whole.encode_prompt = encode
    reference = run(whole, name)
    del whole.encode_prompt
    assert len(calls) == len(EMBEDDINGS[name])
    text = {k for k in whole.components if k.startswith(("text_encoder", "tokenizer"))}
    encoder = type(whole)(**{k: v if k in text else None for k, v in whole.components.items()})
    call: dict[str, Any] = {"prompt": None}
    parameters = inspect.signature(type(whole).__call__).parameters
    if "negative_prompt" in parameters:
        call["negative_prompt"] = None
    for (args, kwargs), names in zip(calls, EMBEDDINGS[name], strict=True):
        with torch.no_grad():
            encoded = encoder.encode_prompt(*args, **kwargs)
        call |= {n: e for n, e in zip(names, encoded, strict=True) if n is not None}
    assert call.keys() <= parameters.keys()
    rest = type(whole)(**{k: None if k in text else v for k, v in whole.components.items()})
    rest.set_progress_bar_config(disable=True)
    assert np.array_equal(run(rest, name, **call), reference)
    with pytest.raises(ValueError, match="guided sampling needs the prompt as text"):
        run(rest, name, **call, sampler="none")


# --- callbacks ---


@pytest.mark.parametrize("name", CALLED_BACK)
def test_callback_inputs(name: str) -> None:
    pipe = build(name)
    allowed = list(pipe._callback_tensor_inputs)
    seen: list[tuple[int, list[str]]] = []

    def watch(pipe: DiffusionPipeline, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert type(pipe).__name__.startswith("RewardGuided") and 0 <= index < pipe.num_timesteps
        seen.append((index, list(tensors)))
        return tensors

    def zero(pipe: DiffusionPipeline, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        if index == pipe.num_timesteps - 1:
            tensors["latents"] = torch.zeros_like(tensors["latents"])
        return tensors

    reference = unguided(pipe, name)
    for inputs in (["latents"], allowed) if name in FEW else (allowed,):
        seen.clear()
        watched = unguided(pipe, name, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=inputs)
        assert np.array_equal(watched, reference)
        once = seen[: len(seen) // 2]
        assert once == seen[len(once) :] and [i for i, _ in once] == list(range(len(once))) and len(once) > 0
        assert all(names == inputs for _, names in once)
    if name != "zimage":  # which looks them up unchecked
        with pytest.raises(ValueError, match="callback_on_step_end_tensor_inputs"):
            run(
                pipe, name, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=["none_such"], sampler="none"
            )
    guidance: tuple[dict[str, Any], ...] = ({}, {"sampler": "none"})
    if refusal(pipe.scheduler) is None:
        guidance += ({"sampler": ODE},)
    for extra in guidance:
        changed = run(pipe, name, output_type="latent", callback_on_step_end=zero, **extra)
        assert torch.as_tensor(changed).abs().sum() == 0


@pytest.mark.parametrize("name", KINDS)
def test_callback_tensor_changes(name: str) -> None:
    """What a callback makes of the latents in the middle of a run is what the run goes on with."""
    pipe = build(name)

    def shrink(pipe: DiffusionPipeline, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": 0.5 * tensors["latents"]} if index == 0 else {}

    changed = unguided(pipe, name, callback_on_step_end=shrink)
    assert not np.array_equal(changed, run(pipe, name))
    if type(pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler":  # whose steps our ode has to the bit
        assert np.array_equal(run(pipe, name, callback_on_step_end=shrink, sampler=ODE), changed)


@pytest.mark.parametrize("name", KINDS)
def test_callback_cfg(name: str) -> None:
    pipe = build(name)

    def increase(pipe: DiffusionPipeline, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._guidance_scale += 1.0
        return tensors

    scaled = unguided(pipe, name, guidance_scale=2.0, callback_on_step_end=increase)
    run(pipe, name, guidance_scale=2.0, callback_on_step_end=increase)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    if not name.startswith(("flux", "sana", "qwenimage", "wan")):  # which read the argument
        assert not np.array_equal(scaled, run(pipe, name, guidance_scale=2.0))


CUTOFFS: dict[str, type[PipelineCallback]] = {
    "sd15": SDCFGCutoffCallback,
    "sdxl": df.callbacks.SDXLCFGCutoffCallback,
    "sd3": SD3CFGCutoffCallback,
}


def cutoff(name: str) -> PipelineCallback:
    """diffusers' callback that switches guidance off from the third step on."""
    return CUTOFFS[name](cutoff_step_ratio=None, cutoff_step_index=1)


@pytest.mark.parametrize("name", list(CUTOFFS))
def test_pipeline_callbacks_are_stock_without_jumps(name: str) -> None:
    for callback in (cutoff(name), MultiPipelineCallbacks([cutoff(name)])):
        changed = thrice(name, callback_on_step_end=callback)
        assert not np.array_equal(changed, run(ZOO[name].build(), name))


@torch.no_grad()
@pytest.mark.parametrize("name", list(CUTOFFS))
def test_pipeline_callbacks_hold_after_a_jump(name: str) -> None:
    """A prediction depends on the level alone, not on how it was reached, also where a callback changes the run."""
    ode = Transition("ode")
    call = ZOO[name].call() | {"generator": torch.Generator().manual_seed(0), "callback_on_step_end": cutoff(name)}
    with closing(PipelineDenoiser(build(name), call)) as denoiser:
        states = [denoiser.initial()]
        for level in range(denoiser.steps):
            states.append(ode(denoiser.predict(states[-1], level), denoiser.schedule, level, level + 1).mean)
        for level in (3, 0, 2, 1):
            again = ode(denoiser.predict(states[level].clone(), level), denoiser.schedule, level, level + 1).mean
            assert torch.equal(again, states[level + 1]), level


class CutoffForBatches(SDCFGCutoffCallback):
    """As diffusers' own, whose `prompt_embeds[-1:]` is for one image only: samplers that jump evaluate several."""

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Tensor, callback_kwargs: dict[str, Any]) -> Any:
        if step_index == self.config.cutoff_step_index:
            callback_kwargs["prompt_embeds"] = callback_kwargs["prompt_embeds"].chunk(2)[1]
            pipeline._guidance_scale = 0.0
        return callback_kwargs


@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_pipeline_callbacks_hold_under_a_sampler_that_jumps(name: str) -> None:
    pipe, call = build(name), ZOO[name].call() | {"seed": 0, "output_type": "np"}
    plain = pipe(**call, sampler=JUMPING, reward=redness)
    callback = CutoffForBatches(cutoff_step_ratio=None, cutoff_step_index=1) if name == "sd15" else cutoff(name)
    cut = pipe(**call, sampler=JUMPING, reward=redness, callback_on_step_end=callback)
    assert cut.ledger.denoiser_evaluations < plain.ledger.denoiser_evaluations, "no guidance from the third step on"
    assert not np.array_equal(cut.images, plain.images)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "sana", "wan", "sd15_inpaint", "sd3_inpaint"])
def test_callbacks_with_tensors_do_not_disturb_a_sampler_that_jumps(name: str) -> None:
    pipe = build(name)
    before = under_guidance(pipe, name)
    seen = []

    def watch(pipe: DiffusionPipeline, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        assert list(tensors) == inputs
        seen.append(index)
        return tensors

    inputs = list(pipe._callback_tensor_inputs)
    watched = under_guidance(pipe, name, callback_on_step_end=watch, callback_on_step_end_tensor_inputs=inputs)
    assert np.array_equal(watched, before)
    assert seen


# --- input images and latents ---


@pytest.mark.parametrize("name", IMAGES)
def test_pt_np_pil_inputs_equivalent(name: str) -> None:
    pipe, base = build(name), ZOO[name].call()
    pictures = {k: base[k] for k in ("image", "mask_image") if k in base}
    arrays = {k: np.asarray(v, np.float32)[None] / 255 for k, v in pictures.items()}
    arrays = {k: v if v.ndim == 4 else v[..., None] for k, v in arrays.items()}
    tensors = {k: torch.from_numpy(v).movedim(-1, 1) for k, v in arrays.items()}
    reference = unguided(pipe, name)
    for given in (arrays, tensors):
        assert close(unguided(pipe, name, **given), reference, 1e-2)
        assert close(under_guidance(pipe, name, **given), under_guidance(pipe, name), 1e-2)


@pytest.mark.parametrize("name", ["sd15_img2img", "sdxl_img2img", "sd3_img2img"])
def test_latents_as_input_image(name: str) -> None:
    pipe = build(name)
    channels = pipe.vae.config.latent_channels
    latents = torch.randn(1, channels, 16, 16, generator=torch.Generator().manual_seed(1))
    out = thrice(name, image=latents)
    assert not np.array_equal(out, run(pipe, name))
    under_guidance(pipe, name, image=latents)


@pytest.mark.parametrize("name", [n for n in KINDS if n != "sd3_img2img"])
def test_latents_input(name: str) -> None:
    pipe = build(name)
    start: list[Tensor] = []
    with closing(
        PipelineDenoiser(pipe, ZOO[name].call() | {"generator": torch.Generator().manual_seed(5)})
    ) as denoiser:
        start.append(denoiser.initial())
    if name == "flux2_klein":  # packs them itself
        start[0] = start[0].mT.reshape(1, 16, 8, 8)
    if hasattr(pipe.scheduler, "init_noise_sigma") and "inpaint" not in name:
        start[0] = start[0] / pipe.scheduler.init_noise_sigma  # given latents are scaled once more
    out = unguided(pipe, name, latents=start[0])
    assert not np.array_equal(out, run(pipe, name)), "they are used"


@pytest.mark.parametrize("name", ["sd15", "sd15_img2img", "sdxl"])
def test_multi_vae(name: str) -> None:
    widths = {"block_out_channels": (8, 8)}
    down, up = ("DownEncoderBlock2D",) * 2, ("UpDecoderBlock2D",) * 2
    torch.manual_seed(0)
    kinds = [
        df.AsymmetricAutoencoderKL(
            down_block_types=down,
            up_block_types=up,
            down_block_out_channels=(8, 8),
            up_block_out_channels=(8, 8),
            norm_num_groups=4,
        ),
        df.AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        df.AutoencoderKL(**widths, down_block_types=down, up_block_types=up, norm_num_groups=4, latent_channels=4),
    ]
    reference = run(ZOO[name].build(), name)
    for vae in kinds:
        vae.eval()
        out = thrice(name, lambda pipe, vae=vae: pipe.register_modules(vae=vae))
        assert out.shape == reference.shape and not np.array_equal(out, reference)
        pipe = build(name)
        pipe.register_modules(vae=vae)
        under_guidance(pipe, name)


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
    switch.fuse_qkv_projections()
    assert any(
        "Fused" in type(p).__name__ or getattr(p, "fused", True) for p in denoiser_of(pipe).attn_processors.values()
    )
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

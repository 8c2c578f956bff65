"""Tiny, randomly initialised diffusers pipelines, one per family, built in code and offline.

They paint nothing, but run the stock code of their class, and the denoiser heeds latents, timestep and prompt.
"""

import copy
import re
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers as df
import numpy as np
import torch
import transformers as tf
from diffusers import DiffusionPipeline
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as qwen_edit
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn

_WIDTH = 16  # hidden size of every CLIP and language model
_T5_WIDTH = 32  # two CLIPs side by side, as SD3 needs it
_SHIFT = {"scaling_factor": 0.5, "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}


@dataclass(frozen=True)
class Specimen:
    """One family: how to build a tiny pipeline of it, and the keyword arguments of one small stock call."""

    name: str
    build: Callable[[], DiffusionPipeline]
    call: Callable[[], dict[str, Any]]


# --- text ---


def _clip_tokenizer() -> tf.CLIPTokenizer:
    """One token per character."""
    characters = sorted(ByteLevel.alphabet())
    # The end of a text is found as its highest id.
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return tf.CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=77)


def _clip(tokenizer: tf.CLIPTokenizer, projection: bool = False) -> Any:
    """A CLIP text encoder, with or without the projected, pooled output."""
    config = tf.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=_WIDTH,
        intermediate_size=32,
        projection_dim=_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=2,  # not the real one: it selects pooling at the highest id
    )
    return (tf.CLIPTextModelWithProjection if projection else tf.CLIPTextModel)(config)


def _t5_tokenizer() -> tf.T5Tokenizer:
    """One token per character."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab = [*special, *((c, -3.0) for c in string.printable if not c.isspace())]
    return tf.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def _t5(model: type = tf.T5EncoderModel, config: type = tf.T5Config) -> Any:
    """A T5 encoder, or one of its relatives."""
    size = {"d_model": _T5_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return model(config(vocab_size=len(_t5_tokenizer()), **size))


def _qwen_tokenizer() -> tf.Qwen2Tokenizer:
    """One token per character; a chat is its messages, a line each."""
    tokens = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = tf.Qwen2Tokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=512)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    return tokenizer


def _gemma_tokenizer() -> tf.GemmaTokenizer:
    """One token per character."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(c for c in string.printable if not c.isspace())]
    return tf.GemmaTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], add_bos_token=True)


def _decoder_size(layers: int = 2) -> dict[str, Any]:
    """The size of a language model; its embeddings are wide enough apart that prompts differ."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": layers}
    return {"vocab_size": 300, "hidden_size": _WIDTH, "intermediate_size": 32, "initializer_range": 0.5, **heads}


def _gemma() -> tf.Gemma2Model:
    """The text encoder of Sana and Lumina."""
    return tf.Gemma2Model(tf.Gemma2Config(**_decoder_size(), head_dim=8, query_pre_attn_scalar=8))


def _qwen_vl() -> tf.Qwen2_5_VLForConditionalGeneration:
    """Qwen 2.5 VL; its vision tower is never called."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": _WIDTH}
    config = tf.Qwen2_5_VLConfig(
        text_config={**_decoder_size(), "rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 0},
        vision_config={**vision, "fullatt_block_indexes": [0]},
        image_token_id=296,
        video_token_id=297,
        vision_start_token_id=298,
        vision_end_token_id=299,
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


# --- images ---


def _vae(latents: int = 4, blocks: int = 2, **config: Any) -> df.AutoencoderKL:
    """An image VAE that shrinks by 2 per block but the first."""
    return df.AutoencoderKL(**_vae_size(blocks), latent_channels=latents, **config)


def _vae_size(blocks: int = 2) -> dict[str, Any]:
    """What the VAEs of Stable Diffusion and Flux 2 have in common."""
    return {
        "block_out_channels": (8,) * blocks,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "norm_num_groups": 4,
        "sample_size": 32,
    }


def _picture() -> Image.Image:
    """A smooth colour gradient of 32 x 32."""
    y, x = np.mgrid[0:32, 0:32] * 8
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def _mask() -> Image.Image:
    """White (to be painted) on the right half."""
    return Image.fromarray(np.repeat([[0, 255]], 16, axis=1).repeat(32, axis=0).astype(np.uint8))


# --- schedulers ---


def _betas() -> dict[str, Any]:
    """The noise schedule of Stable Diffusion."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return {**betas, "steps_offset": 1, "timestep_spacing": "leading"}


def _ddim() -> df.DDIMScheduler:
    """The scheduler of Stable Diffusion 1.5."""
    return df.DDIMScheduler(**_betas(), clip_sample=False, set_alpha_to_one=False)


def _flow(shift: float = 1.0) -> df.FlowMatchEulerDiscreteScheduler:
    """Flow matching with one shift for every resolution."""
    return df.FlowMatchEulerDiscreteScheduler(shift=shift)


def _dynamic_flow() -> df.FlowMatchEulerDiscreteScheduler:
    """Flow matching with a shift that depends on the resolution."""
    return df.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


# --- Stable Diffusion 1 and XL ---


def _unet(context: int, **config: Any) -> df.UNet2DConditionModel:
    """A UNet of two resolutions that attends to text at the lower one."""
    size = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 16}
    return df.UNet2DConditionModel(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=context,
        attention_head_dim=2,
        **size,
        **config,
    )


def _sd15(scheduler: Any = None, **unet: Any) -> dict[str, Any]:
    """The components of Stable Diffusion 1.5."""
    tokenizer = _clip_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": _clip(tokenizer),
        "unet": _unet(_WIDTH, **unet),
        "vae": _vae(),
        "scheduler": scheduler or _ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def _sd15_controlnet() -> df.StableDiffusionControlNetPipeline:
    """Stable Diffusion 1.5 with a ControlNet."""
    parts = _sd15()
    controlnet = df.ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8))
    return df.StableDiffusionControlNetPipeline(**parts, controlnet=controlnet)


def _sd15_ip_adapter() -> df.StableDiffusionPipeline:
    """Stable Diffusion 1.5 with an image encoder and an IP adapter."""
    size = {"hidden_size": _WIDTH, "intermediate_size": 32, "projection_dim": _WIDTH, "image_size": 16}
    vision = tf.CLIPVisionConfig(**size, patch_size=8, num_hidden_layers=1, num_attention_heads=2)
    parts = _sd15() | {
        "image_encoder": tf.CLIPVisionModelWithProjection(vision),
        "feature_extractor": tf.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
    }
    pipe = df.StableDiffusionPipeline(**parts)
    projection = {"proj.weight": torch.randn(4 * _WIDTH, _WIDTH), "proj.bias": torch.zeros(4 * _WIDTH)}
    projection |= {"norm.weight": torch.ones(_WIDTH), "norm.bias": torch.zeros(_WIDTH)}
    # Adapter weights are numbered over all attentions, of which every second one is a cross attention.
    cross = [pipe.unet.get_submodule(n.removesuffix(".processor")) for n in pipe.unet.attn_processors if "attn2" in n]
    adapter = {
        f"{2 * i + 1}.to_{which}_ip.weight": torch.randn(attention.to_k.weight.shape)
        for i, attention in enumerate(cross)
        for which in "kv"
    }
    pipe.load_ip_adapter({"image_proj": projection, "ip_adapter": adapter}, subfolder="", weight_name="")
    return pipe


def _sdxl(scheduler: Any = None) -> dict[str, Any]:
    """The components of Stable Diffusion XL."""
    tokenizer = _clip_tokenizer()
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": _clip_tokenizer(),
        "text_encoder": _clip(tokenizer),
        "text_encoder_2": _clip(tokenizer, projection=True),
        "unet": _unet(
            2 * _WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=_WIDTH + 6 * 4,
        ),
        "vae": _vae(),
        "scheduler": scheduler or df.EulerDiscreteScheduler(**_betas()),
    }


# --- Stable Diffusion 3 and Flux ---


def _sd3() -> dict[str, Any]:
    """The components of Stable Diffusion 3; its inpainting insists on 16 latent channels."""
    tokenizer = _clip_tokenizer()
    transformer = df.SD3Transformer2DModel(
        sample_size=16,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * _WIDTH,
        out_channels=16,
        pos_embed_max_size=16,
    )
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": _clip_tokenizer(),
        "tokenizer_3": _t5_tokenizer(),
        "text_encoder": _clip(tokenizer, projection=True),
        "text_encoder_2": _clip(tokenizer, projection=True),
        "text_encoder_3": _t5(),
        "transformer": transformer,
        "vae": _vae(16, **_SHIFT),
        "scheduler": _flow(3.0),
    }


def _flux_blocks() -> dict[str, Any]:
    """What the transformers of Flux and Chroma have in common."""
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    return {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": _T5_WIDTH, **heads}


def _flux(distilled: bool = True, scheduler: Any = None, channels: int = 16) -> dict[str, Any]:
    """The components of Flux, by default with an embedded guidance scale and a shift by resolution."""
    tokenizer = _clip_tokenizer()
    transformer = df.FluxTransformer2DModel(
        **_flux_blocks(),
        in_channels=channels,
        out_channels=16,
        pooled_projection_dim=_WIDTH,
        guidance_embeds=distilled,
    )
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": _t5_tokenizer(),
        "text_encoder": _clip(tokenizer),
        "text_encoder_2": _t5(),
        "transformer": transformer,
        "vae": _vae(**_SHIFT),
        "scheduler": scheduler or _dynamic_flow(),
    }


def _flux2_klein() -> df.Flux2KleinPipeline:
    """Flux 2 klein, guided by a second pass."""
    transformer = df.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * _WIDTH,  # three hidden states of the text encoder side by side
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return df.Flux2KleinPipeline(
        tokenizer=_qwen_tokenizer(),
        text_encoder=tf.Qwen3ForCausalLM(tf.Qwen3Config(**_decoder_size(layers=3), head_dim=8)),
        transformer=transformer,
        vae=df.AutoencoderKLFlux2(**_vae_size(), latent_channels=4),
        scheduler=_dynamic_flow(),
    )


def _chroma() -> df.ChromaPipeline:
    """Chroma: Flux without CLIP, guided by a second pass."""
    approximator = {"approximator_num_channels": 64, "approximator_hidden_dim": 32, "approximator_layers": 1}
    return df.ChromaPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5(),
        transformer=df.ChromaTransformer2DModel(**_flux_blocks(), **approximator, in_channels=16),
        vae=_vae(**_SHIFT),
        scheduler=_dynamic_flow(),
    )


# --- other families ---


def _pixart(scheduler: Any) -> dict[str, Any]:
    """The components of PixArt; the transformer predicts a variance besides the noise."""
    transformer = df.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=16,
        caption_channels=_T5_WIDTH,
    )
    return {
        "tokenizer": _t5_tokenizer(),
        "text_encoder": _t5(),
        "transformer": transformer,
        "vae": _vae(),
        "scheduler": scheduler,
    }


def _sana() -> df.SanaPipeline:
    """Sana, with its own kind of VAE."""
    transformer = df.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=_WIDTH,
    )
    stages = {"block_out_channels": (8, 8), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
    vae = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in stages.items()}
    return df.SanaPipeline(
        tokenizer=_gemma_tokenizer(),
        text_encoder=_gemma(),
        transformer=transformer,
        vae=df.AutoencoderDC(**vae, latent_channels=4, scaling_factor=0.41407),
        scheduler=_flow(3.0),
    )


def _qwenimage() -> df.QwenImagePipeline:
    """Qwen-Image."""
    transformer = df.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = df.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 2.0, 1.2, 0.8],
    )
    pipe = df.QwenImagePipeline(
        tokenizer=_qwen_tokenizer(),
        text_encoder=_qwen_vl(),
        transformer=transformer,
        vae=vae,
        scheduler=_dynamic_flow(),
    )
    # The pipeline drops the first 34 tokens: with these words in the vocabulary, they are its template, not the prompt.
    pipe.tokenizer.add_tokens(re.findall(r"<\|\w+\|>| ?\w+", pipe.prompt_template_encode))
    return pipe


class _TextProcessor:
    """Stands in for the vision processor, which needs torchvision: the prompt alone."""

    def __init__(self, tokenizer: tf.Qwen2Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> Any:
        return self.tokenizer(text, padding=padding, return_tensors=return_tensors)


def _qwenimage_edit() -> df.QwenImageEditPipeline:
    """Qwen-Image-Edit, whose pictures are resized to 32x32 and not to a megapixel."""
    parts = _qwenimage().components
    qwen_edit.calculate_dimensions = lambda area, ratio: (32, 32, None)
    return df.QwenImageEditPipeline(**parts, processor=_TextProcessor(parts["tokenizer"]))


def _zimage() -> df.ZImagePipeline:
    """Z-Image."""
    transformer = df.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=_WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 64, 64],
    )
    return df.ZImagePipeline(
        tokenizer=_qwen_tokenizer(),
        text_encoder=tf.Qwen3Model(tf.Qwen3Config(**_decoder_size(), head_dim=8)),
        transformer=transformer,
        vae=_vae(**_SHIFT),
        scheduler=_flow(3.0),
    )


def _lumina2() -> df.Lumina2Pipeline:
    """Lumina 2."""
    transformer = df.Lumina2Transformer2DModel(
        sample_size=8,
        in_channels=4,
        hidden_size=32,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        cap_feat_dim=_WIDTH,
    )
    return df.Lumina2Pipeline(
        tokenizer=_gemma_tokenizer(),
        text_encoder=_gemma(),
        transformer=transformer,
        vae=_vae(blocks=4, **_SHIFT),  # the pipeline takes a VAE that shrinks by 8 for granted
        scheduler=_dynamic_flow(),
    )


def _hidream() -> df.HiDreamImagePipeline:
    """HiDream. It always paints 128 x 128 latents: hence large patches, and no attention in its VAE."""
    tokenizer = _clip_tokenizer()
    transformer = df.HiDreamImageTransformer2DModel(
        patch_size=8,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[_T5_WIDTH, _WIDTH],
        text_emb_dim=2 * _WIDTH,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(128, 128),
        llama_layers=[0, 1],
    )
    return df.HiDreamImagePipeline(
        tokenizer=tokenizer,
        tokenizer_2=_clip_tokenizer(),
        tokenizer_3=_t5_tokenizer(),
        tokenizer_4=_qwen_tokenizer(),
        text_encoder=_clip(tokenizer, projection=True),
        text_encoder_2=_clip(tokenizer, projection=True),
        text_encoder_3=_t5(),
        text_encoder_4=tf.LlamaForCausalLM(tf.LlamaConfig(**_decoder_size())),
        transformer=transformer,
        vae=_vae(**_SHIFT, mid_block_add_attention=False),
        scheduler=_flow(3.0),
    )


def _wan() -> df.WanPipeline:
    """Wan, text to video."""
    transformer = df.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=_T5_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
    )
    return df.WanPipeline(
        tokenizer=_t5_tokenizer(),
        text_encoder=_t5(tf.UMT5EncoderModel, tf.UMT5Config),
        transformer=transformer,
        vae=df.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=_flow(3.0),
    )


# --- the zoo ---


def _awaken(denoiser: nn.Module) -> None:
    """Let every layer pass on the variance of its input.

    As initialised, layers shrink it, a ControlNet's last ones to zero: prompts and images would have next to no effect.
    """
    for layer in denoiser.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.Conv3d):
            nn.init.normal_(layer.weight, std=layer.weight[0].numel() ** -0.5)


def _build(make: Callable[[], DiffusionPipeline]) -> DiffusionPipeline:
    """The pipeline that `make` puts together: always the same one, silent and in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe = make()
        for name, module in pipe.components.items():
            if isinstance(module, nn.Module):
                module.eval()
            if name in ("unet", "controlnet", "transformer"):
                _awaken(module)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _specimen(name: str, make: Callable[[], DiffusionPipeline], **call: Any) -> Specimen:
    """A specimen whose call is never shared between two uses."""
    return Specimen(name, partial(_build, make), partial(copy.deepcopy, {"prompt": "a cat", **call}))


_SIZE: dict[str, Any] = {"num_inference_steps": 4, "height": 32, "width": 32}
_TEXT: dict[str, Any] = {**_SIZE, "max_sequence_length": 48}
_EDIT: dict[str, Any] = {"num_inference_steps": 4, "image": _picture(), "strength": 0.75}
_FILL: dict[str, Any] = {**_SIZE, **_EDIT, "mask_image": _mask()}
_PLAIN: dict[str, Any] = {**_TEXT, "clean_caption": False, "use_resolution_binning": False}

ZOO: dict[str, Specimen] = {
    specimen.name: specimen
    for specimen in (
        _specimen("sd15", lambda: df.StableDiffusionPipeline(**_sd15()), guidance_scale=5.0, **_SIZE),
        _specimen("sd15_img2img", lambda: df.StableDiffusionImg2ImgPipeline(**_sd15()), guidance_scale=5.0, **_EDIT),
        _specimen("sd15_inpaint", lambda: df.StableDiffusionInpaintPipeline(**_sd15()), guidance_scale=5.0, **_FILL),
        _specimen(
            "sd15_inpaint9",
            lambda: df.StableDiffusionInpaintPipeline(**_sd15(in_channels=9)),
            guidance_scale=5.0,
            **_FILL | {"strength": 1.0},
        ),
        _specimen("sd15_controlnet", _sd15_controlnet, image=_picture(), guidance_scale=5.0, **_SIZE),
        _specimen("sd15_ip_adapter", _sd15_ip_adapter, ip_adapter_image=_picture(), guidance_scale=5.0, **_SIZE),
        _specimen(
            "sd15_lcm",
            lambda: df.StableDiffusionPipeline(**_sd15(df.LCMScheduler(**_betas()), time_cond_proj_dim=16)),
            guidance_scale=5.0,
            **_SIZE,
        ),
        _specimen("sdxl", lambda: df.StableDiffusionXLPipeline(**_sdxl()), guidance_scale=5.0, **_SIZE),
        _specimen("sdxl_img2img", lambda: df.StableDiffusionXLImg2ImgPipeline(**_sdxl()), guidance_scale=5.0, **_EDIT),
        _specimen("sdxl_inpaint", lambda: df.StableDiffusionXLInpaintPipeline(**_sdxl()), guidance_scale=5.0, **_FILL),
        _specimen(
            "sdxl_turbo",
            lambda: df.StableDiffusionXLPipeline(
                **_sdxl(df.EulerAncestralDiscreteScheduler(**_betas() | {"timestep_spacing": "trailing"}))
            ),
            guidance_scale=0.0,
            **_SIZE | {"num_inference_steps": 2},
        ),
        _specimen("sd3", lambda: df.StableDiffusion3Pipeline(**_sd3()), guidance_scale=3.0, **_TEXT),
        _specimen(
            "sd3_img2img",
            lambda: df.StableDiffusion3Img2ImgPipeline(**_sd3()),
            guidance_scale=3.0,
            **_TEXT | _EDIT,
        ),
        _specimen(
            "sd3_inpaint",
            lambda: df.StableDiffusion3InpaintPipeline(**_sd3()),
            guidance_scale=3.0,
            **_TEXT | _FILL,
        ),
        _specimen("flux", lambda: df.FluxPipeline(**_flux()), guidance_scale=3.5, **_TEXT),
        _specimen("flux_schnell", lambda: df.FluxPipeline(**_flux(False, _flow())), guidance_scale=0.0, **_TEXT),
        _specimen(
            "flux_kontext",
            lambda: df.FluxKontextPipeline(**_flux()),
            image=_picture(),
            guidance_scale=3.5,
            max_area=32 * 32,
            _auto_resize=False,
            **_TEXT,
        ),
        # Latents, the masked image's latents and the mask, each packed: 16 + 16 + 16 channels.
        _specimen(
            "flux_fill",
            lambda: df.FluxFillPipeline(**_flux(channels=48)),
            guidance_scale=30.0,
            **_TEXT | _FILL | {"strength": 1.0},
        ),
        _specimen(
            "flux2_klein",
            _flux2_klein,
            guidance_scale=4.0,
            text_encoder_out_layers=(1, 2, 3),
            **_TEXT | {"max_sequence_length": 24},
        ),
        _specimen("chroma", _chroma, guidance_scale=5.0, **_TEXT),
        _specimen(
            "pixart_alpha",
            lambda: df.PixArtAlphaPipeline(**_pixart(df.DPMSolverMultistepScheduler(**_betas()))),
            guidance_scale=4.5,
            **_PLAIN,
        ),
        _specimen("pixart_sigma", lambda: df.PixArtSigmaPipeline(**_pixart(_ddim())), guidance_scale=4.5, **_PLAIN),
        _specimen("sana", _sana, guidance_scale=4.5, complex_human_instruction=None, **_PLAIN),
        _specimen("qwenimage", _qwenimage, negative_prompt=" ", true_cfg_scale=4.0, **_TEXT),
        _specimen(
            "qwenimage_edit", _qwenimage_edit, image=_picture(), negative_prompt=" ", true_cfg_scale=4.0, **_TEXT
        ),
        _specimen("zimage", _zimage, guidance_scale=3.0, **_TEXT),
        _specimen("lumina2", _lumina2, guidance_scale=4.0, system_prompt="", **_TEXT | {"height": 64, "width": 64}),
        _specimen("hidream", _hidream, guidance_scale=3.0, **_TEXT),
        _specimen("wan", _wan, guidance_scale=5.0, num_frames=5, **_TEXT),
    )
}

"""Three families at their published sizes, with random weights, for measurements where no model can be downloaded:

    python -m tests.zoo.grown sd3.5-medium FOLDER && rsm-guidance benchmark engine --models FOLDER --dtype bfloat16

Widths and depths are the published ones; tokenizers know single characters only, so that embeddings of tokens are small.
"""

import sys
from collections.abc import Callable
from typing import Any

import diffusers as df
import torch
import transformers as tf
from diffusers import DiffusionPipeline

from tests.zoo import parts

_DEPTHS = (128, 256, 512, 512)


def _clip(tokenizer: tf.CLIPTokenizer, width: int, layers: int, heads: int, projection: bool) -> Any:
    config = tf.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, projection_dim=width,
        num_hidden_layers=layers, num_attention_heads=heads, bos_token_id=len(tokenizer) - 2, eos_token_id=2,
    )  # fmt: skip
    return (tf.CLIPTextModelWithProjection if projection else tf.CLIPTextModel)(config)


def _vae(latents: int, **config: Any) -> df.AutoencoderKL:
    return df.AutoencoderKL(
        latent_channels=latents, block_out_channels=_DEPTHS, layers_per_block=2, sample_size=1024,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **config,
    )  # fmt: skip


def sd35_transformer() -> df.SD3Transformer2DModel:
    return df.SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip


def sdxl_unet() -> df.UNet2DConditionModel:
    return df.UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), layers_per_block=2, cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def flux_transformer() -> df.FluxTransformer2DModel:
    return df.FluxTransformer2DModel(
        in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip


def _sd35_medium() -> DiffusionPipeline:
    """Without T5, as it is mostly run where memory is short."""
    tokenizer = parts.clip_tokenizer()
    return df.StableDiffusion3Pipeline(
        transformer=sd35_transformer(), scheduler=parts.flow(3.0), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=_clip(tokenizer, 768, 12, 12, True), text_encoder_2=_clip(tokenizer, 1280, 32, 20, True),
        tokenizer_3=None, text_encoder_3=None,
        vae=_vae(16, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
    )  # fmt: skip


def _sdxl() -> DiffusionPipeline:
    tokenizer = parts.clip_tokenizer()
    return df.StableDiffusionXLPipeline(
        unet=sdxl_unet(), scheduler=df.EulerDiscreteScheduler(**parts.betas()), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder=_clip(tokenizer, 768, 12, 12, False), text_encoder_2=_clip(tokenizer, 1280, 32, 20, True),
        vae=_vae(4, scaling_factor=0.13025),
    )  # fmt: skip


def _flux() -> DiffusionPipeline:
    tokenizer, t5 = parts.clip_tokenizer(), parts.t5_tokenizer()
    size = {"d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
    return df.FluxPipeline(
        transformer=flux_transformer(), scheduler=parts.dynamic_flow(), tokenizer=tokenizer, tokenizer_2=t5,
        text_encoder=_clip(tokenizer, 768, 12, 12, False),
        text_encoder_2=tf.T5EncoderModel(tf.T5Config(vocab_size=len(t5), feed_forward_proj="gated-gelu", **size)),
        vae=_vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False),
    )  # fmt: skip


GROWN: dict[str, Callable[[], DiffusionPipeline]] = {"sd3.5-medium": _sd35_medium, "sdxl": _sdxl, "flux": _flux}

if __name__ == "__main__":
    name, folder = sys.argv[1:]
    torch.set_default_dtype(torch.bfloat16)
    torch.manual_seed(0)
    GROWN[name]().save_pretrained(folder)

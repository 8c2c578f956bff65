"""Tokenizers, text encoders, autoencoders and schedulers that tiny pipelines share."""

import string
from typing import Any

import diffusers as df
import numpy as np
import transformers as tf
from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel

WIDTH = 16  # hidden size of every CLIP and language model
T5_WIDTH = 32  # two CLIPs side by side, as SD3 needs it
SHIFT = {"scaling_factor": 0.5, "shift_factor": 0.1, "use_quant_conv": False, "use_post_quant_conv": False}


# --- text ---


def clip_tokenizer(length: int = 77) -> tf.CLIPTokenizer:
    """One token per character; at most `length` of them."""
    characters = sorted(ByteLevel.alphabet())
    # The end of a text is found as its highest id.
    tokens = [*characters, *(c + "</w>" for c in characters), "<|startoftext|>", "<|endoftext|>"]
    return tf.CLIPTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=length)


def clip(tokenizer: tf.CLIPTokenizer, projection: bool = False) -> Any:
    """A CLIP text encoder, with or without the projected, pooled output."""
    config = tf.CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        hidden_size=WIDTH,
        intermediate_size=32,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=len(tokenizer) - 2,
        eos_token_id=2,  # not the real one: it selects pooling at the highest id
    )
    return (tf.CLIPTextModelWithProjection if projection else tf.CLIPTextModel)(config)


def t5_tokenizer() -> tf.T5Tokenizer:
    """One token per character."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab = [*special, *((c, -3.0) for c in string.printable if not c.isspace())]
    return tf.T5Tokenizer(vocab=vocab, extra_ids=0, model_max_length=512)


def t5(model: type = tf.T5EncoderModel, config: type = tf.T5Config) -> Any:
    """A T5 encoder, or one of its relatives."""
    size = {"d_model": T5_WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    return model(config(vocab_size=len(t5_tokenizer()), **size))


def qwen_tokenizer() -> tf.Qwen2Tokenizer:
    """One token per character; a chat is its messages, a line each."""
    tokens = ["<|endoftext|>", *sorted(ByteLevel.alphabet())]
    tokenizer = tf.Qwen2Tokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], model_max_length=512)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    return tokenizer


def gemma_tokenizer() -> tf.GemmaTokenizer:
    """One token per character."""
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *(c for c in string.printable if not c.isspace())]
    return tf.GemmaTokenizer(vocab={t: i for i, t in enumerate(tokens)}, merges=[], add_bos_token=True)


def decoder_size(layers: int = 2) -> dict[str, Any]:
    """The size of a language model; its embeddings are wide enough apart that prompts differ."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": layers}
    return {"vocab_size": 300, "hidden_size": WIDTH, "intermediate_size": 32, "initializer_range": 0.5, **heads}


def gemma() -> tf.Gemma2Model:
    """The text encoder of Sana and Lumina."""
    return tf.Gemma2Model(tf.Gemma2Config(**decoder_size(), head_dim=8, query_pre_attn_scalar=8))


def qwen_vl() -> tf.Qwen2_5_VLForConditionalGeneration:
    """Qwen 2.5 VL; its vision tower is never called."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    config = tf.Qwen2_5_VLConfig(
        text_config={**decoder_size(), "rope_parameters": rope, "bos_token_id": 0, "eos_token_id": 0},
        vision_config={**vision, "fullatt_block_indexes": [0]},
        image_token_id=296,
        video_token_id=297,
        vision_start_token_id=298,
        vision_end_token_id=299,
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


# --- images ---


def vae(latents: int = 4, blocks: int = 2, **config: Any) -> df.AutoencoderKL:
    """An image VAE that shrinks by 2 per block but the first."""
    return df.AutoencoderKL(**vae_size(blocks), latent_channels=latents, **config)


def vae_size(blocks: int = 2) -> dict[str, Any]:
    """What the VAEs of Stable Diffusion and Flux 2 have in common."""
    return {
        "block_out_channels": (8,) * blocks,
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "norm_num_groups": 4,
        "sample_size": 32,
    }


def picture() -> Image.Image:
    """A smooth colour gradient of 32 x 32."""
    y, x = np.mgrid[0:32, 0:32] * 8
    return Image.fromarray(np.stack([x, y, 255 - x], axis=-1).astype(np.uint8))


def mask() -> Image.Image:
    """White (to be painted) on the right half."""
    return Image.fromarray(np.repeat([[0, 255]], 16, axis=1).repeat(32, axis=0).astype(np.uint8))


# --- schedulers ---


def betas() -> dict[str, Any]:
    """The noise schedule of Stable Diffusion."""
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    return {**betas, "steps_offset": 1, "timestep_spacing": "leading"}


def ddim() -> df.DDIMScheduler:
    """The scheduler of Stable Diffusion 1.5."""
    return df.DDIMScheduler(**betas(), clip_sample=False, set_alpha_to_one=False)


def flow(shift: float = 1.0) -> df.FlowMatchEulerDiscreteScheduler:
    """Flow matching with one shift for every resolution."""
    return df.FlowMatchEulerDiscreteScheduler(shift=shift)


def dynamic_flow() -> df.FlowMatchEulerDiscreteScheduler:
    """Flow matching with a shift that depends on the resolution."""
    return df.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)

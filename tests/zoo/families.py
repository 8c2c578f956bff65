"""Tiny pipelines, or their components, family by family."""

import re
from typing import Any

import diffusers as df
import torch
import transformers as tf
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as qwen_edit

from tests.zoo import parts

# --- Stable Diffusion 1 and XL ---


def tiny_unet(context: int, **config: Any) -> df.UNet2DConditionModel:
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


def sd15(scheduler: Any = None, **unet: Any) -> dict[str, Any]:
    """The components of Stable Diffusion 1.5."""
    tokenizer = parts.clip_tokenizer()
    return {
        "tokenizer": tokenizer,
        "text_encoder": parts.clip(tokenizer),
        "unet": tiny_unet(parts.WIDTH, **unet),
        "vae": parts.vae(),
        "scheduler": scheduler or parts.ddim(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


def sd15_controlnet() -> df.StableDiffusionControlNetPipeline:
    """Stable Diffusion 1.5 with a ControlNet."""
    components = sd15()
    controlnet = df.ControlNetModel.from_unet(components["unet"], conditioning_embedding_out_channels=(4, 8))
    return df.StableDiffusionControlNetPipeline(**components, controlnet=controlnet)


def sd15_ip_adapter() -> df.StableDiffusionPipeline:
    """Stable Diffusion 1.5 with an image encoder and an IP adapter."""
    size = {"hidden_size": parts.WIDTH, "intermediate_size": 32, "projection_dim": parts.WIDTH, "image_size": 16}
    vision = tf.CLIPVisionConfig(**size, patch_size=8, num_hidden_layers=1, num_attention_heads=2)
    components = sd15() | {
        "image_encoder": tf.CLIPVisionModelWithProjection(vision),
        "feature_extractor": tf.CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
        ),
    }
    pipe = df.StableDiffusionPipeline(**components)
    projection = {"proj.weight": torch.randn(4 * parts.WIDTH, parts.WIDTH), "proj.bias": torch.zeros(4 * parts.WIDTH)}
    projection |= {"norm.weight": torch.ones(parts.WIDTH), "norm.bias": torch.zeros(parts.WIDTH)}
    # Adapter weights are numbered over all attentions, of which every second one is a cross attention.
    cross = [pipe.unet.get_submodule(n.removesuffix(".processor")) for n in pipe.unet.attn_processors if "attn2" in n]
    adapter = {
        f"{2 * i + 1}.to_{which}_ip.weight": torch.randn(attention.to_k.weight.shape)
        for i, attention in enumerate(cross)
        for which in "kv"
    }
    pipe.load_ip_adapter({"image_proj": projection, "ip_adapter": adapter}, subfolder="", weight_name="")
    return pipe


def sdxl(scheduler: Any = None) -> dict[str, Any]:
    """The components of Stable Diffusion XL."""
    tokenizer = parts.clip_tokenizer()
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": parts.clip_tokenizer(),
        "text_encoder": parts.clip(tokenizer),
        "text_encoder_2": parts.clip(tokenizer, projection=True),
        "unet": tiny_unet(
            2 * parts.WIDTH,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=parts.WIDTH + 6 * 4,
        ),
        "vae": parts.vae(),
        "scheduler": scheduler or df.EulerDiscreteScheduler(**parts.betas()),
    }


# --- Stable Diffusion 3 and Flux ---


def sd3() -> dict[str, Any]:
    """The components of Stable Diffusion 3; its inpainting insists on 16 latent channels."""
    tokenizer = parts.clip_tokenizer()
    transformer = df.SD3Transformer2DModel(
        sample_size=16,
        in_channels=16,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts.T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=2 * parts.WIDTH,
        out_channels=16,
        pos_embed_max_size=16,
    )
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": parts.clip_tokenizer(),
        "tokenizer_3": parts.t5_tokenizer(),
        "text_encoder": parts.clip(tokenizer, projection=True),
        "text_encoder_2": parts.clip(tokenizer, projection=True),
        "text_encoder_3": parts.t5(),
        "transformer": transformer,
        "vae": parts.vae(16, **parts.SHIFT),
        "scheduler": parts.flow(3.0),
    }


def flux_blocks() -> dict[str, Any]:
    """What the transformers of Flux and Chroma have in common."""
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    return {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": parts.T5_WIDTH, **heads}


def flux(distilled: bool = True, scheduler: Any = None, channels: int = 16) -> dict[str, Any]:
    """The components of Flux, by default with an embedded guidance scale and a shift by resolution."""
    tokenizer = parts.clip_tokenizer()
    transformer = df.FluxTransformer2DModel(
        **flux_blocks(),
        in_channels=channels,
        out_channels=16,
        pooled_projection_dim=parts.WIDTH,
        guidance_embeds=distilled,
    )
    return {
        "tokenizer": tokenizer,
        "tokenizer_2": parts.t5_tokenizer(),
        "text_encoder": parts.clip(tokenizer),
        "text_encoder_2": parts.t5(),
        "transformer": transformer,
        "vae": parts.vae(**parts.SHIFT),
        "scheduler": scheduler or parts.dynamic_flow(),
    }


def flux2_klein() -> df.Flux2KleinPipeline:
    """Flux 2 klein, guided by a second pass."""
    transformer = df.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * parts.WIDTH,  # its hidden states 9, 18 and 27 side by side
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return df.Flux2KleinPipeline(
        tokenizer=parts.qwen_tokenizer(),
        text_encoder=tf.Qwen3ForCausalLM(tf.Qwen3Config(**parts.decoder_size(layers=27), head_dim=8)),
        transformer=transformer,
        vae=df.AutoencoderKLFlux2(**parts.vae_size(), latent_channels=4),
        scheduler=parts.dynamic_flow(),
    )


def chroma() -> df.ChromaPipeline:
    """Chroma: Flux without CLIP, guided by a second pass."""
    approximator = {"approximator_num_channels": 64, "approximator_hidden_dim": 32, "approximator_layers": 1}
    return df.ChromaPipeline(
        tokenizer=parts.t5_tokenizer(),
        text_encoder=parts.t5(),
        transformer=df.ChromaTransformer2DModel(**flux_blocks(), **approximator, in_channels=16),
        vae=parts.vae(**parts.SHIFT),
        scheduler=parts.dynamic_flow(),
    )


# --- other families ---


def pixart(scheduler: Any) -> dict[str, Any]:
    """The components of PixArt; the transformer predicts a variance besides the noise."""
    transformer = df.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=2,
        cross_attention_dim=16,
        sample_size=16,
        caption_channels=parts.T5_WIDTH,
    )
    return {
        "tokenizer": parts.t5_tokenizer(),
        "text_encoder": parts.t5(),
        "transformer": transformer,
        "vae": parts.vae(),
        "scheduler": scheduler,
    }


def sana() -> df.SanaPipeline:
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
        caption_channels=parts.WIDTH,
    )
    stages = {"block_out_channels": (8, 8), "layers_per_block": (1, 1), "qkv_multiscales": ((), ())}
    vae = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in stages.items()}
    return df.SanaPipeline(
        tokenizer=parts.gemma_tokenizer(),
        text_encoder=parts.gemma(),
        transformer=transformer,
        vae=df.AutoencoderDC(**vae, latent_channels=4, scaling_factor=0.41407),
        scheduler=parts.flow(3.0),
    )


def qwenimage() -> df.QwenImagePipeline:
    """Qwen-Image."""
    transformer = df.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts.WIDTH,
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
        tokenizer=parts.qwen_tokenizer(),
        text_encoder=parts.qwen_vl(),
        transformer=transformer,
        vae=vae,
        scheduler=parts.dynamic_flow(),
    )
    # The pipeline drops the first 34 tokens: with these words in the vocabulary, they are its template, not the prompt.
    pipe.tokenizer.add_tokens(re.findall(r"<\|\w+\|>| ?\w+", pipe.prompt_template_encode))
    return pipe


class TextProcessor:
    """Stands in for the vision processor, which needs torchvision: the prompt alone."""

    def __init__(self, tokenizer: tf.Qwen2Tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], images: Any, padding: bool, return_tensors: str) -> Any:
        return self.tokenizer(text, padding=padding, return_tensors=return_tensors)


def qwenimage_edit() -> df.QwenImageEditPipeline:
    """Qwen-Image-Edit, whose pictures are resized to 32x32 and not to a megapixel."""
    components = qwenimage().components
    qwen_edit.calculate_dimensions = lambda area, ratio: (32, 32, None)
    return df.QwenImageEditPipeline(**components, processor=TextProcessor(components["tokenizer"]))


def zimage() -> df.ZImagePipeline:
    """Z-Image."""
    transformer = df.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=parts.WIDTH,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 64, 64],
    )
    return df.ZImagePipeline(
        tokenizer=parts.qwen_tokenizer(),
        text_encoder=tf.Qwen3Model(tf.Qwen3Config(**parts.decoder_size(), head_dim=8)),
        transformer=transformer,
        vae=parts.vae(**parts.SHIFT),
        scheduler=parts.flow(3.0),
    )


def lumina2() -> df.Lumina2Pipeline:
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
        cap_feat_dim=parts.WIDTH,
    )
    return df.Lumina2Pipeline(
        tokenizer=parts.gemma_tokenizer(),
        text_encoder=parts.gemma(),
        transformer=transformer,
        vae=parts.vae(blocks=4, **parts.SHIFT),  # the pipeline takes a VAE that shrinks by 8 for granted
        scheduler=parts.dynamic_flow(),
    )


def hidream() -> df.HiDreamImagePipeline:
    """HiDream. It always paints 128 x 128 latents: hence large patches, and no attention in its VAE."""
    tokenizer = parts.clip_tokenizer(248)  # its texts are longer than those of other families
    transformer = df.HiDreamImageTransformer2DModel(
        patch_size=8,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        caption_channels=[parts.T5_WIDTH, parts.WIDTH],
        text_emb_dim=2 * parts.WIDTH,
        axes_dims_rope=(8, 4, 4),
        max_resolution=(128, 128),
        llama_layers=[0, 1],
    )
    return df.HiDreamImagePipeline(
        tokenizer=tokenizer,
        tokenizer_2=parts.clip_tokenizer(248),
        tokenizer_3=parts.t5_tokenizer(),
        tokenizer_4=parts.qwen_tokenizer(),
        text_encoder=parts.clip(tokenizer, projection=True),
        text_encoder_2=parts.clip(tokenizer, projection=True),
        text_encoder_3=parts.t5(),
        text_encoder_4=tf.LlamaForCausalLM(tf.LlamaConfig(**parts.decoder_size())),
        transformer=transformer,
        vae=parts.vae(**parts.SHIFT, mid_block_add_attention=False),
        scheduler=parts.flow(3.0),
    )


def wan() -> df.WanPipeline:
    """Wan, text to video."""
    transformer = df.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        text_dim=parts.T5_WIDTH,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
    )
    return df.WanPipeline(
        tokenizer=parts.t5_tokenizer(),
        text_encoder=parts.t5(tf.UMT5EncoderModel, tf.UMT5Config),
        transformer=transformer,
        vae=df.AutoencoderKLWan(base_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=parts.flow(3.0),
    )

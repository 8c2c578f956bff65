"""More tiny pipelines, whose calls differ from those of the documented families: for what the engine has to find out by trying."""

from typing import Any

import diffusers as df
import torch
import transformers as tf

from tests.zoo import EDIT, FILL, PLAIN, SIZE, TEXT, Specimen, families, parts, specimen


def _controlnet(unet: df.UNet2DConditionModel) -> df.ControlNetModel:
    return df.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))


def _with_controlnet(cls: type, components: dict[str, Any], nets: int = 1, **config: Any) -> df.DiffusionPipeline:
    """A pipeline of UNet components and one or several ControlNets."""
    made = [_controlnet(components["unet"]) for _ in range(nets)]
    pipe: df.DiffusionPipeline = cls(**components, controlnet=made if nets > 1 else made[0], **config)
    return pipe


def _sharing(cls: type, pipe: df.DiffusionPipeline) -> df.DiffusionPipeline:
    """A pipeline of another class over the components of one."""
    names = cls._get_signature_keys(cls)[0]
    made: df.DiffusionPipeline = cls(**{n: c for n, c in pipe.components.items() if n in names})
    return made


def kandinsky22_img2img() -> df.DiffusionPipeline:
    """Kandinsky 2.2 from image embeddings and a picture: it takes no prompt."""
    blocks = (
        ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    )
    unet = df.UNet2DConditionModel(
        in_channels=4,
        out_channels=8,  # a variance besides the noise
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        addition_embed_type="image",
        encoder_hid_dim=parts.WIDTH,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=parts.WIDTH,
        resnet_time_scale_shift="scale_shift",
        block_out_channels=(8, 16),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    movq = df.VQModel(
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=16,
        norm_num_groups=4,
        norm_type="spatial",
    )
    return df.KandinskyV22Img2ImgPipeline(unet=unet, scheduler=df.DDIMScheduler(clip_sample=False), movq=movq)


def stable_video() -> df.DiffusionPipeline:
    """Stable Video Diffusion: a video from a picture alone, under a guidance that grows with the frames."""
    size = {"block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 16}
    unet = df.UNetSpatioTemporalConditionModel(
        in_channels=8,
        out_channels=4,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        cross_attention_dim=parts.WIDTH,
        num_attention_heads=2,
        projection_class_embeddings_input_dim=3 * 4,
        addition_time_embed_dim=4,
        **size,
    )
    vae = df.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4, layers_per_block=1
    )
    vision = tf.CLIPVisionConfig(
        hidden_size=parts.WIDTH,
        intermediate_size=32,
        projection_dim=parts.WIDTH,
        image_size=224,  # to which the pipeline resizes
        patch_size=112,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return df.StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=tf.CLIPVisionModelWithProjection(vision),
        unet=unet,
        scheduler=df.EulerDiscreteScheduler(prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True,
                                            timestep_spacing="leading", sigma_min=0.002, sigma_max=700.0),
        feature_extractor=tf.CLIPImageProcessorPil(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}),
    )  # fmt: skip


def text_to_video() -> df.DiffusionPipeline:
    """ModelScope's text to video: a UNet of frames."""
    tokenizer = parts.clip_tokenizer()
    unet = df.UNet3DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
        up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
        cross_attention_dim=parts.WIDTH,
        attention_head_dim=4,
    )
    return df.TextToVideoSDPipeline(
        vae=parts.vae(), text_encoder=parts.clip(tokenizer), tokenizer=tokenizer, unet=unet, scheduler=parts.ddim()
    )


def _under(scheduler: Any) -> Any:
    return lambda: df.StableDiffusionPipeline(**families.sd15(scheduler))


def _guided(name: str, make: Any, **call: Any) -> Specimen:
    return specimen(name, make, guidance_scale=5.0, **call)


_EMBEDS = {"image_embeds": torch.ones(1, parts.WIDTH), "negative_image_embeds": torch.zeros(1, parts.WIDTH)}

MORE: dict[str, Specimen] = {
    s.name: s
    for s in (
        _guided("sd15_pag_inpaint", lambda: df.StableDiffusionPAGInpaintPipeline(**families.sd15(), pag_applied_layers="mid"), **FILL),
        _guided("sdxl_pag_img2img", lambda: df.StableDiffusionXLPAGImg2ImgPipeline(**families.sdxl(), pag_applied_layers="mid"), **EDIT),
        _guided(
            "sd3_pag_img2img",
            lambda: df.StableDiffusion3PAGImg2ImgPipeline(**families.sd3(), pag_applied_layers="blocks.0"),
            **TEXT | EDIT,
        ),
        _guided(
            "sd15_controlnet_pag",
            lambda: _with_controlnet(df.StableDiffusionControlNetPAGPipeline, families.sd15(), pag_applied_layers="mid"),
            image=parts.picture(),
            **SIZE,
        ),
        _guided(
            "sd15_controlnet_img2img",
            lambda: _with_controlnet(df.StableDiffusionControlNetImg2ImgPipeline, families.sd15()),
            control_image=parts.picture(),
            **SIZE | EDIT,
        ),
        _guided(
            "sd15_controlnet_inpaint",
            lambda: _with_controlnet(df.StableDiffusionControlNetInpaintPipeline, families.sd15()),
            control_image=parts.picture(),
            **FILL,
        ),
        _guided(
            "sd15_two_controlnets",
            lambda: _with_controlnet(df.StableDiffusionControlNetPipeline, families.sd15(), nets=2),
            image=[parts.picture(), parts.mask().convert("RGB")],
            **SIZE,
        ),
        _guided(
            "sdxl_controlnet_img2img",
            lambda: _with_controlnet(df.StableDiffusionXLControlNetImg2ImgPipeline, families.sdxl()),
            control_image=parts.picture(),
            **SIZE | EDIT,
        ),
        _guided("flux_control_img2img", lambda: df.FluxControlImg2ImgPipeline(**families.flux(channels=32)),
                control_image=parts.picture(), **TEXT | EDIT),
        _guided("flux_kontext_inpaint", lambda: df.FluxKontextInpaintPipeline(**families.flux()), max_area=32 * 32, _auto_resize=False, **TEXT | FILL),
        _guided("zimage_inpaint", lambda: _sharing(df.ZImageInpaintPipeline, families.zimage()), **TEXT | FILL),
        _guided("text_to_video", text_to_video, num_frames=4, **SIZE),
        specimen("kandinsky22_img2img", kandinsky22_img2img, guidance_scale=4.0, **SIZE | EDIT | _EMBEDS | {"prompt": None}),
        specimen("stable_video", stable_video, image=parts.picture(), num_frames=2, **SIZE | {"prompt": None}),
        _guided("sd15_heun", _under(df.HeunDiscreteScheduler(**parts.betas())), **SIZE),
        _guided("sd15_pndm", _under(df.PNDMScheduler(**parts.betas(), skip_prk_steps=True)), **SIZE),
        _guided("pixart_clipped", lambda: df.PixArtSigmaPipeline(**families.pixart(df.DDPMScheduler())), **PLAIN),
        _guided("sd15_tcd", _under(df.TCDScheduler(**parts.betas())), **SIZE),
        _guided("sd15_thresholding", _under(df.DDIMScheduler(**parts.betas(), thresholding=True)), **SIZE),
    )
}  # fmt: skip
"""Specimens by name.  A call whose prompt is None takes none."""

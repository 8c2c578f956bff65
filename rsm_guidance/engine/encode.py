"""Images to the latents that a pipeline's denoiser works on."""

import inspect

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rsm_guidance.core.contracts import UsageError


def encode_images(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    """Images to the latents the denoiser works on, scaled and packed (posterior mean).

    Args:
        pipe: whose autoencoder encodes.
        images: [B, 3, H, W] in [0, 1]; of video pipelines also [B, F, 3, H, W].

    Returns:
        Latents [B, ...], with a gradient where the images ask for one.

    Raises:
        UsageError: for images of another shape.
    """
    if images.ndim not in ((4, 5) if _is_video(pipe) else (4,)) or images.shape[-3] != 3:
        raise UsageError(f"images must be [B, 3, H, W]; got {list(images.shape)}")
    with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
        return _encode(pipe, images)


def _encode(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    vae, config = pipe.vae, pipe.vae.config
    dtype = vae.dtype
    if config.get("force_upcast") and dtype == torch.float16:  # SDXL's encoder overflows in half precision
        vae.to(torch.float32)
    pixels = (2 * images - 1).to(vae.device, vae.dtype)
    frames = bool(config.get("z_dim"))  # a video autoencoder: [B, 3, F, H, W]
    if frames:
        pixels = pixels.transpose(1, 2) if pixels.ndim == 5 else pixels.unsqueeze(2)
    encoded = vae.encode(pixels)
    if vae.dtype != dtype:
        vae.to(dtype)
    latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
    if frames and not _is_video(pipe):
        latents = latents.squeeze(2)
    return _packed(pipe, _scaled(pipe, latents.to(dtype)))


def _is_video(pipe: DiffusionPipeline) -> bool:
    return hasattr(pipe, "vae_scale_factor_temporal")


def _scaled(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Latents of the autoencoder in the denoiser's scale."""
    vae, config = pipe.vae, pipe.vae.config
    shape = (1, -1, *[1] * (latents.ndim - 2))
    if hasattr(pipe, "_patchify_latents") and hasattr(vae, "bn"):  # Flux 2: statistics of 2x2 patches
        latents = pipe._patchify_latents(latents)
        mean, variance = (t.view(shape).to(latents) for t in (vae.bn.running_mean, vae.bn.running_var))
        return (latents - mean) / torch.sqrt(variance + config.batch_norm_eps)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, deviation = (latents.new_tensor(config[n]).view(shape) for n in ("latents_mean", "latents_std"))
        return (latents - mean) / deviation * (config.get("scaling_factor") or 1.0)
    return (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor


def _packed(pipe: DiffusionPipeline, latents: Tensor) -> Tensor:
    """Latents as tokens, for families that pack them."""
    if not hasattr(pipe, "_pack_latents"):
        return latents
    if len(inspect.signature(pipe._pack_latents).parameters) == 1:  # patches already
        return pipe._pack_latents(latents)
    return pipe._pack_latents(latents, *latents.shape)

"""Images to the latents that a pipeline's denoiser works on."""

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rsm_guidance.core.contracts import UsageError


def encode_images(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] to the latents the denoiser works on, scaled and packed (posterior mean).

    The result has a gradient where the images ask for one.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise UsageError(f"images must be [B, 3, H, W]; got {list(images.shape)}")
    with torch.set_grad_enabled(torch.is_grad_enabled() and images.requires_grad):
        return _encode(pipe, images)


def _encode(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    vae, config = pipe.vae, pipe.vae.config
    dtype = vae.dtype
    if config.get("force_upcast") and dtype == torch.float16:  # SDXL's encoder overflows in half precision
        vae.to(torch.float32)
    pixels = (2 * images - 1).to(vae.device, vae.dtype)
    encoded = vae.encode(pixels.unsqueeze(2) if config.get("z_dim") else pixels)  # z_dim: a video autoencoder
    if vae.dtype != dtype:
        vae.to(dtype)
    latents = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
    latents = (latents.squeeze(2) if config.get("z_dim") else latents).to(dtype)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (latents.new_tensor(config[n]).view(1, -1, 1, 1) for n in ("latents_mean", "latents_std"))
        latents = (latents - mean) / std * (config.get("scaling_factor") or 1.0)
    else:
        latents = (latents - (config.get("shift_factor") or 0.0)) * config.scaling_factor
    if hasattr(pipe, "_pack_latents"):  # into 2x2 patches
        latents = pipe._pack_latents(latents, *latents.shape)
    return latents

"""Trains the autoencoder of the embedded shapes model: 64x64 RGB to 16x16x4 latents, L1 + MSE + a small KL."""

import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.nn import functional as F
from tqdm.auto import tqdm

from rsm_guidance.shapes.render import render_spec
from rsm_guidance.shapes.scenes import CATEGORIES, random_caption
from rsm_guidance.training.checkpoint import load_state, save_state, warmup_cosine


@dataclass(frozen=True)
class VAEConfig:
    """Autoencoder training: `steps` updates of `batch_size` renders at a peak learning rate `lr` (cosine to 0)."""

    steps: int = 1000
    batch_size: int = 24
    lr: float = 2e-3
    kl_weight: float = 1e-5
    seed: int = 0
    save_every: int = 200


def render_batch(captions: list, rng: random.Random) -> torch.Tensor:
    """Render captions to [B, 3, 64, 64] in [-1, 1]."""
    images = np.stack([render_spec(c.spec, rng) for c in captions])
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def build_vae() -> AutoencoderKL:
    """An untrained AutoencoderKL of 0.65 M parameters, downsampling four times."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def train_vae(config: VAEConfig, folder: Path) -> AutoencoderKL:
    """Train (or resume) the autoencoder under `folder` and return it with its latent shift and scale measured."""
    torch.manual_seed(config.seed)
    vae = build_vae()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.lr, betas=(0.9, 0.99), weight_decay=1e-4)
    state = load_state(folder / "vae_state", {"vae": vae}, optimizer)
    first = int(state["step"]) if state else 0  # type: ignore[call-overload]
    start = time.perf_counter()
    bar = tqdm(range(first, config.steps), desc="autoencoder", initial=first, total=config.steps)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * warmup_cosine(step, config.steps)
        rng = random.Random(f"vae|{config.seed}|{step}")
        images = render_batch([random_caption(rng.choice(CATEGORIES), rng) for _ in range(config.batch_size)], rng)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
            latents = posterior.mean.float() + posterior.std.float() * noise
            decoded = vae.decode(latents).sample.float()
        kl = posterior.kl().float().mean()
        loss = F.l1_loss(decoded, images) + F.mse_loss(decoded, images) + config.kl_weight * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 20 == 0:
            psnr = -10 * torch.log10(F.mse_loss(decoded.clamp(-1, 1), images) / 4).item()
            bar.set_postfix(loss=f"{loss.item():.4f}", psnr=f"{psnr:.1f}", seconds=f"{time.perf_counter() - start:.0f}")
        if (step + 1) % config.save_every == 0:
            save_state(folder / "vae_state", step + 1, {"vae": vae}, optimizer, {})
    with torch.no_grad():
        rng = random.Random("vae|statistics")
        images = render_batch([random_caption(rng.choice(CATEGORIES), rng) for _ in range(512)], rng)
        latents = torch.cat([vae.encode(b).latent_dist.mean for b in images.split(64)])
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    return vae.eval()

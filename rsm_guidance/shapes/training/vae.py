"""Trains the autoencoder of the embedded shapes model: 64x64 RGB to 16x16x4 latents, L1 + MSE + a small KL."""

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from rsm_guidance.shapes.render import render_spec
from rsm_guidance.shapes.scenes import CATEGORIES, random_caption
from rsm_guidance.shapes.training.config import VAEConfig
from rsm_guidance.training import Batches, LoopConfig, adamw, cosine, fit

_MEASURED = 512  # images of which shift and scale are measured


@dataclass(frozen=True)
class RenderedScenes(Dataset[Tensor]):
    """Images [3, 64, 64] in [-1, 1] of random captions, each named by (name, number)."""

    name: str
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Tensor:
        rng = random.Random(f"{self.name}|{number}")
        image = render_spec(random_caption(rng.choice(CATEGORIES), rng).spec, rng)
        return torch.tensor(image).permute(2, 0, 1).float() / 127.5 - 1


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


class Reconstruction(nn.Module):
    """The objective: images [B, 3, 64, 64] in [-1, 1] to the losses of their reconstruction, and its PSNR."""

    def __init__(self, vae: AutoencoderKL, config: VAEConfig) -> None:
        super().__init__()
        self.vae, self.config = vae, config

    def forward(self, images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        images = images.to(self.vae.device)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.config.autocast):
            posterior = self.vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(images)
            latents = posterior.mean.float() + posterior.std.float() * noise
            decoded = self.vae.decode(latents).sample.float()
        error = F.l1_loss(decoded, images) + F.mse_loss(decoded, images)
        loss = error + self.config.kl_weight * posterior.kl().float().mean()
        return {"loss": loss, "psnr": -10 * torch.log10(F.mse_loss(decoded.detach().clamp(-1, 1), images) / 4)}


def train_vae(config: VAEConfig, folder: Path) -> AutoencoderKL:
    """Train (or resume) the autoencoder under `folder` and return it with its latent shift and scale measured."""
    torch.manual_seed(config.seed)
    vae = build_vae()
    optimizer = adamw([(vae, config.lr)], 1e-4, (0.9, 0.99))
    images = RenderedScenes(f"vae|{config.seed}", config.steps * config.batch_size)
    fit(
        Reconstruction(vae, config),
        optimizer,
        cosine(optimizer, config.steps),
        Batches(images, config.batch_size, config.seed),
        LoopConfig("autoencoder", config.steps, config.save_every, config.seed),
        folder / "vae_state",
    )
    return measured(vae).eval()


@torch.no_grad()
def measured(vae: AutoencoderKL) -> AutoencoderKL:
    """The same autoencoder, with the shift and scale by which its latents are standardised in its configuration."""
    scenes = RenderedScenes("vae|statistics", _MEASURED)
    images = torch.stack([scenes[number] for number in range(_MEASURED)]).to(vae.device)
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(64)])
    vae.register_to_config(
        shift_factor=round(latents.mean().item(), 4), scaling_factor=round(1 / latents.std().item(), 4)
    )
    return vae

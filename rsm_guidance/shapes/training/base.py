"""Trains the denoiser and the text encoders of the embedded shapes model from scratch.

Rectified flow (Esser et al. 2024, arXiv 2403.03206): x_t = (1-t) x0 + t eps, target eps - x0, logit-normal t.  Beside
it, tokens of a middle block predict the object they belong to (`training.objects`).  At the noisy levels only the
caption tells, so there it asks the model to read relations and counts.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from diffusers.training_utils import compute_density_for_timestep_sampling
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from rsm_guidance.core.rows import per_row
from rsm_guidance.io.files import recover_folder, replace_folder, write_json
from rsm_guidance.shapes import model as parts
from rsm_guidance.shapes.render import place, render
from rsm_guidance.shapes.scenes import CATEGORIES, Caption, SceneSpec, is_held_out, random_caption, wordings
from rsm_guidance.shapes.training.config import BaseConfig, VAEConfig
from rsm_guidance.shapes.training.objects import ObjectHead, token_labels
from rsm_guidance.shapes.training.vae import train_vae
from rsm_guidance.training import Batches, LoopConfig, adamw, cosine_cycles, fit

_WEIGHTS = (0.03, 0.04, 0.14, 0.29, 0.38, 0.12)  # of CATEGORIES: the hard ones more often


@dataclass
class Scenes:
    """Rendered training data: specifications, scaled latents [N, 4, 16, 16] (half), token labels [N, 64, 4] (half)."""

    specs: list[SceneSpec]
    latents: Tensor
    labels: Tensor


@torch.no_grad()
def render_scenes(vae: AutoencoderKL, count: int, seed: int) -> Scenes:
    """Render and encode `count` scenes of the training split."""
    rng = random.Random(f"base|{seed}")
    specs, latents, labels, images = [], [], [], []
    for index in tqdm(range(count), desc="rendering scenes"):
        spec = random_caption(rng.choices(CATEGORIES, _WEIGHTS)[0], rng).spec
        objects = place(spec, rng)
        specs.append(spec)
        labels.append(token_labels(objects).astype(np.float16))
        images.append(render(objects))
        if len(images) == 128 or index == count - 1:
            batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
            mean = vae.encode(batch.to(vae.device)).latent_dist.mean
            latents.append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).half().cpu())
            images = []
    return Scenes(specs, torch.cat(latents), torch.from_numpy(np.stack(labels)))


class Denoising(nn.Module):
    """The objective, and all that learns: denoiser, two text encoders, and the auxiliary head that is thrown away.

    It is called with numbers [B] of scenes.
    """

    def __init__(self, scenes: Scenes, config: BaseConfig) -> None:
        super().__init__()
        self.scenes, self.config = scenes, config
        self.tokenizer = parts.build_tokenizer()
        self.transformer = parts.build_transformer()
        self.text = nn.ModuleList([parts.build_text_encoder(self.tokenizer, i) for i in (0, 1)])
        self.aux = ObjectHead(128)
        self._middle: Tensor | None = None
        self.transformer.transformer_blocks[2].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: object, output: tuple[Tensor, Tensor]) -> None:
        self._middle = output[1]

    def encode(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Captions -> token embeddings [B, 16, 160] and pooled embeddings [B, 80], as the SD3 pipeline makes them."""
        ids = self.tokenizer(
            captions, padding="max_length", max_length=parts.TOKENS, truncation=True, return_tensors="pt"
        ).input_ids.to(self.transformer.device)
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self.text]
        tokens = torch.cat([o.hidden_states[-2] for o in outputs], -1)
        return tokens, torch.cat([o.text_embeds for o in outputs], -1)

    def forward(self, rows: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Losses of a batch: "flow" (flow matching) and "aux" (which object a token belongs to)."""
        rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
        zero_tokens = 1
        if rng.random() < self.config.zero_tokens:  # four times as many tokens, on a quarter of the batch
            zero_tokens, rows = 256, rows[: max(1, len(rows) // 4)]
        captions = [_wording(self.scenes.specs[row], rng, self.config.drop_caption) for row in rows.tolist()]
        x0 = self.scenes.latents[rows].float()
        t = compute_density_for_timestep_sampling("logit_normal", len(x0), 0.4, 1.1, generator=generator)
        eps = torch.randn(x0.shape, generator=generator)
        x0, t, eps = (tensor.to(self.transformer.device) for tensor in (x0, t, eps))
        tokens, pooled = self.encode(captions)
        noisy = torch.lerp(x0, eps, per_row(t, x0))
        v = self.transformer(noisy, F.pad(tokens, (0, 0, 0, zero_tokens)), pooled, t * 1000, return_dict=False)[0]
        assert self._middle is not None
        flow, aux = F.mse_loss(v, eps - x0), self.aux.loss(self._middle, self.scenes.labels[rows].to(v.device))
        return {"loss": flow + self.config.aux_weight * aux, "flow": flow, "aux": aux}


def train_base(config: BaseConfig, vae: AutoencoderKL, folder: Path) -> StableDiffusion3Pipeline:
    """Train (or resume) under `folder` and return the finished pipeline with averaged weights."""
    scenes = render_scenes(vae, config.scenes, config.seed)
    torch.manual_seed(config.seed)
    objective = Denoising(scenes, config)
    optimizer = adamw([(objective, config.lr)], 0.01, (0.9, 0.98))
    fit(
        objective,
        optimizer,
        cosine_cycles(optimizer, config.steps, config.restarts, config.restart_lr),
        Batches(range(len(scenes.specs)), config.batch_size, config.seed),
        LoopConfig("denoiser", config.steps, config.save_every, config.seed, config.ema_decay),
        folder / "base_state",
    )
    return assemble(objective, vae)


def train_shapes_model(vae_config: VAEConfig, config: BaseConfig, out: Path) -> str:
    """Train (or resume) autoencoder and denoiser under `out`; returns the folder of the finished pipeline (half)."""
    finished = out / "vae"
    if recover_folder(finished):
        vae = AutoencoderKL.from_pretrained(finished)
    else:
        vae = train_vae(vae_config, out)
        replace_folder(finished, vae.save_pretrained)
    pipe = train_base(config, vae, out)
    return save_half(pipe, out / "model")


def save_half(pipe: StableDiffusion3Pipeline, folder: Path) -> str:
    """Write a pipeline in half precision, in stock layout; the folder appears whole or not at all."""
    pipe.to(dtype=torch.float16)
    replace_folder(folder, lambda partial: _save_unnamed(pipe, partial))
    return str(folder)


def _save_unnamed(pipe: StableDiffusion3Pipeline, folder: Path) -> None:
    pipe.save_pretrained(folder)
    for path in folder.rglob("*.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings.pop("_name_or_path", None)  # the path on the training machine
        if settings.get("dtype") == "float16":
            settings["dtype"] = "float32"  # transformers loads in this dtype, diffusers in float32: let them agree
        write_json(path, settings)


def _wording(spec: SceneSpec, rng: random.Random, drop: float) -> str:
    if rng.random() < drop:
        return ""
    ways = [w for w in wordings(spec) if not is_held_out(Caption(w, spec))]
    return rng.choice(ways)


def assemble(trained: Denoising, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Put the trained parts into a stock pipeline."""
    return StableDiffusion3Pipeline(
        transformer=trained.transformer.eval(),
        scheduler=parts.build_scheduler(),
        vae=vae.eval(),
        text_encoder=trained.text[0].eval(),
        tokenizer=trained.tokenizer,
        text_encoder_2=trained.text[1].eval(),
        tokenizer_2=trained.tokenizer,
        text_encoder_3=parts.build_absent_text_encoder(),
        tokenizer_3=trained.tokenizer,
    )

"""Trains the denoiser and the text encoders of the embedded shapes model from scratch.

Rectified flow (Esser et al. 2024, arXiv 2403.03206): x_t = (1-t) x0 + t eps, target eps - x0, logit-normal t.  Beside
it, tokens of a middle block predict the object they belong to (`training.objects`).  At the noisy levels only the
caption tells, so there it asks the model to read relations and counts.
"""

import json
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from torch import nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from rsm_guidance.shapes import model as parts
from rsm_guidance.shapes.render import place, render
from rsm_guidance.shapes.scenes import (
    CATEGORIES,
    Caption,
    SceneSpec,
    is_held_out,
    random_caption,
    wordings,
)
from rsm_guidance.training.checkpoint import Ema, load_state, save_state, warmup_cosine
from rsm_guidance.shapes.training.objects import ObjectHead, token_labels
from rsm_guidance.shapes.training.vae import VAEConfig, train_vae

_WEIGHTS = (0.03, 0.04, 0.14, 0.29, 0.38, 0.12)  # of CATEGORIES: the hard ones more often


@dataclass(frozen=True)
class BaseConfig:
    """Base-model training: `steps` updates of `batch_size` scenes out of `scenes` rendered once.

    The learning rate warms up to `lr` and falls along a half cosine to 0 at the first step of `restarts`; from there, and
    from each later one, another such cycle follows with `restart_lr` times the peak.  `aux_weight` scales the per-token object prediction;
    `drop_caption` is the share of empty captions (classifier-free guidance); `zero_tokens` is the share of steps, with
    a quarter of the batch, trained with the 256 zero tokens that stock SD3 puts for a missing third text encoder.
    """

    steps: int = 10_800
    restarts: tuple[int, ...] = (4000, 6600)
    restart_lr: float = 0.7
    batch_size: int = 64
    scenes: int = 48_000
    lr: float = 2e-3
    aux_weight: float = 0.3
    drop_caption: float = 0.1
    zero_tokens: float = 0.06
    ema_decay: float = 0.998
    seed: int = 0
    save_every: int = 500


@dataclass
class Scenes:
    """Rendered training data: demands, scaled latents [N, 4, 16, 16] (half), token labels [N, 64, 4] (half)."""

    specs: list[SceneSpec]
    latents: torch.Tensor
    labels: torch.Tensor


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
            mean = vae.encode(batch).latent_dist.mean
            latents.append(((mean - vae.config.shift_factor) * vae.config.scaling_factor).half())
            images = []
    return Scenes(specs, torch.cat(latents), torch.from_numpy(np.stack(labels)))


class Trainee(nn.Module):
    """Everything that learns: denoiser, two text encoders, and the auxiliary head that is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = parts.build_tokenizer()
        self.transformer = parts.build_transformer()
        self.text = nn.ModuleList([parts.build_text_encoder(self.tokenizer, i) for i in (0, 1)])
        self.aux = ObjectHead(128)
        self._middle: torch.Tensor | None = None
        self.transformer.transformer_blocks[2].register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, args: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        self._middle = output[1]

    def encode(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Captions -> token embeddings [B, 16, 160] and pooled embeddings [B, 80], as the SD3 pipeline makes them."""
        ids = self.tokenizer(
            captions, padding="max_length", max_length=parts.TOKENS, truncation=True, return_tensors="pt"
        ).input_ids
        outputs = [encoder(ids, output_hidden_states=True) for encoder in self.text]
        tokens = torch.cat([o.hidden_states[-2] for o in outputs], -1)
        return tokens, torch.cat([o.text_embeds for o in outputs], -1)

    def losses(
        self, x0: torch.Tensor, labels: torch.Tensor, captions: list[str], zero_tokens: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Flow-matching loss and auxiliary loss, both scalars."""
        t = torch.sigmoid(0.4 + 1.1 * torch.randn(len(x0), generator=generator))
        eps = torch.randn(x0.shape, generator=generator)
        tt = t[:, None, None, None]
        tokens, pooled = self.encode(captions)
        tokens = F.pad(tokens, (0, 0, 0, zero_tokens))
        v = self.transformer((1 - tt) * x0 + tt * eps, tokens, pooled, t * 1000, return_dict=False)[0]
        flow = F.mse_loss(v, eps - x0)
        assert self._middle is not None
        return flow, self.aux.loss(self._middle, labels)


def learning_rate(config: BaseConfig, step: int) -> float:
    """The half-cosine cycles of the configuration, at a step."""
    starts = [0, *(r for r in config.restarts if r < config.steps)]
    cycle = max(i for i, start in enumerate(starts) if step >= start)
    length = (*starts[1:], config.steps)[cycle] - starts[cycle]
    peak = config.lr * (config.restart_lr if cycle else 1)
    return peak * warmup_cosine(step - starts[cycle], length, 0.03)


def train_base(config: BaseConfig, vae: AutoencoderKL, folder: Path) -> StableDiffusion3Pipeline:
    """Train (or resume) under `folder` and return the finished pipeline with averaged weights."""
    torch.manual_seed(config.seed)
    trainee = Trainee()
    decayed = [p for p in trainee.parameters() if p.ndim >= 2]
    plain = [p for p in trainee.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}], betas=(0.9, 0.98)
    )
    ema = Ema([trainee], config.ema_decay)
    state = load_state(folder / "base_state", {"trainee": trainee, "ema": ema.shadow}, optimizer)
    first = int(state["step"]) if state else 0  # type: ignore[call-overload]
    scenes = render_scenes(vae, config.scenes, config.seed)
    running = 0.0
    bar = tqdm(range(first, config.steps), desc="denoiser", initial=first, total=config.steps, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        rng = random.Random(f"base|{config.seed}|{step}")
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        long = rng.random() < config.zero_tokens
        rows = torch.randint(len(scenes.specs), (config.batch_size // (4 if long else 1),), generator=generator)
        captions = [_wording(scenes.specs[i], rng, config.drop_caption) for i in rows.tolist()]
        flow, aux = trainee.losses(
            scenes.latents[rows].float(), scenes.labels[rows].float(), captions, 256 if long else 1, generator
        )
        optimizer.zero_grad()
        (flow + config.aux_weight * aux).backward()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        ema.update(step)
        running += 0.02 * (flow.item() - running)
        if step % 20 == 0:
            bar.set_postfix(flow=f"{running / (1 - 0.98 ** (step - first + 1)):.4f}", aux=f"{aux.item():.3f}")
        if (step + 1) % config.save_every == 0:
            save_state(folder / "base_state", step + 1, {"trainee": trainee, "ema": ema.shadow}, optimizer, {})
    ema.swap()
    return assemble(trainee, vae)


def train_shapes_model(vae_config: VAEConfig, config: BaseConfig, out: Path) -> str:
    """Train (or resume) autoencoder and denoiser under `out`; returns the folder of the finished pipeline (half)."""
    finished = out / "vae"
    vae = AutoencoderKL.from_pretrained(finished) if finished.exists() else train_vae(vae_config, out)
    if not finished.exists():
        vae.save_pretrained(finished)
    pipe = train_base(config, vae, out)
    return save_half(pipe, out / "model")


def save_half(pipe: StableDiffusion3Pipeline, folder: Path) -> str:
    """Write a pipeline in half precision, in stock layout; the folder appears whole or not at all."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    pipe.to(dtype=torch.float16).save_pretrained(partial)
    for path in partial.rglob("*.json"):
        settings = json.loads(path.read_text())
        settings.pop("_name_or_path", None)  # where it was trained concerns nobody
        if settings.get("dtype") == "float16":
            settings["dtype"] = "float32"  # transformers loads in this dtype, diffusers in float32: let them agree
        path.write_text(json.dumps(settings, indent=2) + "\n")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(partial, folder)
    return str(folder)


def _wording(spec: SceneSpec, rng: random.Random, drop: float) -> str:
    if rng.random() < drop:
        return ""
    ways = [w for w in wordings(spec) if not is_held_out(Caption(w, spec))]
    return rng.choice(ways)


def assemble(trainee: Trainee, vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    """Put the trained parts into a stock pipeline."""
    return StableDiffusion3Pipeline(
        transformer=trainee.transformer.eval(),
        scheduler=parts.build_scheduler(),
        vae=vae.eval(),
        text_encoder=trainee.text[0].eval(),
        tokenizer=trainee.tokenizer,
        text_encoder_2=trainee.text[1].eval(),
        tokenizer_2=trainee.tokenizer,
        text_encoder_3=parts.build_absent_text_encoder(),
        tokenizer_3=trainee.tokenizer,
    )

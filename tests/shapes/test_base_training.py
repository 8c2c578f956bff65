"""Training of the embedded model from scratch, tiny and end to end."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from rsm_guidance.core.random import generator_of
from rsm_guidance.shapes.training import base as training
from rsm_guidance.shapes.training.base import BaseConfig, Denoising, render_scenes, train_shapes_model
from rsm_guidance.shapes.training.vae import Reconstruction, RenderedScenes, VAEConfig, build_vae, train_vae
from rsm_guidance.training import adamw

VAE = VAEConfig(steps=3, batch_size=2, save_every=2, autocast=False)
BASE = BaseConfig(steps=4, restarts=(2,), batch_size=4, scenes=6, save_every=2)


@pytest.mark.parametrize("zero_tokens", [0.0, 1.0])
def test_every_tensor_of_the_base_model_moves(stock: StableDiffusion3Pipeline, zero_tokens: float) -> None:
    objective = Denoising(render_scenes(stock.vae, 6, 0), BaseConfig(zero_tokens=zero_tokens))
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    optimizer = adamw([(objective, 1e-3)], 0.0)
    for step in range(2):
        optimizer.zero_grad()
        losses = objective(torch.arange(6), generator_of("step", step))
        losses["loss"].backward()
        optimizer.step()
    assert losses["loss"].item() == pytest.approx(losses["flow"].item() + 0.3 * losses["aux"].item(), rel=1e-5)
    still = [name for name, p in objective.named_parameters() if torch.equal(p, before[name])]
    # the last block's text queries are computed together with the image's, and their attention is thrown away
    assert all("blocks.5.attn.add_q_proj" in name or "blocks.5.attn.norm_added_q" in name for name in still)


def test_every_tensor_of_the_autoencoder_moves_and_it_learns() -> None:
    torch.manual_seed(0)
    objective = Reconstruction(build_vae(), VAE)
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    scenes = RenderedScenes("test", 4)
    images = torch.stack([scenes[i] for i in range(4)])
    assert images.min() >= -1 and images.max() <= 1
    optimizer = adamw([(objective, 2e-3)], 0.0)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        losses.append(objective(images, generator_of("step", step))["loss"])
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert [name for name, p in objective.named_parameters() if torch.equal(p, before[name])] == []


def test_the_finished_autoencoder_standardises_its_latents(tmp_path: Path) -> None:
    vae = train_vae(VAE, tmp_path)
    scenes = RenderedScenes("other", 64)
    with torch.no_grad():
        mean = vae.encode(torch.stack([scenes[i] for i in range(64)])).latent_dist.mean
    latents = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    assert latents.mean().item() == pytest.approx(0, abs=0.15) and latents.std().item() == pytest.approx(1, rel=0.15)


@pytest.mark.slow
def test_training_from_scratch_resumes_and_gives_a_stock_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train_shapes_model(VAE, BASE, tmp_path / "whole")

    def crash(*args: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(training, "assemble", crash)
    with pytest.raises(RuntimeError, match="out of memory"):
        train_shapes_model(VAE, BASE, tmp_path / "parts")
    monkeypatch.undo()
    monkeypatch.setattr(training, "train_vae", crash)  # it is done
    parts = train_shapes_model(VAE, BASE, tmp_path / "parts")
    assert (Path(whole) / "transformer/diffusion_pytorch_model.safetensors").read_bytes() == (
        Path(parts) / "transformer/diffusion_pytorch_model.safetensors"
    ).read_bytes()
    pipe = StableDiffusion3Pipeline.from_pretrained(whole)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=2).images[0].size == (64, 64)
    index = json.loads((Path(whole) / "model_index.json").read_text())
    assert "_name_or_path" not in index and index["_class_name"] == "StableDiffusion3Pipeline"

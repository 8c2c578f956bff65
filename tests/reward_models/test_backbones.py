"""Reward models over every supported denoiser: what it is called with, where it stops, gradients, saving."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rsm_guidance as rg
from rsm_guidance.core.transitions import Transition
from rsm_guidance.engine import PipelineDenoiser, encode_images
from rsm_guidance.reward_models.backbones import denoiser_of
from tests.zoo import ZOO

NAMES = ["sd15", "sd15_lcm", "sdxl", "sd3", "flux", "flux_schnell", "pixart_alpha", "pixart_sigma", "sana", "qwenimage",
         "zimage"]  # fmt: skip
PROMPTS = ["a cat", "a red dog on a tree"]
PLAIN = {"guidance_scale": 1.0, "true_cfg_scale": 1.0}


def call(name: str, **extra: Any) -> dict[str, Any]:
    """A call of the zoo for both prompts, without classifier-free guidance where that can be had."""
    base = ZOO[name].call()
    for unlike_the_models in ("negative_prompt", "max_sequence_length", "complex_human_instruction"):
        base.pop(unlike_the_models, None)
    plain = {k: 0.0 if name == "zimage" else v for k, v in PLAIN.items() if k in base and "flux" not in name}
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    return base | plain | {"prompt": list(PROMPTS), "generator": generators} | extra


def build(name: str, **options: Any) -> tuple[Any, rg.DiffusionRewardModel]:
    pipe = ZOO[name].build()
    drm = rg.DiffusionRewardModel.from_pipeline(pipe, backbone="nobody/nothing", **options)
    return pipe, drm


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_it_sees_what_the_stock_denoiser_sees(name: str) -> None:
    """At a level of the stock loop, the last tapped block has the same output in both."""
    pipe, drm = build(name, adaptation="full")
    denoiser, [tap] = denoiser_of(pipe), drm.trunk.taps
    stock: list[Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        stock.append(output[-1] if isinstance(output, tuple) else output)

    with closing(PipelineDenoiser(pipe, call(name))) as engine:
        x, level = engine.initial(), 1
        handle = denoiser.get_submodule(tap).register_forward_hook(keep)
        engine.predict(x, level)
        handle.remove()
        seen: list[Tensor] = []
        handle = drm.trunk.module.get_submodule(tap).register_forward_hook(
            lambda module, inputs, output: seen.append(output[-1] if isinstance(output, tuple) else output)
        )
        scores = drm.score(x, level, PROMPTS, engine.schedule, engine.token_grid)
        handle.remove()
    assert scores.shape == (2,) and scores.isfinite().all()
    assert torch.allclose(seen[0], stock[-1], atol=1e-4, rtol=1e-3), (seen[0] - stock[-1]).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_blocks_above_the_last_tap_do_not_run(name: str) -> None:
    pipe, shared = build(name, adaptation="frozen", blocks=None if name.startswith("sd15") or name == "sdxl" else 1)
    denoiser = denoiser_of(pipe)
    after = denoiser.conv_out if hasattr(denoiser, "conv_out") else getattr(denoiser, "proj_out", None)
    ran: list[int] = []
    if after is not None:
        after.register_forward_hook(lambda *_: ran.append(1))
    with closing(PipelineDenoiser(pipe, call(name))) as engine:
        x = engine.initial()
    shared.score(x, 500.0, PROMPTS)
    assert not ran and 0 < shared.depth_share <= 1
    full = rg.DiffusionRewardModel.from_pipeline(pipe, backbone="x/y", adaptation="full")
    assert sum(p.numel() for p in full.trunk.parameters()) < sum(p.numel() for p in denoiser.parameters())
    assert all(p.requires_grad for p in full.trunk.parameters())
    assert not list(shared.trunk.parameters()), "a frozen model owns nothing of the pipeline"


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_prompts_and_levels_matter(name: str) -> None:
    pipe, drm = build(name, adaptation="full")
    with torch.no_grad(), closing(PipelineDenoiser(pipe, call(name))) as engine:
        x = engine.initial()
    x = x.detach().requires_grad_()
    drm.score(x, 500.0, PROMPTS).sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0
    with torch.no_grad():
        score = drm.score(x, 500.0, PROMPTS)
        assert not torch.allclose(score, drm.score(x, 500.0, PROMPTS[::-1]), atol=1e-7)
        assert not torch.allclose(score, drm.score(x, torch.tensor([100.0, 900.0]), PROMPTS), atol=1e-7)
        alone = drm.score(x[1:], 500.0, PROMPTS[1:])
        assert torch.allclose(score[1:], alone, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux"])
@pytest.mark.parametrize("adaptation", ["frozen", "lora", "full"])
def test_saving_and_loading(name: str, adaptation: Any, tmp_path: Path) -> None:
    pipe, drm = build(name, adaptation=adaptation)
    for tensor in drm._own_tensors().values():
        tensor.copy_(tensor.half())  # what a checkpoint keeps
    with closing(PipelineDenoiser(pipe, call(name))) as engine:
        x = engine.initial()
    drm.save_pretrained(tmp_path)
    again = rg.DiffusionRewardModel.from_pretrained(str(tmp_path), pipe=pipe)
    assert torch.equal(again.score(x, 300.0, PROMPTS), drm.score(x, 300.0, PROMPTS))


@torch.no_grad()
def test_named_taps_of_a_unet() -> None:
    pipe = ZOO["sdxl"].build()
    drm = rg.DiffusionRewardModel.from_pipeline(pipe, taps=("mid_block", "up_blocks.0"), backbone="x/y")
    with closing(PipelineDenoiser(pipe, call("sdxl"))) as engine:
        assert drm.score(engine.initial(), 0, PROMPTS, engine.schedule).isfinite().all()
    for taps, words in ((("up_blocks.9",), "kept blocks are"), (("down_blocks.0",), "only the middle and upper")):
        with pytest.raises(ValueError, match=words):
            rg.DiffusionRewardModel.from_pipeline(pipe, taps=taps)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "sana", "pixart_sigma", "qwenimage", "zimage"])
def test_it_guides_its_family(name: str) -> None:
    pipe, drm = build(name)
    guided = rg.reward_guided(type(pipe)).from_pipe(pipe)
    guided.set_progress_bar_config(disable=True)
    plain = guided(**ZOO[name].call(), seed=0, sampler="none", reward=drm)
    assert guided(**ZOO[name].call(), seed=0, sampler=rg.BestOfN(3), reward=drm).rewards[0] >= plain.rewards[0]
    stepwise = rg.StepwiseSampling(candidates=4, transition=Transition("ddim", 1.0))
    out = guided(**ZOO[name].call(), seed=0, sampler=stepwise, reward=drm)
    for level in out.trace["levels"]:
        scores, [chosen] = torch.tensor(level["scores"][0]), level["chosen"]
        assert scores.argmax() == chosen and len(set(scores.tolist())) > 1
    assert len(out.trace["levels"]) == len(out.trace["sigma"]) - 2


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_images_are_encoded_as_the_family_decodes_them(name: str) -> None:
    pipe = ZOO[name].build()
    with closing(PipelineDenoiser(pipe, call(name))) as engine:
        x = engine.initial()
        side = engine.decode(x).shape[-1]
        images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        latents = encode_images(pipe, images)
        assert latents.shape == x.shape
        pixels = 2 * images - 1
        encoded = pipe.vae.encode(pixels.unsqueeze(2) if name == "qwenimage" else pixels)
        plain = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        decoded = pipe.vae.decode(plain).sample
        decoded = (decoded.squeeze(2) if name == "qwenimage" else decoded) / 2 + 0.5
        assert torch.allclose(engine.decode(latents), decoded.clamp(0, 1), atol=1e-4), "scaled and packed, and back"


def test_other_latents_and_denoisers_are_refused() -> None:
    _, drm = build("sd15")
    with pytest.raises(ValueError, match="another latent space"):
        drm.score(torch.zeros(1, 16, 8, 8), 0.0, ["a"])
    with pytest.raises(ValueError, match="1 prompts need 1 latents"):
        drm.score(torch.zeros(2, 4, 8, 8), 0.0, ["a"])
    with pytest.raises(ValueError, match="reward model can be built on .*WanTransformer3DModel"):
        build("wan")
    _, flux = build("flux")
    with pytest.raises(ValueError, match=r"pass grid=\(rows, columns\)"):
        flux.score(torch.zeros(1, 6, 16), 0.0, ["a"])

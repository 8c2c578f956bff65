"""Reward models over every family that replays: what the trunk sees, where it stops, gradients, saving."""

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.engine import PipelineDenoiser, encode_images
from rsm_guidance.reward_models import DiffusionRewardModel
from rsm_guidance.reward_models.backbone import denoiser_of
from rsm_guidance.reward_models.blocks import block_names
from tests.zoo import ZOO

PROMPTS = ["a cat", "a red dog on a tree"]
PLAIN = {"guidance_scale": 1.0, "true_cfg_scale": 1.0}
SHOWN_IMAGES = ["sd15_inpaint9", "sd15_controlnet", "sd15_ip_adapter", "flux_kontext", "flux_fill", "qwenimage_edit"]
"""Families whose stock call also conditions the denoiser on the user's image, of which a reward model knows nothing."""
NAMES = [name for name in ZOO if name not in SHOWN_IMAGES and "inpaint" not in name]
SOME = ["sd15", "sdxl", "sd3", "flux", "chroma", "zimage", "lumina2", "wan"]


def call(name: str, **extra: Any) -> dict[str, Any]:
    """A call of the zoo for both prompts, without classifier-free guidance where that can be had."""
    base = ZOO[name].call()
    for unlike_the_models in ("negative_prompt", "max_sequence_length", "complex_human_instruction", "system_prompt"):
        base.pop(unlike_the_models, None)
    embedded = "flux" in name and name != "flux2_klein"
    plain = {k: 0.0 if name == "zimage" else v for k, v in PLAIN.items() if k in base and not embedded}
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    return base | plain | {"prompt": list(PROMPTS), "generator": generators} | extra


def build(name: str, **options: Any) -> tuple[Any, DiffusionRewardModel]:
    pipe = ZOO[name].build()
    drm = DiffusionRewardModel.from_pipeline(pipe, backbone="nobody/nothing", **options)
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
        scores = drm.score_at_level(x, level, PROMPTS, engine.schedule, engine.token_grid)
        handle.remove()
    assert scores.shape == (2,) and scores.isfinite().all()
    assert torch.allclose(seen[0], stock[-1], atol=1e-4, rtol=1e-3), (seen[0] - stock[-1]).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_blocks_above_the_last_tap_do_not_run(name: str) -> None:
    pipe, shared = build(
        name, adaptation="frozen", blocks=None if name.startswith("sd") and name[2:4] in ("15", "xl") else 1
    )
    denoiser = denoiser_of(pipe)
    after = denoiser.conv_out if hasattr(denoiser, "conv_out") else getattr(denoiser, "proj_out", None)
    ran: list[int] = []
    with closing(PipelineDenoiser(pipe, call(name))) as engine:
        x = engine.initial()
        grid = engine.token_grid
    shared.score(x, 500.0, PROMPTS, grid)  # what the engine tries once, with the whole denoiser, is over then
    if after is not None:
        after.register_forward_hook(lambda *_: ran.append(1))
    shared.score(x, 500.0, PROMPTS, grid)
    assert not ran and 0 < shared.share <= 1
    full = DiffusionRewardModel.from_pipeline(pipe, backbone="x/y", adaptation="full")
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
@pytest.mark.parametrize("name", ["sd15", "sdxl", "flux", "wan"])
@pytest.mark.parametrize("adaptation", ["frozen", "lora", "full"])
def test_saving_and_loading(name: str, adaptation: Any, tmp_path: Path) -> None:
    pipe, drm = build(name, adaptation=adaptation)
    for tensor in drm.own_tensors().values():
        tensor.copy_(tensor.half())  # what a checkpoint keeps
    with closing(PipelineDenoiser(pipe, call(name))) as engine:
        x = engine.initial()
    drm.save_pretrained(tmp_path)
    again = DiffusionRewardModel.from_pretrained(str(tmp_path), pipe=pipe)
    assert torch.equal(again.score(x, 300.0, PROMPTS), drm.score(x, 300.0, PROMPTS))


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_shared_modules_may_be_offloaded_and_copies_cast(name: str) -> None:
    pipe, drm = build(name, adaptation="frozen")
    copy = DiffusionRewardModel.from_pipeline(pipe, backbone="x/y", adaptation="full")
    with closing(PipelineDenoiser(pipe, call(name))) as engine:
        x = engine.initial()
    before, of_copy = drm.score(x, 300.0, PROMPTS), copy.score(x, 300.0, PROMPTS)
    pipe.enable_model_cpu_offload(device="cpu")
    assert torch.equal(drm.score(x, 300.0, PROMPTS), before) and torch.equal(copy.score(x, 300.0, PROMPTS), of_copy)
    copy.trunk.bfloat16()
    assert torch.allclose(copy.score(x, 300.0, PROMPTS), of_copy, atol=0.05)


@torch.no_grad()
def test_named_taps_of_a_unet() -> None:
    pipe = ZOO["sdxl"].build()
    drm = DiffusionRewardModel.from_pipeline(pipe, taps=("mid_block", "up_blocks.0"), backbone="x/y")
    with closing(PipelineDenoiser(pipe, call("sdxl"))) as engine:
        assert drm.score_at_level(engine.initial(), 0, PROMPTS, engine.schedule).isfinite().all()
    for taps, words in ((("up_blocks.9",), "kept blocks are"), (("down_blocks.0",), "only the middle and upper")):
        with pytest.raises(ValueError, match=words):
            DiffusionRewardModel.from_pipeline(pipe, taps=taps)


@torch.no_grad()
@pytest.mark.parametrize("name", ZOO)
def test_it_is_the_value_of_any_familys_latents(name: str) -> None:
    """Scores of the engine's latents at every level, clean ones included, tell candidates apart."""
    pipe, drm = build(name, adaptation="frozen")
    with closing(PipelineDenoiser(pipe, call(name))) as denoiser:
        value = drm.value(denoiser, None, RandomStreams.for_prompts(0, PROMPTS))
        assert value.share == value.evaluations_per_row == drm.share and not value.reads_prediction
        spent, x = denoiser.evaluations, denoiser.initial()
        rows = torch.tensor([0, 0, 1])
        noise = torch.randn(3, *x.shape[1:], generator=torch.Generator().manual_seed(0))
        for level in (0, denoiser.steps):
            scores = value(x[rows] + 0.5 * noise, level, rows)
            assert scores.shape == (3,) and scores.isfinite().all() and len(set(scores.tolist())) == 3
        assert denoiser.evaluations == spent


@torch.no_grad()
@pytest.mark.parametrize("name", [n for n in ZOO if not n.startswith("sd15") and not n.startswith("sdxl")])
def test_features_lie_where_the_latents_do(name: str) -> None:
    """A change of the latents at one place changes the features there most: no text token is taken for one of the image."""
    pipe, drm = build(name, adaptation="frozen")
    with closing(PipelineDenoiser(pipe, call(name))) as denoiser:
        x, grid = denoiser.initial()[:1], denoiser.token_grid
    grid = grid or drm.grid(x)
    changed = x.clone()
    if x.ndim == 3:
        row, column = 1, min(2, grid[1] - 1)
        changed[:, row * grid[1] + column] += 3
    else:
        frames = x.shape[2] if x.ndim == 5 else 1
        y, z = x.shape[-2] // 2 + 1, 1
        changed[..., y, z] += 10
        if frames > 1:
            changed[:, :, :-1] = x[:, :, :-1]
        row = (frames - 1) * grid[0] // frames + y * (grid[0] // frames) // x.shape[-2]
        column = z * grid[1] // x.shape[-1]
    before, _ = drm.features(x, 500.0, PROMPTS[:1], grid)
    after, shape = drm.features(changed, 500.0, PROMPTS[:1], grid)
    place = int((after - before).norm(dim=-1).argmax())
    assert shape == grid and divmod(place, grid[1]) == (row, column)


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_images_are_encoded_as_the_family_decodes_them(name: str) -> None:
    pipe = ZOO[name].build()
    with closing(PipelineDenoiser(pipe, call(name))) as engine:
        x = engine.initial()
        side = engine.decode(x).shape[-1]
        frames = [5] if name == "wan" else []
        images = torch.rand(2, *frames, 3, side, side, generator=torch.Generator().manual_seed(0))
        latents = encode_images(pipe, images)
        assert latents.shape == x.shape
        pixels = 2 * images - 1
        pixels = pixels.transpose(1, 2) if frames else pixels.unsqueeze(2) if name == "qwenimage" else pixels
        encoded = pipe.vae.encode(pixels)
        plain = encoded.latent_dist.mean if hasattr(encoded, "latent_dist") else encoded.latent
        decoded = pipe.vae.decode(plain).sample / 2 + 0.5
        decoded = decoded.transpose(1, 2) if frames else decoded.squeeze(2) if name == "qwenimage" else decoded
        assert torch.allclose(engine.decode(latents), decoded.clamp(0, 1), atol=1e-4), "scaled and packed, and back"


def test_other_latents_and_denoisers_are_refused() -> None:
    _, drm = build("sd15")
    with pytest.raises(ValueError, match="another latent space"):
        drm.score(torch.zeros(1, 16, 8, 8), 0.0, ["a"])
    with pytest.raises(ValueError, match="1 prompts need 1 latents"):
        drm.score(torch.zeros(2, 4, 8, 8), 0.0, ["a"])
    with pytest.raises(UsageError, match="those of Linear were not found"):
        block_names(torch.nn.Linear(1, 1))
    _, flux = build("flux")
    with pytest.raises(ValueError, match=r"pass grid=\(rows, columns\)"):
        flux.score(torch.zeros(1, 6, 16), 0.0, ["a"])


def test_words_that_change_their_meaning_are_encoded_again() -> None:
    pipe = ZOO["sd15"].build()
    drm = DiffusionRewardModel.from_pipeline(pipe)
    latents, prompt = torch.randn(1, 4, 16, 16), ["a <thing>"]
    before = float(drm.score(latents, 500.0, prompt))
    pipe.load_textual_inversion(10 * torch.randn(1, pipe.text_encoder.config.hidden_size), token="<thing>")
    after = float(drm.score(latents, 500.0, prompt))
    assert after != before
    with torch.no_grad():
        pipe.text_encoder.get_input_embeddings().weight.mul_(2)
    assert float(drm.score(latents, 500.0, prompt)) != after

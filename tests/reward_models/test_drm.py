"""The diffusion reward model: scoring contract, saving and loading, what it shares, what it refuses."""

from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

import rsm_guidance as rg
from rsm_guidance.core.schedule import NoiseSchedule

PROMPTS = ["a red circle", "two blue stars", "a red circle"]


def latents(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("adaptation", ["frozen", "lora", "full"])
def test_round_trip(stock: StableDiffusion3Pipeline, tmp_path: Path, adaptation: str) -> None:
    torch.manual_seed(1)
    drm = rg.DiffusionRewardModel.from_pipeline(stock, blocks=3, adaptation=adaptation, lora_rank=4, backbone="shapes")
    with torch.no_grad():
        for name, tensor in drm._own_tensors().items():
            tensor.copy_((tensor + 0.01 * torch.randn(tensor.shape)).half())
            assert name.startswith(("head.", "trunk."))
    drm.save_pretrained(tmp_path)
    again = rg.DiffusionRewardModel.from_pretrained(str(tmp_path), pipe=stock)
    with torch.no_grad():
        assert torch.equal(drm.score(latents(), 400.0, PROMPTS), again.score(latents(), 400.0, PROMPTS))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < {"frozen": 0.3e6, "lora": 0.7e6, "full": 6e6}[adaptation]
    assert not list(tmp_path.glob("*.partial"))


def test_frozen_shares_and_full_copies_the_backbone(stock: StableDiffusion3Pipeline) -> None:
    frozen = rg.DiffusionRewardModel.from_pipeline(stock, blocks=2, adaptation="frozen")
    assert frozen.trunk.module is stock.transformer
    full = rg.DiffusionRewardModel.from_pipeline(stock, blocks=2, adaptation="full")
    assert full.trunk.module is not stock.transformer
    assert full.depth_share == pytest.approx(2 / 6)
    assert rg.DiffusionRewardModel.from_pipeline(stock).drm_config.blocks == 5  # 7/8 of 6


def test_trunk_is_the_denoisers_own_lower_half(stock: StableDiffusion3Pipeline) -> None:
    """Tokens of the trunk equal what the full transformer computes at that block."""
    drm = rg.DiffusionRewardModel.from_pipeline(stock, blocks=4, adaptation="frozen")
    texts = drm.encode(PROMPTS)
    seen: list[torch.Tensor] = []
    handle = stock.transformer.transformer_blocks[3].register_forward_hook(lambda m, a, out: seen.append(out[1]))
    timestep = torch.full((3,), 600.0)
    with torch.no_grad():
        stock.transformer(latents(), timestep=timestep, **texts)
        handle.remove()
        tokens, grid = drm.features(latents(), timestep, PROMPTS, drm.grid(latents()))
        assert torch.equal(tokens, seen[0]) and grid == (8, 8)


def test_scores_depend_on_prompt_level_and_row_alone(drm: rg.DiffusionRewardModel) -> None:
    with torch.no_grad():
        x = latents()
        scores = drm.score(x, 300.0, PROMPTS)
        assert scores.shape == (3,)
        alone = torch.cat([drm.score(x[i : i + 1], 300.0, PROMPTS[i : i + 1]) for i in range(3)])
        assert torch.allclose(scores, alone, atol=1e-4)
        assert not torch.allclose(scores, drm.score(x, 800.0, PROMPTS), atol=1e-3)
        assert not torch.allclose(scores[:1], drm.score(x[:1], 300.0, ["four green crosses"]), atol=1e-3)
        schedule = NoiseSchedule.flow(10)
        assert torch.equal(drm.score(x, 3, PROMPTS, schedule), drm.score(x, float(schedule.timesteps[3]), PROMPTS))


def test_scores_are_differentiable(drm: rg.DiffusionRewardModel) -> None:
    x = latents().requires_grad_()
    (gradient,) = torch.autograd.grad(drm.score(x, 500.0, PROMPTS).sum(), x)
    assert gradient.abs().amax((1, 2, 3)).min() > 0


def test_bad_input_is_refused(stock: StableDiffusion3Pipeline, drm: rg.DiffusionRewardModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another latent space"):
        drm.score(torch.zeros(1, 16, 16, 16), 0.0, ["a star"])
    with pytest.raises(ValueError, match="3 prompts need 3 latents"):
        drm.score(latents(2), 0.0, PROMPTS)
    with pytest.raises(ValueError, match=r"\[0, 1000\]"):
        drm.score(latents(), 1001.0, PROMPTS)
    with pytest.raises(ValueError, match="between 1 and 6"):
        rg.DiffusionRewardModel.from_pipeline(stock, blocks=7)
    with pytest.raises(ValueError, match="unknown adaptation"):
        rg.DiffusionRewardModel.from_pipeline(stock, adaptation="half")  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a diffusion reward model"):
        rg.resolve_reward(str(tmp_path / "empty"))


def test_damaged_checkpoints_are_refused(drm: rg.DiffusionRewardModel, tmp_path: Path) -> None:
    drm.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a diffusion reward model"):
        rg.DiffusionRewardModel.from_pretrained(str(tmp_path), pipe=drm.pipe)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file(dict(list(tensors.items())[1:]), weights)
    with pytest.raises(ValueError, match="do not fit"):
        rg.DiffusionRewardModel.from_pretrained(str(tmp_path), pipe=drm.pipe)


def test_unknown_rewards_are_refused_with_the_choices() -> None:
    with pytest.raises(ValueError, match="shapes-drm, shapes-verifier"):
        rg.resolve_reward("no-such-reward")
    with pytest.raises(ValueError, match="cannot import"):
        rg.resolve_reward("no_such_module:thing")
    with pytest.raises(ValueError, match="is a str, not a function"):
        rg.resolve_reward("string:digits")
    with pytest.raises(ValueError, match="got int"):
        rg.resolve_reward(3)

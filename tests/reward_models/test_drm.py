"""The diffusion reward model: scoring contract, saving and loading, what it shares, what it refuses."""

import gc
import os
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.meter import MeteredReward
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.reward_models import Adaptation, DiffusionRewardModel, load_reward_model
from rsm_guidance.rewards import as_reward, resolve_reward
from rsm_guidance.shapes.packaged import DRM
from tests.zoo import ZOO

PROMPTS = ["a red circle", "two blue stars", "a red circle"]
RELEASED_250 = [-3.1505, -2.40157, -2.51162]
RELEASED_MIXED = [-3.22533, -2.37987, 0.69416]
RELEASED_IMAGES = [-2.41591, -2.42641, -2.43272]


def latents(count: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("adaptation", ["frozen", "lora", "full"])
def test_round_trip(stock: StableDiffusion3Pipeline, tmp_path: Path, adaptation: Adaptation) -> None:
    torch.manual_seed(1)
    drm = DiffusionRewardModel.from_pipeline(stock, blocks=3, adaptation=adaptation, lora_rank=4, backbone="shapes")
    with torch.no_grad():
        for name, tensor in drm.own_tensors().items():
            tensor.copy_((tensor + 0.01 * torch.randn(tensor.shape)).half())
            assert name.startswith(("head.", "trunk."))
    drm.save_pretrained(tmp_path)
    again = DiffusionRewardModel.from_pretrained(str(tmp_path), pipe=stock)
    with torch.no_grad():
        assert torch.equal(drm.score(latents(), 400.0, PROMPTS), again.score(latents(), 400.0, PROMPTS))
    size = (tmp_path / "model.safetensors").stat().st_size
    assert size < {"frozen": 0.3e6, "lora": 0.7e6, "full": 6e6}[adaptation]
    assert {p.name for p in tmp_path.iterdir()} == {"README.md", "config.json", "model.safetensors"}


def test_frozen_shares_and_full_copies_the_backbone(stock: StableDiffusion3Pipeline) -> None:
    frozen = DiffusionRewardModel.from_pipeline(stock, blocks=2, adaptation="frozen")
    assert frozen.trunk.module is stock.transformer
    full = DiffusionRewardModel.from_pipeline(stock, blocks=2, adaptation="full")
    assert full.trunk.module is not stock.transformer
    assert full.share == pytest.approx(2 / 6)
    assert DiffusionRewardModel.from_pipeline(stock).drm_config.blocks == 5  # 7/8 of 6


def test_trunk_is_the_denoisers_own_lower_half(stock: StableDiffusion3Pipeline) -> None:
    """Tokens of the trunk equal what the full transformer computes at that block."""
    drm = DiffusionRewardModel.from_pipeline(stock, blocks=4, adaptation="frozen")
    seen: list[torch.Tensor] = []
    handle = stock.transformer.transformer_blocks[3].register_forward_hook(lambda m, a, out: seen.append(out[1]))
    timestep = torch.full((3,), 600.0)
    with torch.no_grad():
        arguments, grid = drm.inputs(latents(), timestep, PROMPTS)
        stock.transformer(**arguments)
        handle.remove()
        tokens, grid = drm.features(latents(), timestep, PROMPTS)
        assert torch.equal(tokens, seen[0]) and grid == (8, 8)


def test_scores_depend_on_prompt_level_and_row_alone(drm: DiffusionRewardModel) -> None:
    with torch.no_grad():
        x = latents()
        scores = drm.score(x, 300.0, PROMPTS)
        assert scores.shape == (3,)
        alone = torch.cat([drm.score(x[i : i + 1], 300.0, PROMPTS[i : i + 1]) for i in range(3)])
        assert torch.allclose(scores, alone, atol=1e-4)
        assert not torch.allclose(scores, drm.score(x, 800.0, PROMPTS), atol=1e-3)
        assert not torch.allclose(scores[:1], drm.score(x[:1], 300.0, ["four green crosses"]), atol=1e-3)
        schedule = NoiseSchedule.flow(10)
        assert torch.equal(
            drm.score_at_level(x, 3, PROMPTS, schedule), drm.score(x, float(schedule.timesteps[3]), PROMPTS)
        )


def test_scores_are_differentiable(drm: DiffusionRewardModel) -> None:
    x = latents().requires_grad_()
    (gradient,) = torch.autograd.grad(drm.score(x, 500.0, PROMPTS).sum(), x)
    assert gradient.abs().amax((1, 2, 3)).min() > 0


def test_bad_input_is_refused(stock: StableDiffusion3Pipeline, drm: DiffusionRewardModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="another latent space"):
        drm.score(torch.zeros(1, 16, 16, 16), 0.0, ["a star"])
    with pytest.raises(ValueError, match="3 prompts need 3 latents"):
        drm.score(latents(2), 0.0, PROMPTS)
    with pytest.raises(ValueError, match=r"\[0, 1000\]"):
        drm.score(latents(), 1001.0, PROMPTS)
    with pytest.raises(ValueError, match="between 1 and 6"):
        DiffusionRewardModel.from_pipeline(stock, blocks=7)
    with pytest.raises(ValueError, match="unknown adaptation"):
        DiffusionRewardModel.from_pipeline(stock, adaptation="half")  # type: ignore[arg-type]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="is not a diffusion reward model"):
        load_reward_model(str(tmp_path / "empty"))


def test_damaged_checkpoints_are_refused(drm: DiffusionRewardModel, tmp_path: Path) -> None:
    drm.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is not a diffusion reward model"):
        DiffusionRewardModel.from_pretrained(str(tmp_path), pipe=drm.pipe)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    save_file(dict(list(tensors.items())[1:]), weights)
    with pytest.raises(ValueError, match="do not fit"):
        DiffusionRewardModel.from_pretrained(str(tmp_path), pipe=drm.pipe)


def test_scores_of_the_packaged_model_are_those_of_its_release(drm: DiffusionRewardModel) -> None:
    """Figures of commit 8915c35, before trunks ran over replayed arguments."""
    x, prompts = latents(), ["a red circle", "two blue stars", "a green cross above a square"]
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert drm.score(x, 250.0, prompts).tolist() == pytest.approx(RELEASED_250, abs=2e-4)
        assert drm.score(x, torch.tensor([10.0, 500.0, 990.0]), prompts).tolist() == pytest.approx(
            RELEASED_MIXED, abs=2e-4
        )
        assert drm(images, prompts).tolist() == pytest.approx(RELEASED_IMAGES, abs=2e-4)


def test_it_is_a_reward_of_images(drm: DiffusionRewardModel) -> None:
    assert as_reward(drm) is drm and drm.differentiable and drm.requires == () and 0 < drm.share < 1
    images = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    scores = drm(images, PROMPTS)
    assert torch.equal(scores, drm.score_images(images, PROMPTS))
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert gradient.abs().amax((1, 2, 3)).min() > 0
    ledger = Ledger()
    MeteredReward(drm, ledger)(images.detach(), PROMPTS)
    assert ledger.reward_calls == 3


def test_the_scorer_trains_apart_from_its_conditioning(stock: StableDiffusion3Pipeline) -> None:
    drm = DiffusionRewardModel.from_pipeline(stock, blocks=2, adaptation="full")
    inputs = drm.inputs(latents(), torch.tensor([100.0, 400.0, 900.0]), PROMPTS)
    assert torch.equal(drm.scorer(*inputs), drm.score(latents(), torch.tensor([100.0, 400.0, 900.0]), PROMPTS))
    drm.scorer(*inputs).square().sum().backward()
    trained = {n for n, p in drm.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("head" in n for n in trained) and any("transformer_blocks.0" in n for n in trained)
    assert all(p.grad is None for p in stock.transformer.parameters())


@pytest.mark.slow
def test_the_scorer_can_be_compiled(stock: StableDiffusion3Pipeline) -> None:
    for adaptation in ("frozen", "full"):
        drm = DiffusionRewardModel.from_pipeline(stock, blocks=2, adaptation=adaptation)
        inputs = drm.inputs(latents(), 400.0, PROMPTS)
        compiled = torch.compile(drm.scorer, backend="eager")
        assert torch.allclose(compiled(*inputs), drm.scorer(*inputs), atol=1e-5)


# --- by name ---


def test_a_pipeline_of_the_backbone_is_shared_and_nothing_is_loaded(
    stock: StableDiffusion3Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(lambda *_, **__: 1 / 0))
    first = load_reward_model(str(DRM), stock)
    assert first.pipe is stock and load_reward_model(str(DRM), stock) is first
    assert resolve_reward("shapes-drm", stock) is first
    with pytest.raises(ZeroDivisionError):
        load_reward_model(str(DRM))


def test_another_denoiser_is_not_taken_for_the_backbone(
    stock: StableDiffusion3Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []

    def load(name: str, device: torch.device) -> StableDiffusion3Pipeline:
        loaded.append(name)
        return stock

    monkeypatch.setattr("rsm_guidance.reward_models.hub.load_backbone", load)
    foreign = ZOO["sd3"].build()
    assert load_reward_model(str(DRM), foreign) is load_reward_model(str(DRM), foreign)
    renamed = ZOO["sd3"].build()
    renamed.register_to_config(_name_or_path=stock.config._name_or_path)  # another size under the same name
    load_reward_model(str(DRM), renamed)
    assert loaded == ["shapes", "shapes"]


def test_models_are_freed_with_the_pipeline_they_were_loaded_for(stock: StableDiffusion3Pipeline) -> None:
    pipe = StableDiffusion3Pipeline(**stock.components)
    pipe.register_to_config(_name_or_path=stock.config._name_or_path)
    model = weakref.ref(load_reward_model(str(DRM), pipe))
    assert model() is not None
    del pipe
    gc.collect()
    assert model() is None


def test_a_checkpoint_that_changes_is_loaded_again(stock: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    DiffusionRewardModel.from_pipeline(stock, blocks=1, adaptation="frozen").save_pretrained(tmp_path)
    first = load_reward_model(str(tmp_path), stock)
    DiffusionRewardModel.from_pipeline(stock, blocks=2, adaptation="frozen").save_pretrained(tmp_path)
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert load_reward_model(str(tmp_path), stock).drm_config.blocks == 2 != first.drm_config.blocks


def test_a_typo_is_named(stock: StableDiffusion3Pipeline) -> None:
    with pytest.raises(UsageError, match="no argument 'lora_rnak'"):
        DiffusionRewardModel.from_pretrained(str(DRM), pipe=stock, lora_rnak=4)


def test_close_scores_are_no_ties_under_autocast(drm: DiffusionRewardModel) -> None:
    near = latents()[:1] + 0.003 * torch.randn(32, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    plain = drm.score(near, 300.0, PROMPTS[:1] * 32)
    with torch.autocast("cpu", torch.bfloat16):
        scores = drm.score(near, 300.0, PROMPTS[:1] * 32)
    assert scores.dtype == torch.float32 and len(scores.unique()) > 16
    assert (scores - plain).abs().max() < 0.2

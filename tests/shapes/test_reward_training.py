"""Training of the shapes world's reward model, tiny and end to end."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from rsm_guidance.core.random import generator_of
from rsm_guidance.reward_models import DiffusionRewardModel
from rsm_guidance.shapes import verify
from rsm_guidance.shapes.scenes import caption_set
from rsm_guidance.shapes.training import reward as training
from rsm_guidance.shapes.training.groups import BranchGroups, GroupConfig
from rsm_guidance.shapes.training.hard_negatives import Renders, render_hard_negatives
from rsm_guidance.shapes.training.objective import renoise
from rsm_guidance.shapes.training.report import value_correlation
from rsm_guidance.shapes.training.reward import (
    RewardData,
    ShapesRewardConfig,
    build_objective,
    keep_best,
    train_reward,
    validation_captions,
)
from rsm_guidance.training import adamw

TINY = ShapesRewardConfig(
    prompts=12,
    validation_prompts=8,
    steps=6,
    batch_groups=4,
    evaluate_every=3,
    blocks=2,
    groups=GroupConfig(siblings=3, steps=4, batch_size=6, autocast=False),
)


@pytest.fixture
def data() -> RewardData:
    """Random latents whose scores are their mean: something to learn without sampling."""
    generator = torch.Generator().manual_seed(0)
    prompts = [c.text for c in caption_set(8, 3, held_out=False)]
    finals = torch.randn(8, 3, 4, 16, 16, generator=generator) + torch.randn(8, 3, 1, 1, 1, generator=generator)
    scores = finals.mean((2, 3, 4))
    sigmas = torch.tensor([[0.9, 0.5], [0.9, 0.8]] * 4)
    path = [renoise(finals, sigma, generator) for sigma in sigmas.T]
    path[0][:] = path[0][:, :1]  # one state, from which they part
    branched = torch.ones(8, dtype=torch.int64)
    labels = torch.zeros(8, 3, 64, 4)
    groups = BranchGroups(prompts, torch.stack(path, 2).half(), finals.half(), sigmas, branched, scores, labels.half())
    drawn = torch.randn(8, 4, 4, 16, 16, generator=generator)
    renders = Renders(drawn.half(), torch.zeros(8, 4, 64, 4).half(), torch.tensor([[1.25, 0.5, 0.5, 0.5]] * 8))
    return RewardData(groups, groups.every_other(0), groups.every_other(1), renders)


def test_renoising_has_the_marginal_of_the_level() -> None:
    x0 = torch.full((2, 500, 4), 3.0)
    x = renoise(x0, torch.tensor([0.25, 1.0]), torch.Generator().manual_seed(0))
    assert x.mean((1, 2)).tolist() == pytest.approx([2.25, 0.0], abs=0.08)
    assert x.std((1, 2)).tolist() == pytest.approx([0.25, 1.0], rel=0.06)


@pytest.mark.parametrize("adaptation", ["full", "lora", "frozen"])
def test_every_trainable_tensor_of_a_reward_model_moves_and_no_other(
    stock: StableDiffusion3Pipeline, data: RewardData, adaptation: Any
) -> None:
    backbone = {name: p.detach().clone() for name, p in stock.transformer.named_parameters()}
    objective = build_objective(stock, data, replace(TINY, adaptation=adaptation, lora_rank=2))
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    optimizer = adamw([(objective, 1e-3)], 0.0)
    for step in range(2):  # a LoRA's first factor waits for the second
        optimizer.zero_grad()
        objective(torch.arange(4), generator_of("step", step))["loss"].backward()
        optimizer.step()
    moved = {name for name, p in objective.named_parameters() if not torch.equal(p, before[name])}
    still = {name for name, p in objective.named_parameters() if p.requires_grad} - moved
    # the last block's text queries are computed together with the image's, and their attention is thrown away
    assert all("blocks.1.attn.add_q_proj" in name or "blocks.1.attn.norm_added_q" in name for name in still)
    assert not [name for name, p in objective.named_parameters() if name in moved and not p.requires_grad]
    assert any("trunk" in name for name in moved) == (adaptation != "frozen")
    assert all("lora_" in name for name in moved if "trunk" in name) == (adaptation != "full")
    assert any("objects" in name for name in moved) == (adaptation != "frozen")
    assert all(torch.equal(p, backbone[name]) for name, p in stock.transformer.named_parameters())


def test_the_losses_of_a_step_depend_on_its_generator_alone(stock: StableDiffusion3Pipeline, data: RewardData) -> None:
    objective, rows = build_objective(stock, data, TINY), torch.tensor([1, 5])

    def losses(name: str) -> dict[str, float]:
        torch.manual_seed(hash(name) % 1000)
        return {k: v.item() for k, v in objective(rows, generator_of(name)).items()}

    assert losses("a") == losses("a") != losses("b")
    parts = losses("a")
    assert parts.keys() == {"loss", "renoised", "siblings", "rendered", "objects", "values"}
    whole = sum(parts[name] for name in ("renoised", "siblings", "values", "objects")) + 0.5 * parts["rendered"]
    assert parts["loss"] == pytest.approx(whole, rel=1e-5)


def test_a_reward_model_learns_what_it_is_shown(stock: StableDiffusion3Pipeline, data: RewardData) -> None:
    objective = build_objective(stock, data, replace(TINY, object_weight=0.0))
    optimizer = adamw([(objective, 2e-3)], 0.0)
    renoised = []
    for step in range(40):
        losses = objective(torch.arange(8), generator_of("learn", step))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        renoised.append(losses["renoised"].item())
    assert sum(renoised[-8:]) / 8 < 0.6 < renoised[0]
    with torch.no_grad():
        accuracy = training.validation_accuracy(objective.drm, data.train)
    assert accuracy["pair"] > 0.75


def test_values_are_learnt_across_prompts(stock: StableDiffusion3Pipeline, data: RewardData) -> None:
    """Prompts whose samples are good, and prompts whose samples are bad: orders within prompts say nothing of it."""
    good = torch.tensor([1.0, 0.25] * 4)[:, None]
    groups = replace(data.train, scores=good + 0.01 * data.train.scores)
    objective = build_objective(stock, replace(data, train=groups), replace(TINY, object_weight=0.0))
    optimizer = adamw([(objective, 2e-3)], 0.0)
    values = []
    for step in range(40):
        losses = objective(torch.arange(8), generator_of("learn", step))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
        values.append(losses["values"].item())
    assert sum(values[-5:]) / 5 < 0.8 < values[0]
    found = value_correlation(objective.drm, groups)
    assert list(found) == pytest.approx([0.9, 0.5, 0.0]) and min(found.values()) > 0.8
    with torch.no_grad():
        scores = objective.drm.score(groups.finals[:, 0].float(), 0.0, groups.prompts)
    assert scores[::2].mean() == pytest.approx(1.0, abs=0.25) and scores[1::2].mean() == pytest.approx(0.25, abs=0.25)


def test_a_run_may_start_from_a_finished_model(stock: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    old = DiffusionRewardModel.from_pipeline(stock, blocks=1, backbone="shapes")
    with torch.no_grad():
        old.trunk.denoiser.transformer_blocks[0].attn.to_q.weight.fill_(0.5)
    old.save_pretrained(tmp_path / "old")
    drm = training.untrained(stock, replace(TINY, init_from=str(tmp_path / "old")))
    assert (drm.trunk.denoiser.transformer_blocks[0].attn.to_q.weight == 0.5).all()
    assert not (drm.trunk.denoiser.transformer_blocks[1].attn.to_q.weight == 0.5).any()
    DiffusionRewardModel.from_pipeline(stock, blocks=1, adaptation="frozen", backbone="shapes").save_pretrained(
        tmp_path / "head"
    )
    with pytest.raises(ValueError, match="no tensor of its trunk in common"):
        training.untrained(stock, replace(TINY, init_from=str(tmp_path / "head")))


def test_the_best_model_so_far_is_kept(
    stock: StableDiffusion3Pipeline, data: RewardData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drm = DiffusionRewardModel.from_pipeline(stock, blocks=1, adaptation="frozen", backbone="shapes")
    saved: list[float] = []
    monkeypatch.setattr(type(drm), "save_pretrained", lambda self, folder: saved.append(past[-1] if past else -1.0))
    past: list[float] = []
    for mean in (0.6, 0.5, 0.7, 0.7):
        monkeypatch.setattr(training, "validation_accuracy", lambda *_, mean=mean: {"mean": mean})
        entry = keep_best(drm, data.validation, [{"mean": m} for m in past], tmp_path)
        past.append(entry["mean"])
    assert saved == [-1.0, 0.5]  # at first, and after 0.5; a draw keeps the older


def test_hard_negatives_come_after_a_correct_render(stock: StableDiffusion3Pipeline) -> None:
    captions = caption_set(6, 1, held_out=False)
    renders = render_hard_negatives(stock, captions, seed=0)
    assert renders.latents.shape == (6, 4, 4, 16, 16) and renders.labels.shape == (6, 4, 64, 4)
    assert (renders.scores[:, 0] == 1.25).all() and (renders.scores[:, 1:] < 1).all()
    x = renders.latents.float().flatten(0, 1) / stock.vae.config.scaling_factor + stock.vae.config.shift_factor
    with torch.no_grad():
        images = ((stock.vae.decode(x).sample + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1).numpy()
    correct = [verify(image, captions[i // 4].text).correct for i, image in enumerate(images)]
    assert all(correct[::4]) and sum(correct) <= 7


def test_validation_captions_are_held_out_and_not_of_the_benchmark() -> None:
    chosen = validation_captions(60)
    assert len({c.text for c in chosen}) == 60
    assert not {c.spec.canonical() for c in chosen} & {c.spec.canonical() for c in caption_set(512, 0)}


def test_settings_that_cannot_train_are_refused() -> None:
    with pytest.raises(ValueError, match="steps must be at least 1"):
        replace(TINY, steps=0)
    with pytest.raises(ValueError, match="siblings of groups must be at least 2"):
        replace(TINY, groups=GroupConfig(siblings=1))


def test_children_need_a_noisy_transition_which_is_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="children are drawn from one Gaussian"):
        train_reward(
            replace(TINY, out=tmp_path / "drm", pipeline="/no/such", groups=replace(TINY.groups, transition="ode"))
        )
    assert not (tmp_path / "drm").exists()


def interrupting(at: int, real: Callable[..., Any]) -> Callable[..., Any]:
    calls: list[int] = []

    def interrupted(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return real(*args)

    return interrupted


@pytest.mark.slow
def test_training_end_to_end_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replace(TINY, out=tmp_path / "whole", adaptation="lora", lora_rank=2)
    report = train_reward(whole)
    assert json.loads((tmp_path / "whole/report.json").read_text()) == json.loads(json.dumps(report))
    assert [h["step"] for h in report["history"]] == [3, 6] and len(report["pair"]) == 8
    assert report["config"]["groups"]["transition"] == "cps 0.9"
    assert (tmp_path / "whole/accuracy.png").stat().st_size > 5000

    parts = replace(whole, out=tmp_path / "parts", data=tmp_path / "whole/data")
    monkeypatch.setattr(training, "validation_accuracy", interrupting(2, training.validation_accuracy))
    with pytest.raises(KeyboardInterrupt):
        train_reward(parts)
    monkeypatch.undo()
    assert train_reward(parts)["history"] == report["history"]
    weights = [(tmp_path / name / "model/model.safetensors").read_bytes() for name in ("whole", "parts")]
    assert weights[0] == weights[1]

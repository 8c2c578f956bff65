"""Preference data: children of one state, completed and scored; made once."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from rsm_guidance.shapes import caption_set, verify
from rsm_guidance.shapes.reward import to_uint8
from rsm_guidance.shapes.training import groups as made
from rsm_guidance.shapes.training.groups import GroupConfig, generate_groups, sample_groups

TINY = GroupConfig(siblings=3, steps=4, batch_size=4, autocast=False)


@torch.no_grad()
@pytest.mark.parametrize("level", [0, 1, 2])
def test_children_of_one_state_are_completed_and_scored(stock: StableDiffusion3Pipeline, level: int) -> None:
    captions = caption_set(4, 1, held_out=False)
    config = GroupConfig(siblings=3, steps=4, transition="cps 0.5", autocast=False)
    groups = sample_groups(stock, captions, config, level, seed=0)
    assert groups.paths.shape == (4, 3, 4, 4, 16, 16) and groups.finals.shape == (4, 3, 4, 16, 16)
    noise = groups.children(torch.arange(4)).float()
    spread = (noise[:, 0] - noise[:, 1]).std() / 2**0.5
    sigma = float(groups.sigma[0])
    expected = sigma if level == 0 else sigma * math.sin(0.5 * math.pi / 2)
    assert spread.item() == pytest.approx(expected, rel=0.05), "children differ by the transition's noise alone"
    x0 = groups.finals[2, 1][None].float()
    image = stock.vae.decode(x0 / stock.vae.config.scaling_factor + stock.vae.config.shift_factor).sample / 2 + 0.5
    verdict = verify(to_uint8(image.clamp(0, 1)).numpy()[0], captions[2].text)
    assert groups.scores[2, 1].item() == pytest.approx(verdict.score + 0.25 * verdict.correct, abs=0.02)


@pytest.mark.parametrize("level", [0, 2])
def test_paths_part_at_their_level_and_lead_to_the_finals(stock: StableDiffusion3Pipeline, level: int) -> None:
    groups = sample_groups(stock, caption_set(2, 1, held_out=False), TINY, level, seed=0)
    for n in range(4):
        same = torch.equal(groups.paths[:, 0, n], groups.paths[:, 1, n])
        assert same == (n < level), f"level {n}"
    rows = torch.arange(2)
    assert torch.equal(groups.children(rows), groups.paths[:, :, level])
    assert torch.equal(groups.sigma, groups.sigmas[:, level]) and (groups.sigmas.diff() < 0).all()
    shared = groups.outcomes(rows, torch.tensor([max(0, level - 1)] * 2))
    if level:
        assert torch.equal(shared, groups.scores.mean(1, keepdim=True).expand(2, 3)), "of states before: the mean"
        first = groups.outcomes(rows, torch.tensor([0, 0]), completions=1)
        assert torch.equal(first, groups.scores[:, :1].expand(2, 3)), "or that of some"
    assert torch.equal(groups.outcomes(rows, torch.tensor([level, 3])), groups.scores), "of others: their own"


def test_the_first_child_ends_where_the_unbranched_run_ends(stock: StableDiffusion3Pipeline) -> None:
    captions = caption_set(2, 1, held_out=False)
    finals = [sample_groups(stock, captions, TINY, level, seed=0).finals.float() for level in (0, 1, 2)]
    for branched in finals[1:]:
        assert torch.allclose(branched[:, 0], finals[0][:, 0], atol=0.02)
        assert not torch.allclose(branched[:, 1], finals[0][:, 1], atol=0.5)


def test_groups_do_not_depend_on_their_batch(stock: StableDiffusion3Pipeline) -> None:
    captions = caption_set(4, 1, held_out=False)
    together = sample_groups(stock, captions, TINY, 1, seed=0)
    alone = sample_groups(stock, captions[2:3], TINY, 1, seed=0)
    assert torch.allclose(alone.paths[0].float(), together.paths[2].float(), atol=0.01)


def test_groups_are_made_once(stock: StableDiffusion3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = caption_set(6, 1, held_out=False)
    first = generate_groups(stock, captions, TINY, tmp_path, 0, "samples")
    monkeypatch.setattr(made, "sample_groups", None)
    again = generate_groups(stock, captions, TINY, tmp_path, 0, "samples")
    assert torch.equal(first.scores, again.scores) and first.prompts == again.prompts
    assert json.loads((tmp_path / "settings.json").read_text())["groups"]["transition"] == "cps 0.9"
    same_numbers = GroupConfig(siblings=3, steps=4, batch_size=4, transition="ddim 0.9", autocast=False)
    for captions_, config in ((captions[:5], TINY), (captions, same_numbers)):
        with pytest.raises(ValueError, match="made with other settings"):
            generate_groups(stock, captions_, config, tmp_path, 0, "samples")


def test_data_of_another_generator_is_refused(stock: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    captions = caption_set(2, 1, held_out=False)
    generate_groups(stock, captions, TINY, tmp_path, 0, "samples")
    weight = stock.transformer.proj_out.weight
    try:
        with torch.no_grad():
            weight.neg_()  # the sum of magnitudes stays what it was
        with pytest.raises(ValueError, match="made with other settings"):
            generate_groups(stock, captions, TINY, tmp_path, 0, "samples")
    finally:
        with torch.no_grad():
            weight.neg_()


def test_children_need_a_noisy_gaussian() -> None:
    with pytest.raises(ValueError, match="children are drawn from one Gaussian"):
        _ = GroupConfig(transition="ode").gaussian

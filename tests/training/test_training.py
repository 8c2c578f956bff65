"""Training: losses against closed forms, resume equals uninterrupted, data made once, the command end to end."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import nn

from rsm_guidance.cli.main import main
from rsm_guidance.core.transitions import Transition
from rsm_guidance.shapes.reward import to_uint8
from rsm_guidance.shapes import caption_set, verify
from rsm_guidance.training import reward as reward_training
from rsm_guidance.training.checkpoint import Ema, load_state, save_state, warmup_cosine
from rsm_guidance.shapes.training.groups import GroupConfig, batches, generate_groups, sample_groups
from rsm_guidance.shapes.training.reward import pair_loss, renoise
from rsm_guidance.shapes.training.report import pairs_won

TINY = GroupConfig(siblings=3, steps=4, batch_size=4)


def test_pair_loss_is_bradley_terry() -> None:
    scores = torch.tensor([[1.0, 0.0, 3.0]])
    targets = torch.tensor([[1.0, 0.0, 1.01]])  # 1 and 1.01 are no preference
    expected = (math.log1p(math.exp(-1.0)) + math.log1p(math.exp(-3.0))) / 2
    assert pair_loss(scores, targets).item() == pytest.approx(expected, rel=1e-6)
    assert pair_loss(scores, torch.zeros(1, 3)).item() == 0
    assert pair_loss(scores + 5, targets).item() == pytest.approx(expected, rel=1e-5)
    assert pairs_won(scores, targets) == (2.0, 2)
    assert pairs_won(torch.zeros(1, 3), targets) == (1.0, 2)


def test_renoising_has_the_marginal_of_the_level() -> None:
    x0 = torch.full((2, 500, 4), 3.0)
    x = renoise(x0, torch.tensor([0.25, 1.0]), torch.Generator().manual_seed(0))
    assert x.mean((1, 2)).tolist() == pytest.approx([2.25, 0.0], abs=0.08)
    assert x.std((1, 2)).tolist() == pytest.approx([0.25, 1.0], rel=0.06)


def test_batches_cover_every_epoch_and_resume_in_step() -> None:
    whole = list(batches(10, 3, 9, 0, seed=1))
    assert [b.tolist() for b in batches(10, 3, 9, 5, seed=1)] == [b.tolist() for b in whole[5:]]
    assert len(set(torch.cat(whole[:3]).tolist())) == 9


def test_schedule_rises_and_falls() -> None:
    values = [warmup_cosine(s, 100, 0.1) for s in range(100)]
    assert values[0] == pytest.approx(0.1) and max(values) == 1.0 and values[-1] < 0.001
    assert values[:10] == sorted(values[:10]) and values[10:] == sorted(values[10:], reverse=True)


def train_linear(folder: Path, steps: int, until: int) -> list[float]:
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    ema = Ema([model], 0.9)
    state = load_state(folder, {"model": model, "ema": ema.shadow}, optimizer)
    for step in range(int(state["step"]) if state else 0, min(steps, until)):  # type: ignore[call-overload]
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(step)
    save_state(folder, min(steps, until), {"model": model, "ema": ema.shadow}, optimizer, {})
    return [*model.weight.flatten().tolist(), *ema.shadow[0].flatten().tolist()]


def test_resumed_training_equals_uninterrupted(tmp_path: Path) -> None:
    whole = train_linear(tmp_path / "a", 20, 20)
    train_linear(tmp_path / "b", 20, 7)
    assert train_linear(tmp_path / "b", 20, 20) == whole


def test_a_crash_while_saving_leaves_the_old_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_linear(tmp_path / "a", 5, 5)

    def full_disk(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("rsm_guidance.training.checkpoint.save_file", full_disk)
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(OSError, match="No space"):
        save_state(tmp_path / "a", 9, {"model": model}, optimizer, {})
    monkeypatch.undo()
    assert json.loads((tmp_path / "a" / "state.json").read_text())["step"] == 5
    (tmp_path / "a" / "state.safetensors").write_bytes(b"broken")
    with pytest.raises(ValueError, match="cannot resume from"):
        load_state(tmp_path / "a", {"model": model}, optimizer)


def test_ema_swap_is_an_involution() -> None:
    model = nn.Linear(2, 2)
    ema = Ema([model])
    before = model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    ema.update(1000)
    ema.swap()
    assert not torch.equal(model.weight, before + 1)
    ema.swap()
    assert torch.equal(model.weight, before + 1)


@torch.no_grad()
@pytest.mark.parametrize("level", [0, 2])
def test_siblings_are_children_of_one_state_completed_and_judged(stock: StableDiffusion3Pipeline, level: int) -> None:
    captions = caption_set(4, 1, held_out=False)
    config = GroupConfig(siblings=3, steps=4, transition=Transition("cps", 0.5))
    groups = sample_groups(stock, captions, config, level, seed=0)
    assert groups.children.shape == groups.finals.shape == (4, 3, 4, 16, 16)
    noise = groups.children.float()
    spread = (noise[:, 0] - noise[:, 1]).std() / 2**0.5
    sigma = float(groups.sigma[0])
    expected = sigma if level == 0 else sigma * math.sin(0.5 * math.pi / 2)
    assert spread.item() == pytest.approx(expected, rel=0.05), "children differ by the transition's noise alone"
    x0 = groups.finals[2, 1][None].float()
    image = stock.vae.decode(x0 / stock.vae.config.scaling_factor + stock.vae.config.shift_factor).sample / 2 + 0.5
    verdict = verify(to_uint8(image.clamp(0, 1)).numpy()[0], captions[2].text)
    assert groups.scores[2, 1].item() == pytest.approx(verdict.score + 0.25 * verdict.correct, abs=0.02)


def test_groups_are_made_once(stock: StableDiffusion3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions = caption_set(6, 1, held_out=False)
    first = generate_groups(stock, captions, TINY, tmp_path, 0, "samples")
    monkeypatch.setattr("rsm_guidance.shapes.training.groups.sample_groups", None)
    again = generate_groups(stock, captions, TINY, tmp_path, 0, "samples")
    assert torch.equal(first.scores, again.scores) and first.prompts == again.prompts
    with pytest.raises(ValueError, match="made with other settings"):
        generate_groups(stock, captions[:5], TINY, tmp_path, 0, "samples")


@pytest.mark.slow
def test_train_reward_end_to_end_and_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(
        "prompts: 12\nvalidation_prompts: 8\nsteps: 6\nbatch_groups: 4\nevaluate_every: 3\nblocks: 2\n"
        "adaptation: lora\nlora_rank: 2\ngroups:\n  siblings: 3\n  steps: 4\n  batch_size: 6\n"
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["train", "reward", "--config", str(config)]
    main([*command, "--out", str(whole)])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["model"] == str(whole / "model")
    report = json.loads((whole / "report.json").read_text())
    assert [h["step"] for h in report["history"]] == [3, 6] and len(report["pair"]) == 8
    assert (whole / "accuracy.png").stat().st_size > 5000

    real = reward_training.validation_accuracy
    calls = []

    def interrupted(*args: object) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(reward_training, "validation_accuracy", interrupted)
    with pytest.raises(SystemExit) as stop:
        main([*command, "--out", str(parts), "--data", str(whole / "data")])
    assert stop.value.code == 130
    monkeypatch.undo()
    main([*command, "--out", str(parts), "--data", str(whole / "data")])
    resumed = json.loads((parts / "report.json").read_text())
    assert resumed["history"] == report["history"]

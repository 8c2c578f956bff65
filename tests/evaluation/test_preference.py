"""Figures of preferences against hand calculation, and the command that writes them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from rsm_guidance.cli.main import main
from rsm_guidance.evaluation.preference.figures import (
    PairScores,
    agreement,
    calibration,
    figures_of,
    grouped,
    scores_vary,
    soft_loss,
)
from rsm_guidance.reward_models.outputs import RewardOutput
from rsm_guidance.training.reward_model.losses import PairLabel, soft
from tests.training.reward_model.worlds import write_choices


def pairs(margins: list[float], probability: list[float], **columns: list[str]) -> PairScores:
    scores = np.array([[margin + 3.0, 3.0] for margin in margins])
    return PairScores(scores, np.array(probability), **columns)


def test_ties_are_counted_apart_and_equal_scores_are_half_right() -> None:
    found = figures_of(pairs([2.0, -1.0, 0.0, 0.5, 0.1], [1.0, 1.0, 1.0, 0.2, 0.5]))
    assert (found["pairs"], found["ties"]) == (4, 1)
    assert found["accuracy"] == (1 + 0 + 0.5 + 0) / 4
    assert found["standard_error"] == pytest.approx(math.sqrt(0.375 * 0.625 / 4))
    assert found["tie_separation"] == 3 / 4, "of the distances 2, 1, 0 and .5 three are above the tie's .1"
    empty = figures_of(pairs([0.3], [0.5]))
    assert empty["accuracy"] is None and empty["tie_separation"] is None and empty["ties"] == 1


def test_the_loss_is_that_of_training_and_0_at_best() -> None:
    margins, labels = [0.0, 1.2, -3.0, 2.0], [0.5, 1 / (1 + math.exp(-1.2)), 0.0, 1.0]
    ours = soft_loss(np.array(margins), np.array(labels))
    win, none = torch.tensor(labels), torch.zeros(4)
    theirs = soft(RewardOutput(torch.tensor(margins)), RewardOutput(none), PairLabel(win, win == 0.5, none))
    assert ours == pytest.approx(theirs.numpy(), abs=1e-6)
    assert ours[:2] == pytest.approx([0, 0], abs=1e-12)
    assert ours[2] == pytest.approx(math.log1p(math.exp(-3))) and ours[3] == pytest.approx(math.log1p(math.exp(-2)))


def test_calibration_does_not_depend_on_the_order_of_a_pair() -> None:
    random = np.random.default_rng(0)
    margin = random.normal(0, 2, 4000)
    label = (random.uniform(size=4000) < 1 / (1 + np.exp(-margin))).astype(float)
    honest = pairs(list(margin), list(label))
    mirrored = PairScores(honest.scores[:, ::-1], 1 - honest.probability)
    assert calibration(honest) == calibration(mirrored)
    assert calibration(honest)["error"] < 0.03
    bold = pairs(list(5 * margin), list(label))
    assert calibration(bold)["error"] > 0.1
    assert sum(b["pairs"] for b in calibration(bold)["bins"]) == 4000


def test_groups_and_agreement() -> None:
    one = pairs([1.0, -1.0, 2.0, 0.0], [1, 1, 0, 1], source=["a", "b", "a", "b"], category=["", "", "x", "x"])
    by = grouped(one, "source")
    assert (by["a"]["accuracy"], by["b"]["accuracy"]) == (0.5, 0.25) and grouped(one, "category").keys() == {"", "x"}
    other = pairs([3.0, -0.1, -1.0, 1.0], [1, 1, 0, 1])
    found = agreement(one, other)
    assert found["pairs"] == 3 and found["same_choice"] == pytest.approx(2 / 3)
    assert agreement(one, one)["correlation"] == pytest.approx(1)
    flat = pairs([0.0, 0.0], [1, 0])
    assert not scores_vary(flat) and scores_vary(one) and agreement(flat, flat)["correlation"] is None


def test_the_command_writes_figures_by_level_source_and_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_choices(tmp_path / "data", count=8, ties=2, size=64)
    (tmp_path / "mine.py").write_text(
        "def red(images, prompts):\n    return images[:, 0].mean((1, 2)) - images[:, 1].mean((1, 2))\n"
    )
    command = ["evaluate", "preference", "data/choices.csv", "--reward", "mine:red", "--others", "shapes-drm"]
    main([*command, "--levels", "0,0.5", "--out", "evaluation", "--batch-size", "3"])
    told = capsys.readouterr().out
    report = json.loads(Path("evaluation/report.json").read_text())
    red = report["rewards"]["mine:red"]["images"]
    assert red["accuracy"] == 1.0 and (red["pairs"], red["ties"]) == (6, 2) and red["by_source"].keys() == {"a", "b"}
    assert report["rewards"]["shapes-drm"].keys() == {"sigma 0", "sigma 0.5"}
    assert report["agreement"].keys() == {"shapes-drm, sigma 0", "shapes-drm, sigma 0.5"}
    assert "mine:red, images: 1.000 +- 0.000 of 6 decided pairs, 2 ties apart" in told and "source a: " in told
    assert all((tmp_path / "evaluation" / name).stat().st_size > 5000 for name in ("accuracy.png", "calibration.png"))
    main([*command, "--levels", "0,0.5", "--out", "again", "--batch-size", "8"])
    other = json.loads(Path("again/report.json").read_text())
    for level in ("sigma 0", "sigma 0.5"):
        a, b = (r["rewards"]["shapes-drm"][level]["margin"] for r in (report, other))
        assert a == pytest.approx(b, rel=1e-4), "batches change nothing"
    with pytest.raises(SystemExit) as stop:
        main([*command, "--levels", "2"])
    assert stop.value.code == 2 and "noise levels between 0 and 1" in capsys.readouterr().err

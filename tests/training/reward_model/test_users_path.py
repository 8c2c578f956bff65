"""From a folder of images and a CSV of choices to a guided image, by the commands of the documentation."""

import csv
import json
from pathlib import Path

import pytest

from rsm_guidance.cli.main import main
from tests.training.reward_model.worlds import save_pipeline, write_choices

CONFIG = """
pipeline: ./tiny
data:
  path: my_data/choices.csv
  side: 32
  held_out_fraction: 0.25
model:
  blocks: {blocks}
  lora_rank: 2
  head_width: 16
optimizer:
  lr: 3e-3
steps: 50
batch_size: 4
evaluate_every: 25
precision: no
"""


@pytest.mark.parametrize(("family", "blocks"), [("sd3", 1), ("sd15", 4)])
def test_choices_become_a_reward_that_guides(
    family: str, blocks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_pipeline(family, tmp_path / "tiny")
    write_choices(tmp_path / "my_data", ties=2)
    Path("drm.yaml").write_text(CONFIG.format(blocks=blocks))

    with pytest.raises(SystemExit) as stop:
        main(["data", "check", "my_data/choices.csv"])
    assert stop.value.code == 0 and "24 usable, 2 of them ties" in capsys.readouterr().out

    main(["train", "reward", "--config", "drm.yaml", "--out", "drm"])
    accuracy = json.loads(capsys.readouterr().out)["held-out pairs"]
    assert accuracy["0"] == accuracy["0.05"] == 1.0, "held-out pairs, which another colour and prompt made"
    report = json.loads(Path("drm/report.json").read_text())
    assert report["data"]["pairs"] + report["data"]["held_out_pairs"] == 24 and not report["warnings"]
    assert report["config"]["precision"] == "no" and report["config"]["optimizer.lr"] == 3e-3
    settings = json.loads(Path("drm/config.json").read_text())
    assert settings["score_std"] > 0.01 and settings["backbone"] == str(tmp_path / "tiny")
    assert Path("drm/accuracy.png").stat().st_size > 5000 and "| 0.4 | " in Path("drm/README.md").read_text()

    held_out = ["--split", "test", "--held-out-fraction", "0.25", "--levels", "0", "--out", "evaluation"]
    main(["evaluate", "preference", "my_data/choices.csv", "--reward", "./drm", *held_out])
    again = json.loads(Path("evaluation/report.json").read_text())
    assert (
        again["pairs"] == report["data"]["held_out_pairs"] and again["rewards"]["./drm"]["sigma 0"]["accuracy"] == 1.0
    )
    capsys.readouterr()

    call = ["--model", "./tiny", "--reward", "./drm", "--steps", "3", "--height", "32", "--width", "32"]
    main(["sample", "a red thing", *call, "--sampler", "best-of-n", "--candidates", "3", "--out", "best.png"])
    chosen = json.loads(capsys.readouterr().out)
    main(["sample", "a red thing", *call, "--sampler", "none", "--out", "plain.png"])
    plain = json.loads(capsys.readouterr().out)
    assert chosen["reward"] >= plain["reward"] and Path("best.png").exists()
    main(["sample", "a red thing", *call, "--sampler", "stepwise", "--candidates", "2", "--out", "step.png"])
    assert json.loads(capsys.readouterr().out)["reward"] is not None

    names = [f"my_data/images/2_{side}.png" for side in (0, 1)]
    main(["score", *names, "--prompt", "a blue thing", "--reward", "./drm"])
    first, second = [json.loads(line)["score"] for line in capsys.readouterr().out.splitlines()]
    rows = list(csv.DictReader(Path("my_data/choices.csv").read_text().splitlines()))
    assert (second > first) == (rows[2]["label"] == "1")

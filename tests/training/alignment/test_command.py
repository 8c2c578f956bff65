"""`rsm-guidance train align` as a user types it."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rsm_guidance.cli.main import main
from tests.training.alignment.worlds import REDNESS

ROOT = Path(__file__).parents[3]
Family = Callable[[str], Path]


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, output and errors of a command."""
    code = 0
    try:
        main(["train", "align", *words])
    except SystemExit as stop:
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_a_preset_and_options_on_a_model_in_a_folder(family: Family, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"a thing {i}"}) for i in range(3)))
    words = f"""train align --preset ram --form.temperature 0.5 --form.levels 2 --pipeline {family("sd3")} --prompts prompts.jsonl
        --rewards {REDNESS} --gold {REDNESS} --call.height 32 --call.width 32 --rollout.steps 3 --rollout.group 2
        --prompts-per-epoch 2 --epochs 2 --lora.rank 2 --lora.alpha 2 --evaluation.count 2 --evaluation.steps 2 --out lora"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "rsm_guidance", *words.split()],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout)
    assert told["lora"] == "lora" and told["best"]["drift"] > 0 and told["base"]["gold"] == told["base"]["reward"]
    files = {path.name for path in (tmp_path / "lora").iterdir()}
    assert files >= {
        "README.md", "curves.png", "strengths.png", "log.jsonl", "report.json", "samples", "checkpoint-000002",
        "pytorch_lora_weights.safetensors",
    }  # fmt: skip


def test_dry_runs_and_lists(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = said(capsys, "--list-presets")
    listed = json.loads(out)
    assert code == 0 and len(listed) == 27 and listed["ram"]["required"] == ["form.temperature", "form.levels"]
    code, out, _ = said(capsys, "--dry-run")
    assert code == 0 and json.loads(out)["method.paper"].startswith("DiffusionNFT"), "the default method"
    code, out, _ = said(capsys, "--preset=flow-grpo", "--trust.clip", "2e-4", "--dry-run")
    assert json.loads(out)["trust.clip"] == 2e-4 and json.loads(out)["rollout.transition"] == "flow_sde 0.7"
    for path in sorted((ROOT / "configs").glob("*_align_*.yaml")):
        code, out, _ = said(capsys, "--config", str(path), "--dry-run")
        assert code == 0 and json.loads(out)["gradient_checkpointing"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--preset nothing", "there is no preset 'nothing'; choose one of awm,"),
        ("--preset ram", "needs form.temperature and form.levels"),
        ("--preset", "--preset needs a name"),
        ("--preset flow-grpo --rollout.kind ode", "draws none: choose sde"),
        ("--rollout.group 1", "a group of 1 has no advantage"),
        ("--preset crd --form.implicit-strength 1 --micro-batch 7", "nearest that does not is 24"),
        ("--config nowhere.yaml", "cannot read the configuration nowhere.yaml"),
        ("--report-to nothing --dry-run", "there is no tracker 'nothing'"),
        ("--preset dpo --rollout.data nowhere.jsonl", "nowhere.jsonl"),
        ("--pipeline nowhere/at-all --prompts nowhere.txt", "cannot read the prompts file nowhere.txt"),
    ],
)
def test_bad_input_is_one_sentence(
    words: str, says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = said(capsys, *words.split())
    assert code == 2 and not out and says in err and err.count("\n") == 1, err
    assert not list(tmp_path.iterdir())

"""Columns of prompt files reach the rewards that read them, through every command."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rsm_guidance.cli.main import main
from rsm_guidance.data.prompts import chosen, read_prompt_set

FEW = ["--steps", "3", "--device", "cpu"]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = []
    for color, prompt in (("red", "a red star"), ("blue", "a blue circle"), ("white", "a green square")):
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{color}.png")
        rows.append({"prompt": prompt, "reference": str(tmp_path / f"{color}.png"), "tag": color})
    file = tmp_path / "prompts.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def failed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_geneval_metadata_is_prompts_and_columns(tmp_path: Path) -> None:
    include = [{"class": "wine glass", "count": 2}]
    rows = [{"tag": "counting", "include": include, "prompt": "two wine glasses "}, {"prompt": "a dog", "exclude": []}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_prompt_set(tmp_path / "m.jsonl")
    assert found.prompts == ["two wine glasses", "a dog"]
    assert found.columns == {"tag": ["counting", None], "include": [include, None], "exclude": [None, []]}
    assert chosen(found.columns, [1]) == {"tag": [None], "include": [None], "exclude": [[]]}
    assert read_prompt_set(tmp_path / "m.jsonl", 1).prompts == ["two wine glasses"]


def test_score_reads_a_line_for_each_image(prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [str(prompts.with_name(f"{name}.png")) for name in ("red", "red", "white")]
    main(["score", *images, "--prompts", str(prompts), "--reward", "color-histogram"])
    assert [row["score"] for row in lines(capsys)] == pytest.approx([1, 1 / 3, 1])
    main(["score", images[0], "--prompt", "x", "--column", f"reference={images[2]}", "--reward", "color-histogram"])
    assert lines(capsys)[0]["score"] == pytest.approx(1 / 3)


def test_evaluate_and_sample_pass_the_columns(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    common = ["--reward", "color-histogram", *FEW]
    main(["evaluate", "--prompts", str(prompts), "--json", str(out), "--images", str(tmp_path / "made"), *common])
    capsys.readouterr()
    rewards = [image["reward"] for image in json.loads(out.read_text())["images"]]
    made = [str(path) for path in sorted((tmp_path / "made").iterdir())]
    main(["score", *made, "--prompts", str(prompts), "--reward", "color-histogram"])
    assert rewards == pytest.approx([row["score"] for row in lines(capsys)], abs=0.02)
    column = ["--column", f"reference={tmp_path / 'red.png'}"]
    main(["sample", "a red star", "--sampler", "none", "--out", str(tmp_path / "s.png"), *column, *common])
    assert lines(capsys)[0]["reward"] == pytest.approx(rewards[0], abs=0.05)


def test_compare_passes_the_columns_and_goes_on(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    arguments = ["compare", "--prompts", str(prompts), "--samplers", "none,best-of-n", "--budget", "20", "--pairs", "0"]
    arguments += ["--out", str(out), "--reward", "color-histogram", "--monitor", "color:color=red", *FEW]
    main(arguments)
    report = json.loads((out / "report.json").read_text())
    runs = report["runs"]
    assert "bins=16" in report["settings"]["guide"]  # other options are another comparison
    assert runs["best-of-n@20"]["reward"][0] > runs["none"]["reward"][0]
    stamp = {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}
    main(arguments)
    assert stamp == {path: path.stat().st_mtime_ns for path in (out / "runs").glob("*.json")}


def test_missing_columns_and_texts_are_refused_before_anything_is_loaded(
    prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    away = ["--model", "/no/such/model"]  # would be the error, were it looked for
    plain = tmp_path / "plain.txt"
    plain.write_text("a sign\n")
    words = "needs the column 'reference' for every prompt"
    assert words in failed(["sample", "a star", "--reward", "color-histogram", *away], capsys)
    file = ["--prompts", str(plain), "--json", str(tmp_path / "o.json"), *away]
    assert words in failed(["evaluate", "--reward", "0.5 * color-histogram + color", *file], capsys)
    assert "the prompt 'a sign' has none" in failed(["evaluate", "--reward", "ocr", *file], capsys)
    prompts.write_text('{"prompt": "a", "reference": "x.png"}\n{"prompt": "b"}')
    file = ["--prompts", str(prompts), "--out", str(tmp_path / "r"), *away]
    assert "the prompt 'b' has none" in failed(["compare", "--reward", "color-histogram", *file], capsys)
    assert "write one line for each" in failed(["score", str(tmp_path / "red.png"), "--prompts", str(prompts)], capsys)
    assert "sets nothing" in failed(["sample", "a", "--column", "target", *away], capsys)


def test_benchmarks_pass_the_columns(prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--prompts", str(prompts), "--first", "2", "--reward", "color-histogram", *FEW]
    out = tmp_path / "samplers"
    main(
        [
            "benchmark",
            "samplers",
            *common,
            "--samplers",
            "none,best-of-n",
            "--multiples",
            "2",
            "--pairs",
            "0",
            "--out",
            str(out),
        ]
    )
    runs = json.loads((out / "report.json").read_text())["runs"]
    assert len(runs) == 2 and all(0 < score < 1 for r in runs.values() for score in r["rewards"])
    file = tmp_path / "values.json"
    main(["benchmark", "values", *common, "--values", "tweedie", "--runs", "2", "--levels", "0.5", "--out", str(file)])
    assert json.loads(file.read_text())["reward"] == "color-histogram"
    capsys.readouterr()
    (tmp_path / "bare.txt").write_text("a red star\n")
    told = failed(
        ["benchmark", "samplers", "--prompts", str(tmp_path / "bare.txt"), *common[2:], "--out", str(out)], capsys
    )
    assert "column 'reference'" in told

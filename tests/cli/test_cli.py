"""The command line: real commands, files it writes, and one clear sentence with exit code 2 on bad input."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rsm_guidance.cli.main import COMMANDS, main, parse
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.rewards import REWARDS


def nan_reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return torch.full((len(images),), float("nan"))


def broken_reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    raise ValueError("a slip in somebody's reward")


def lines(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """Run a command that must fail with code 2 and one line; return that line."""
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    error = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(error) == 1
    return error[0]


def test_sample_writes_image_and_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, trace = tmp_path / "new" / "out.png", tmp_path / "trace.json"
    command = ["sample", "two red circles and a blue square", "--sampler", "stepwise", "--candidates", "2"]
    main([*command, "--seed", "0", "--steps", "5", "--out", str(out), "--trace", str(trace)])
    [said] = lines(capsys.readouterr().out)
    assert said["image"] == str(out) and said["denoiser_evaluations"] == 10 and said["value_evaluations"] == 9
    record = json.loads(trace.read_text())
    assert len(record["levels"]) == 4 and record["rewards"] == [said["reward"]]
    first = np.array(Image.open(out))
    assert first.shape == (64, 64, 3)
    main([*command, "--seed", "0", "--steps", "5", "--out", str(out)])
    assert np.array_equal(first, np.array(Image.open(out)))
    assert not list(tmp_path.rglob("*.partial*"))


def test_score_gives_one_object_per_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rsm_guidance.shapes.render import Placed, render

    right, wrong = tmp_path / "right.png", tmp_path / "wrong.png"
    Image.fromarray(render([Placed("red", "star", 32, 32, 12)])).save(right)
    Image.fromarray(render([Placed("blue", "cross", 32, 32, 12)])).resize((128, 128)).save(wrong)
    main(["score", str(right), str(wrong), "--prompt", "a red star", "--reward", "shapes-verifier"])
    said = lines(capsys.readouterr().out)
    assert [s["score"] for s in said] == [1.0, 0.0]
    main(["score", str(right), str(wrong), "--prompt", "a red star"])
    by_drm = lines(capsys.readouterr().out)
    assert by_drm[0]["score"] > by_drm[1]["score"]


def test_compare_writes_a_report_within_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(
        ["compare", "a green triangle left of a red star", "--samplers", "none,best-of-n,stepwise", "--budget", "40"]
        + ["--steps", "6", "--images", "2", "--out", str(tmp_path)]
    )
    said = lines(capsys.readouterr().out)
    assert [s["sampler"] for s in said] == ["none", "best-of-n", "stepwise"]
    assert said[0]["evaluations"] < 14 and all(25 < s["evaluations"] <= 40 for s in said[1:])
    assert list(json.loads((tmp_path / "report.json").read_text())["runs"]) == ["none", "best-of-n@40", "stepwise@40"]
    assert Image.open(tmp_path / "comparison.png").size[0] > 300
    assert len(list(tmp_path.glob("runs/stepwise@40*.png"))) == 2


def test_evaluate_is_independent_of_the_batch_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\n\na blue circle\ntwo green crosses\n")
    results = []
    for size in (1, 3):
        out = tmp_path / f"{size}.json"
        main(
            [
                "evaluate",
                "--pipeline",
                "shapes",
                "--prompts",
                str(prompts),
                "--reward",
                "shapes-verifier",
                "--steps",
                "6",
            ]
            + ["--json", str(out), "--batch-size", str(size), "--images", str(tmp_path / str(size))]
        )
        results.append(json.loads(out.read_text()))
    assert [i["prompt"] for i in results[0]["images"]] == ["a red star", "a blue circle", "two green crosses"]
    assert [i["reward"] for i in results[0]["images"]] == [i["reward"] for i in results[1]["images"]]
    assert results[0]["mean_reward"] == pytest.approx(np.mean([i["reward"] for i in results[0]["images"]]))
    pictures = [[np.array(Image.open(p)).astype(int) for p in sorted((tmp_path / s).glob("*.png"))] for s in ("1", "3")]
    assert max(np.abs(a - b).max() for a, b in zip(*pictures, strict=True)) <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", ""], "the prompt is empty"),
        (
            ["sample", "a star", "--sampler", "magic"],
            "unknown sampler 'magic'; choose one of none, best-of-n, stepwise",
        ),
        (["sample", "a star", "--reward", "magic"], "unknown reward 'magic'"),
        (["sample", "a star", "--candidates", "0"], "must be at least 1; got 0"),
        (["sample", "a star", "--sampler", "none", "--candidates", "2"], "has no option 'candidates'"),
        (["sample", "a star", "--noise", "2"], "takes a noise level eta in [0, 1]; got 2.0"),
        (["sample", "a star", "--set", "window=[0.9, 0.1]"], "window must be (low, high)"),
        (["sample", "a star", "--transition", "walk"], "unknown transition 'walk'"),
        (["sample", "a star", "--transition", "ode", "--noise", "0.5"], "takes no noise level"),
        (
            ["sample", "a star", "--set", "trajectories=many"],
            "cannot take trajectories='many': it must be a whole number",
        ),
        (["sample", "a star", "--budget", "5"], "cannot finish one image"),
        (["sample", "a star", "--steps", "0"], "--steps must be at least 1"),
        (["sample", "a star", "--out", "out.xyz"], "names no image format"),
        (["sample", "a star", "--out", "/proc/nowhere/out.png"], "cannot write /proc/nowhere/out.png"),
        (["sample", "a star", "--model", "/no/such/model"], "cannot load a pipeline from '/no/such/model'"),
        (["sample", "a star", "--reward", f"{__name__}:nan_reward", "--steps", "3"], "nan_reward returned nan"),
        (["score", "/no/such.png", "--prompt", "a star"], "cannot read the image /no/such.png"),
        (["evaluate", "--prompts", "/no/such.txt", "--json", "x.json"], "cannot read the prompts file"),
        (["compare", "a star", "--samplers", ","], "names no sampler"),
        (["compare", "a star", "--budget", "3", "--steps", "4"], "is less than the"),
        (["train", "reward", "--config", "/no/such.yaml"], "cannot read the configuration"),
        (["train", "reward", "--config"], "--config needs a YAML file"),
        (["benchmark", "values", "--levels", "0.1,x"], "--levels takes numbers"),
        (["benchmark", "values", "--runs", "1"], "2 runs"),
        (["benchmark", "values", "--prompts", "/no/such.txt"], "cannot read the prompts file"),
        (["benchmark", "values", "--model", "org/other"], "carries no prompts of its own"),
        (["benchmark", "samplers", "--first", "0"], "--first must be at least 1"),
        (["benchmark", "samplers", "--first", "1", "--multiples", "0.5", "--steps", "3"], "multiples, at least 1"),
    ],
)
def test_bad_input_exits_with_2_and_one_sentence(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in fails(capsys, arguments)
    assert not list(tmp_path.glob("**/*.png")) and not list(tmp_path.glob("**/*.partial"))


def test_impossible_training_settings_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["train", "shapes-reward", "--steps", "0"])
    assert stop.value.code == 2 and "steps must be at least 1; got 0" in capsys.readouterr().err


def test_prompt_files_that_hold_nothing_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, content in (
        ("a.txt", b"\n\n"),
        ("b.txt", b"\xff\xfe\x00"),
        ("c.jsonl", b'{"text": "a star"}\n'),
        ("d.jsonl", b'{"prompt": null}\n'),
    ):
        path = tmp_path / name
        path.write_bytes(content)
        assert str(path) in fails(capsys, ["evaluate", "--prompts", str(path), "--json", str(tmp_path / "x.json")])


def test_config_file_is_overridden_by_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(
        "steps: 7\nlr: 1e-4\nbatch-groups: 3\ndata: here\ngroups:\n  siblings: 3\n  steps: 5\n  autocast: false\n"
    )
    for given in (["--config", str(config)], [f"--config={config}"]):
        settings = parse(["train", "shapes-reward", *given, "--groups.steps", "9", "--seed", "4"]).settings
        assert (settings.steps, settings.lr, settings.batch_groups, settings.data) == (7, 1e-4, 3, Path("here"))
        assert (settings.groups.siblings, settings.groups.steps, settings.groups.autocast) == (3, 9, False)
        assert settings.seed == 4 and settings.prompts == 7200
    config.write_text("base:\n  restarts: [3, 4]\n")
    assert parse(["train", "base", "--config", str(config)]).settings.base.restarts == (3, 4)
    for text, words in (
        ("- 1\n", "must be a mapping"),
        ("steps: {", "is not YAML"),
        ("stepz: 3\n", "has no option 'stepz'; did you mean 'steps'? it takes adaptation, batch_groups"),
        (
            "groups:\n  siblingz: 3\n",
            "has no option 'groups.siblingz'; did you mean 'groups.siblings'? it takes autocast, batch_size",
        ),
        ("groups:\n  siblings: many\n", "cannot take groups.siblings='many': it must be a whole number"),
        ("groups:\n  siblings: 1\n", "siblings of groups must be at least 2; got 1"),
        ("adaptation: half\n", "must be one of 'frozen', 'lora', 'full'"),
    ):
        config.write_text(text)
        assert words in fails(capsys, ["train", "shapes-reward", "--config", str(config)])


def test_the_committed_configurations_are_some() -> None:
    for config in (Path(__file__).parents[2] / "configs").glob("*.yaml"):
        aligns = config.read_text(encoding="utf-8").find("\npreset:") > 0
        command = "align" if aligns else "shapes-reward" if "packaged" in config.name else "reward"
        assert parse(["train", command, "--config", str(config), "--out", "x"]).settings.out == Path("x")


def test_corrupt_weights_of_a_pipeline_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rsm_guidance.shapes import model_path

    model = tmp_path / "model"
    shutil.copytree(model_path(), model)
    weights = model / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot load a pipeline" in fails(capsys, ["sample", "a star", "--model", str(model)])


def test_ctrl_c_ends_a_batch_command_without_a_result(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.json"
    prompts.write_text("a red star\na blue circle\n")
    calls = []
    predict = PipelineDenoiser.predict

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(*args, **kwargs)

    monkeypatch.setattr(PipelineDenoiser, "predict", interrupted)
    command = ["evaluate", "--prompts", str(prompts), "--json", str(out), "--steps", "6", "--transition", "ode"]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 130 and len(calls) == 3 and not out.exists()


def test_repeated_prompts_are_independent_of_the_batch_size(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na red star\na blue circle\na red star\n")
    kept = []
    for size in ("1", "4"):
        main(["evaluate", "--prompts", str(prompts), "--json", str(tmp_path / "x.json"), "--steps", "4"]
             + ["--reward", "shapes-verifier", "--batch-size", size, "--images", str(tmp_path / size)])  # fmt: skip
        kept.append([np.array(Image.open(tmp_path / size / f"0000{i}.png")).astype(int) for i in range(4)])
    assert max(np.abs(a - b).max() for a, b in zip(*kept, strict=True)) <= 1
    assert np.abs(kept[0][0] - kept[0][1]).max() > 20 and np.abs(kept[0][1] - kept[0][3]).max() > 20


def test_a_reward_in_the_current_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def size(images, prompts):\n    return images.mean((1, 2, 3))\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    command = [str(Path(sys.executable).with_name("rsm-guidance")), "score", "a.png", "--prompt", "x", "--reward"]
    done = subprocess.run([*command, "mine:size"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert lines(done.stdout)[0]["score"] == 1.0
    done = subprocess.run([*command, "broken:size"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot import 'broken:size': ZeroDivisionError" in done.stderr


def test_a_slip_in_a_reward_keeps_its_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    command = ["score", str(tmp_path / "a.png"), "--prompt", "x", "--reward", f"{__name__}:broken_reward"]
    with pytest.raises(ValueError, match="somebody's reward"):
        main(command)
    (tmp_path / "mine.py").write_text("def bad(images, prompts):\n    return undefined\n")
    done = subprocess.run(
        [sys.executable, "-m", "rsm_guidance", *command[:-1], "mine:bad"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1 and "Traceback" in done.stderr and "line 2, in bad" in done.stderr


def test_debug_shows_the_traceback_of_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["score", "/no/such.png", "--prompt", "x"]
    with pytest.raises(ValueError, match="cannot read the image"):
        main(["--debug", *command])
    with pytest.raises(ValueError, match="cannot read the image"):
        main([*command, "--debug"])
    monkeypatch.setenv("RSM_GUIDANCE_DEBUG", "1")
    with pytest.raises(ValueError, match="cannot read the image"):
        main(command)


def test_a_module_of_this_folder_hides_none_that_is_installed(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong random')\n")
    (tmp_path / "mine.py").write_text(
        "import random\n\ndef size(images, prompts):\n    return images.mean((1, 2, 3))\n"
    )
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    program = str(Path(sys.executable).with_name("rsm-guidance"))
    command = [program, "score", "a.png", "--prompt", "x", "--reward", "mine:size"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert lines(done.stdout)[0]["score"] == 1.0


def test_help_of_the_installed_program_lists_every_command() -> None:
    done = subprocess.run([sys.executable, "-m", "rsm_guidance", "--help"], capture_output=True, text=True, check=True)
    assert "usage" in done.stdout.lower()
    assert all(re.search(rf"• {name} +[A-Z]", done.stdout) for name in COMMANDS)


def test_rewards_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["rewards"])
    shown = capsys.readouterr().out
    assert all(re.search(rf"^{name} +[a-z0-9]+ [a-z]", shown, re.MULTILINE) for name in REWARDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_examples(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    assert stop.value.code == 0 and "usage" in shown.lower()
    assert re.search(rf'^rsm-guidance {command}( ("|out|--|choices)|$)', shown, re.MULTILINE)
    assert "options options" not in shown and "of options" not in shown and "{None}" not in shown


@pytest.mark.parametrize("group", ["train", "benchmark"])
def test_a_group_lists_its_commands(group: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([group, "--help"])
    shown = capsys.readouterr().out
    own = [name.split()[1] for name in COMMANDS if name.startswith(f"{group} ")]
    assert stop.value.code == 0 and own and all(f"• {name}" in shown for name in own)
    with pytest.raises(SystemExit) as stop:
        main([group])
    assert stop.value.code == 2


def test_benchmark_engine_writes_ratios(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "engine.json"
    options = ["--steps", "4", "--repeats", "1", "--candidates", "3", "--size", "32", "--out", str(out)]
    main(["benchmark", "engine", *options])
    [paths] = [m["paths"] for m in json.loads(out.read_text())["models"]]
    assert paths["stock"]["ratio"] == 1 and len(paths) == 5
    assert all(math.isfinite(p["seconds_per_step"]) and p["peak_memory_bytes"] > 1e8 for p in paths.values())
    shown = capsys.readouterr().out
    assert "| stepwise, K=1 |" in shown and "| stepwise, K=3, DRM to the middle |" in shown
    for options, words in (
        (["--steps", "2"], "more than 2 steps"),
        (["--candidates", "1"], "at least 2"),
        (["--offload", "model"], "accelerator"),
    ):
        assert words in fails(capsys, ["benchmark", "engine", *options, "--out", str(out)])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (None, "No such file"),
        ('{"broken', "config.json cannot be used"),
        ("[]", "config.json cannot be used"),
        ("{}", "does not say the adaptation"),
        ('{"backbone": "shapes", "blocks": 4, "adaptation": "full"}', "model.safetensors"),
    ],
)
def test_damaged_reward_models_are_named(
    config: str | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a.png")
    folder = tmp_path / "drm"
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(config)
    said = fails(capsys, ["score", str(tmp_path / "a.png"), "--prompt", "x", "--reward", str(folder)])
    assert f"{folder} is not a diffusion reward model" in said and words in said


def test_outputs_that_cannot_be_written_are_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file.txt").write_text("a star\n")
    assert "it is a folder" in fails(capsys, ["sample", "a star", "--out", str(tmp_path)])
    same = str(tmp_path / "a.png")
    assert "different files" in fails(capsys, ["sample", "a star", "--out", same, "--trace", same])
    assert "is a file; name a folder" in fails(capsys, ["compare", "a star", "--out", str(tmp_path / "file.txt")])


def test_an_interrupted_comparison_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("rsm_guidance.evaluation.compare.compare", interrupted)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "a star", "--out", str(tmp_path / "report")])
    assert stop.value.code == 130 and "run the same command again" in capsys.readouterr().err


def test_benchmark_samplers_compares_at_multiples_of_an_unguided_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red star\na blue circle\na green cross\n")
    options = [
        "--prompts",
        str(prompts),
        "--first",
        "2",
        "--samplers",
        "none,best-of-n",
        "--multiples",
        "2,3",
        "--steps",
        "3",
    ]
    main(
        ["benchmark", "samplers", *options, "--monitor", "shapes-correct", "--pairs", "0", "--out", str(tmp_path / "b")]
    )
    assert "| best-of-n@" in capsys.readouterr().out
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    once = report["settings"]["unguided_cost"]
    assert [run["budget"] for run in report["runs"].values()] == [None, 2 * once, 3 * once]
    assert report["prompts"] == ["a red star", "a blue circle"]


def test_benchmark_values_takes_the_models_own_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "values.json"
    options = ["--first", "6", "--runs", "2", "--levels", "0.5", "--steps", "4", "--values", "tweedie,shapes-drm"]
    main(["benchmark", "values", *options, "--out", str(out)])
    result = json.loads(out.read_text())
    assert result["prompts"] == 6 and list(result["estimators"]) == ["tweedie", "shapes-drm"]
    assert "| shapes-drm |" in capsys.readouterr().out

"""The comparison: equal budgets, resumption, several processes, and what it reports."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

import rsm_guidance as rg
from rsm_guidance.cli.main import main
from rsm_guidance.evaluation import compare as module
from rsm_guidance.evaluation.compare import Comparison, compare
from rsm_guidance.evaluation.generate import Generation
from rsm_guidance.evaluation.report.curves import best_samplers, curves
from rsm_guidance.evaluation.report.tables import comparison_table
from rsm_guidance.rewards import resolve_reward
from rsm_guidance.samplers import parse_sampler

PROMPTS = ["a red star", "two blue circles", "a green cross", "a yellow square", "a photo of a purple cross"]
NAMES = ["none", "best-of-n", "stepwise:trajectories=2"]
MONITORS = {"shapes-correct": resolve_reward("shapes-correct")}


def comparison(out: Path, **options: Any) -> Comparison:
    samplers = {name: parse_sampler(name) for name in NAMES}
    return Comparison(PROMPTS, samplers, (18.0, 30.0), out, pairs=2, shown=2, batch_size=2, chunk=2, **options)


def test_it_reports_every_run_within_its_budget(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel, tmp_path: Path
) -> None:
    report = compare(comparison(tmp_path), guided, Generation(3, 3.0), drm, MONITORS)
    assert list(report["runs"]) == ["none", *(f"{n}@{b}" for n in NAMES[1:] for b in (18, 30))]
    for run in report["runs"].values():
        assert len(run["rewards"]) == len(run["monitored"]["shapes-correct"]) == 5
        assert run["budget"] is None or run["evaluations"] <= run["budget"]
        mean, low, high = run["reward"]
        assert low <= mean <= high and run["diversity"][0] > 0
    assert report["runs"]["best-of-n@30"]["evaluations"] > report["runs"]["best-of-n@18"]["evaluations"]
    assert report["runs"]["none"]["reward_gain"] == [0, 0, 0]
    assert json.loads((tmp_path / "report.json").read_text()) == json.loads(json.dumps(report))
    table = comparison_table(report)
    assert table.count("\n") == 6 and "shapes-correct" in table and "NFE" in table
    for name in ("curves.png", "comparison.png"):
        assert Image.open(tmp_path / name).size[0] > 300


def test_an_interrupted_comparison_goes_on_without_redoing_what_is_done(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compare(comparison(tmp_path / "whole"), guided, Generation(3, 3.0), drm)
    calls: list[int] = []
    generate = module.generate

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return generate(*args, **kwargs)

    monkeypatch.setattr(module, "generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(comparison(tmp_path / "part"), guided, Generation(3, 3.0), drm)
    assert not (tmp_path / "part" / "report.json").exists()
    damaged = next((tmp_path / "part" / "runs").glob("*.json"))
    damaged.write_text("{")
    calls[:] = [0] * 10
    resumed = compare(comparison(tmp_path / "part"), guided, Generation(3, 3.0), drm)
    assert len(calls) - 10 == 20 - 3 + 1, "three chunks were done, one of them was damaged"
    for key, run in whole["runs"].items():
        assert resumed["runs"][key]["rewards"] == run["rewards"]
    calls[:] = [0] * 10
    compare(comparison(tmp_path / "part"), guided, Generation(3, 3.0), drm)
    assert len(calls) == 10, "everything was there"
    other = replace(comparison(tmp_path / "part", seed=1), samplers={"none": parse_sampler("none")})
    compare(other, guided, Generation(3, 3.0), drm)
    assert len(calls) == 14, "another seed is another comparison"


def test_copies_of_a_prompt_differ_across_chunks(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel, tmp_path: Path
) -> None:
    config = replace(
        comparison(tmp_path), prompts=["a red star"] * 5, samplers={"none": parse_sampler("none")}, pairs=0
    )
    report = compare(config, guided, Generation(3, 3.0), drm)
    assert len(set(report["runs"]["none"]["rewards"])) == 5
    assert report["runs"]["none"]["diversity"] is None
    assert "| none |" in (tmp_path / "report.md").read_text()


def report_of(*labels: str, monitors: tuple[str, ...] = ("gold",)) -> dict[str, Any]:
    """A report in which the samplers are the better the later they come, and `none` is the best of all."""
    runs: dict[str, Any] = {}
    for i, label in enumerate(labels):
        for budget in (20, 40):
            score = 9.0 if label == "none" else i + budget / 100
            runs[f"{label}@{budget}"] = {
                "label": label, "evaluations": float(budget), "seconds": budget / 10, "reward": [-score, -score, -score],
                "monitors": {name: [score, score - 0.1, score + 0.1] for name in monitors},
            }  # fmt: skip
    return {"settings": {"monitors": dict.fromkeys(monitors, ""), "guide": "proxy"}, "runs": runs}


def test_at_most_six_samplers_are_named_in_colour_and_the_others_are_grey() -> None:
    labels = ["none", *"abcdefgh"]
    report = report_of(*labels)
    assert best_samplers(report) == ["none", "h", "g", "f", "e", "d"]
    assert best_samplers(report_of(*labels, monitors=())) == ["a", "b", "c", "d", "e", "f"], "by the proxy"
    figure = curves(report)
    legend = [text.get_text() for text in figure.axes[1].get_legend().get_texts()]
    assert legend == ["none", "h", "g", "f", "e", "d", "others"]
    for axis in figure.axes:
        grey = [line for line in axis.lines if line.get_color() == "0.75"]
        assert len(grey) == 3 and len({line.get_color() for line in axis.lines} - {"0.75"}) == 6
    assert [figure.axes[i].get_ylabel() for i in (0, 2)] == ["gold reward: gold", "proxy reward: proxy"]
    few = curves(report_of("a", "b"))
    assert [text.get_text() for text in few.axes[1].get_legend().get_texts()] == ["b", "a"]


@pytest.mark.slow
def test_processes_share_the_work(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS))
    arguments = [
        "compare",
        "--prompts",
        str(prompts),
        "--samplers",
        "none,best-of-n",
        "--budgets",
        "18",
        "--steps",
        "3",
    ]
    arguments += ["--monitor", "shapes-correct", "--pairs", "2", "--out"]
    main([*arguments, str(tmp_path / "one")])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["-m", "rsm_guidance", *arguments, str(tmp_path / "two")]
    done = subprocess.run(launch, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    one, two = (json.loads((tmp_path / n / "report.json").read_text()) for n in ("one", "two"))
    for key, run in one["runs"].items():
        assert two["runs"][key]["rewards"] == pytest.approx(run["rewards"], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one prompt, or --prompts"),
        (["a star", "--prompts", "p.txt"], "give one prompt, or --prompts"),
        (["--prompts", "missing.txt"], "cannot read the prompts file"),
        (["a star", "--budgets", "80,many"], "--budgets takes numbers"),
        (["a star", "--budgets", "5"], "is less than the"),
        (["a star", "--samplers", "none,stepwize"], "unknown sampler 'stepwize'"),
        (["a star", "--monitor", "nobody"], "unknown reward 'nobody'"),
    ],
)
def test_bad_input_is_one_sentence(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(["compare", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err

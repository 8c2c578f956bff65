"""The experiments of the repository: they measure what they say, run as scripts, and their committed results can be read."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.alignment.finetuned import shown as finetuned_table
from benchmarks.branching import Branching, branching_figures, branching_table, run_branching
from benchmarks.exactness import Exactness, discretisation, exactness_table, run_exactness
from benchmarks.guidance import Guidance, guidance_table, run_guidance
from benchmarks.samplers import Samplers, run_samplers, samplers_table
from benchmarks.transitions import Transitions, run_transitions, transitions_table
from rsm_guidance.core.schedule import NoiseSchedule

ROOT = Path(__file__).parents[2]


def test_errors_fall_with_particles_and_best_of_n_overshoots(tmp_path: Path) -> None:
    out = tmp_path / "exactness.json"
    config = Exactness(out, particles=(2, 32), cases=("linear",), steps=20, work=1280, chain=50_000)
    result = run_exactness(config)
    cells = {(c["sampler"], c["schedule"], c["value"], c["particles"]): c for c in result["cells"]}
    for name in ("fk-steering", "psi", "smc"):
        for schedule in ("flow", "vp"):
            few, many = (abs(cells[name, schedule, "exact", k]["reward_error"]) for k in (2, 32))
            assert many < few + 0.03 and many < 0.2
            assert abs(cells[name, schedule, "exact", 32].get("log_z_error", 0.0)) < 0.2
    returned = [cells[n, "flow", "exact", 32]["returned_error"] for n in ("fk-steering", "fk-steering, best (greedy)")]
    assert returned[0] < 0.5 < returned[1], "the best overshoots, a sample does not"
    greedy = cells["best-of-n (greedy)", "flow", "exact", 32]
    assert greedy["reward_error"] > 0.5 and "log_z_error" not in greedy
    assert "| smc | exact |" in exactness_table(result) and out.with_suffix(".png").exists()
    with pytest.raises(ValueError, match="unknown case 'square'"):
        run_exactness(Exactness(out, cases=("square",)))


def test_what_the_levels_cost_vanishes_with_their_number() -> None:
    coarse, fine = (discretisation("linear", NoiseSchedule.flow(steps), 100_000) for steps in (10, 160))
    for key in ("reward", "log_z"):
        assert abs(fine[f"{key}_error"]) < abs(coarse[f"{key}_error"]) / 4
        assert abs(fine[f"{key}_error"]) < 4 * fine[f"{key}_standard_error"] + 0.02


def test_figures_of_branching_where_the_answer_is_known() -> None:
    """Captions differ in their chance p; a branch repeats its run's fate with a chance that grows with the level."""
    rng = np.random.default_rng(0)
    p = rng.beta(2, 2, size=(400, 1))
    good = rng.random((400, 6)) < p
    decided = np.array([0.0, 0.5, 1.0])[:, None, None, None]
    redrawn = rng.random((3, 400, 6, 20)) < p[None, :, :, None]
    branches = np.where(rng.random((3, 400, 6, 20)) < decided, good[None, :, :, None], redrawn)
    figures = branching_figures(good, branches)
    fresh = float((p * (1 - p)).mean() / (1 - p).mean())  # E[p | a run was bad]
    assert figures["fresh"][1] < fresh < figures["fresh"][2]
    for level, (share, undecided) in enumerate(zip(figures["levels"], (1, 0.5, 0), strict=True), 1):
        assert share["level"] == level and share["evaluations"] == 4 - level
        assert share["repaired"][0] == pytest.approx(undecided * fresh, abs=0.02)
        kept = float((p * p).mean() / p.mean())
        assert share["kept"][0] == pytest.approx(1 - undecided + undecided * kept, abs=0.02)
        assert share["advantage"][0] == pytest.approx(undecided * 4 / (4 - level), abs=0.1)
        assert share["advantage"][1] <= share["advantage"][0] <= share["advantage"][2]
    with pytest.raises(ValueError, match="0 of 12 are good"):
        branching_figures(np.zeros((3, 4), bool), np.zeros((2, 3, 4, 1), bool))


def test_late_branches_repair_less(tmp_path: Path) -> None:
    out = tmp_path / "branching.json"
    result = run_branching(Branching(out, captions=8, runs=4, branches=2, steps=6))
    assert json.loads(out.read_text()) == result and out.with_suffix(".png").stat().st_size > 5000
    early, late = result["levels"][0], result["levels"][-1]
    assert late["repaired"][0] < 0.2 < 0.8 < late["kept"][0] and early["repaired"][0] > late["repaired"][0]
    assert "| repaired: branches of bad runs |" in branching_table(result)
    for options, words in (
        ({"runs": 1}, "2 runs"),
        ({"transition": "ode"}, "choose ddim, cps or flow_sde"),
        ({"reward": "shapes-drm"}, "one of images"),
        ({"captions": 2, "runs": 2, "steps": 2, "accept": 7.0}, "0 of 4 are good"),
    ):
        with pytest.raises(ValueError, match=words):
            run_branching(Branching(out, **options))  # type: ignore[arg-type]


def test_samplers_are_compared_at_equal_cost_and_what_is_there_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "samplers.json"
    config = Samplers(out, captions=6, multiples=(2.0,), two_runs=(3.0,), batch_size=6)
    result = run_samplers(config)
    assert list(result["runs"]) == ["none", "none (ode)", "best-of-n 2x", "stepwise 2x", "stepwise, 2 runs 3x"]
    once = result["settings"]["unguided_cost"]
    assert result["runs"]["best-of-n 2x"]["evaluations_per_image"] <= 2 * once + 1e-6
    assert "| stepwise 2x - best-of-n 2x |" in samplers_table(result)
    monkeypatch.setattr("benchmarks.samplers.generate", None)
    assert run_samplers(config) == result
    for options, words in (
        ({"reward": "shapes-correct"}, "diffusion reward model"),
        ({"stepwise": "none"}, "step-wise"),
    ):
        with pytest.raises(ValueError, match=words):
            run_samplers(Samplers(out, **options))  # type: ignore[arg-type]


TABLES = {
    "branching": branching_table,
    "exactness": exactness_table,
    "guidance": guidance_table,
    "samplers": samplers_table,
    "transitions": transitions_table,
}


@pytest.mark.parametrize(("name", "table"), TABLES.items())
def test_committed_results_make_their_tables(name: str, table: Callable[[dict[str, Any]], str]) -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    assert table(result).startswith("| ")


def test_the_page_of_alignment_has_the_committed_figures() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "finetuned.json").read_text())
    page = (ROOT / "docs" / "alignment.md").read_text()
    assert all(line in page for line in finetuned_table(result).splitlines()[2:])


def test_cps_keeps_no_marginals_however_many_levels(tmp_path: Path) -> None:
    names = ("ode", "ddim 1", "flow_sde 1", "glass 4", "cps 0.9")
    result = run_transitions(Transitions(tmp_path / "x.json", names, ("linear",), (20, 160), 4000))
    cells = {(c["transition"], c["schedule"], c["steps"]): c for c in result["cells"]}
    for (name, schedule, steps), cell in cells.items():
        missing = abs(cell["variance_within_modes"] - 1)
        if name == "cps 0.9":
            assert missing > 0.35, (schedule, steps)
        elif steps == 160:
            assert missing < 0.1 and missing < abs(cells[name, schedule, 20]["variance_within_modes"] - 1) + 0.05
    assert ("flow_sde 1", "vp", 20) not in cells and "| cps 0.9 | no | 1.000, 1.000 |" in transitions_table(result)
    assert result["one_step"]["flow_sde 1"]["noise"] > 1.01, "an Euler step, even from the true x0 and eps"
    with pytest.raises(ValueError, match="unknown case 'square'"):
        run_transitions(Transitions(tmp_path / "x.json", cases=("square",)))


def test_damping_on_mixtures_and_the_gap_on_the_embedded_model(tmp_path: Path) -> None:
    config = Guidance(tmp_path / "x.json", ("random",), 300, 3, (1.0,), (2.0,), 12, batch_size=3)
    result = run_guidance(config)
    for cell in result["mixtures"]:
        assert abs(cell["plug-in, damped"][0]) < abs(cell["plug-in"][0]) < abs(cell["unguided"][0])
    assert list(result["runs"]) == ["unguided", "learned value, 1", "plug-in, 1", "plug-in, 1, damping 2"]
    assert len({tuple(found["proxy"]) for found in result["runs"].values()}) == 4, "four different pictures"
    assert "| plug-in, 1, damping 2 |" in guidance_table(result)
    with pytest.raises(ValueError, match="a diffusion reward model"):
        run_guidance(replace(config, reward="shapes-verifier"))


@pytest.mark.parametrize("name", TABLES)
def test_experiments_are_scripts(name: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", f"benchmarks.{name}"]
    shown = subprocess.run([*command, "--help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert f"python -m benchmarks.{name} --" in shown and "--out PATH" in shown


def test_bad_input_of_a_script_is_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.exactness", "--cases", "square", "--out", str(tmp_path / "x.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: unknown case 'square'")

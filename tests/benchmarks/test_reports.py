"""The reports on values and on exactness: they measure what they say."""

import json
from pathlib import Path

import numpy as np
import pytest

from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import Transition
from benchmarks.branching import (
    BranchingBenchmark,
    branching_figures,
    branching_table,
    run_branching_benchmark,
)
from rsm_guidance.evaluation.calibration import ValuesBenchmark, _figures, run_values_benchmark, values_table
from benchmarks.exactness import (
    ExactnessBenchmark,
    discretisation,
    exactness_table,
    run_exactness_benchmark,
)


def test_figures_of_values() -> None:
    rng = np.random.default_rng(0)
    captions, runs = rng.normal(size=(300, 1)) * 3, rng.normal(size=(300, 8))
    final = captions + runs
    perfect = _figures(final, final, True)
    assert perfect == {"correlation": 1.0, "correlation_within_captions": 1.0, "bias": 0.0}
    knows_captions = _figures(np.repeat(captions, 8, 1) + 2 + 1e-3 * rng.normal(size=runs.shape), final, True)
    assert knows_captions["correlation"] > 0.9 and abs(knows_captions["correlation_within_captions"]) < 0.1
    assert knows_captions["bias"] == pytest.approx(2, abs=0.1)
    assert _figures(np.zeros((3, 2)), np.ones((3, 2)), False) == {
        "correlation": None, "correlation_within_captions": None, "bias": None,
    }  # fmt: skip


def test_values_foretell_better_where_there_is_less_noise(tmp_path: Path) -> None:
    out = tmp_path / "values.json"
    result = run_values_benchmark(ValuesBenchmark(out, captions=6, runs=4, steps=8, levels=(0.25, 0.9)))
    assert json.loads(out.read_text()) == result and out.with_suffix(".png").stat().st_size > 5000
    late = {name: figures[-1]["correlation"] for name, figures in result["estimators"].items()}
    assert late["Tweedie"] > 0.5 and set(late) == {"Tweedie", "smoothed, 4", "lookahead, 2", "lookahead, 4", "DRM"}
    assert "| lookahead, 4 | 8.00 |" in values_table(result)
    for options, words in (
        ({"runs": 1}, "2 runs"),
        ({"levels": (0.0,)}, "between 0 and 1"),
        ({"reward": "shapes-drm"}, "function"),
    ):
        with pytest.raises(ValueError, match=words):
            run_values_benchmark(ValuesBenchmark(out, **options))  # type: ignore[arg-type]


def test_errors_fall_with_particles_and_best_of_n_overshoots(tmp_path: Path) -> None:
    out = tmp_path / "exactness.json"
    config = ExactnessBenchmark(out, particles=(2, 32), cases=("linear",), steps=20, work=1280, chain=50_000)
    result = run_exactness_benchmark(config)
    cells = {(c["sampler"], c["schedule"], c["value"], c["particles"]): c for c in result["cells"]}
    for name in ("fk-steering", "fk-steering, vasr", "smc"):
        for schedule in ("flow", "vp"):
            few, many = (abs(cells[name, schedule, "exact", k]["reward_error"]) for k in (2, 32))
            assert many < few + 0.03 and many < 0.2
            assert abs(cells[name, schedule, "exact", 32]["log_z_error"]) < 0.2
    greedy = cells["best-of-n (greedy)", "flow", "exact", 32]
    assert greedy["reward_error"] > 0.5 and "log_z_error" not in greedy
    assert "| smc | exact |" in exactness_table(result) and out.with_suffix(".png").exists()
    with pytest.raises(ValueError, match="unknown case 'square'"):
        run_exactness_benchmark(ExactnessBenchmark(out, cases=("square",)))


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
    result = run_branching_benchmark(BranchingBenchmark(out, captions=8, runs=4, branches=2, steps=6))
    assert json.loads(out.read_text()) == result and out.with_suffix(".png").stat().st_size > 5000
    early, late = result["levels"][0], result["levels"][-1]
    assert late["repaired"][0] < 0.2 < 0.8 < late["kept"][0] and early["repaired"][0] > late["repaired"][0]
    assert "| repaired: branches of bad runs |" in branching_table(result)
    for options, words in (
        ({"runs": 1}, "2 runs"),
        ({"transition": Transition("ode")}, "stochastic transition"),
        ({"reward": "shapes-drm"}, "function of images"),
        ({"captions": 2, "runs": 2, "steps": 2, "accept": 7.0}, "0 of 4 are good"),
    ):
        with pytest.raises(ValueError, match=words):
            run_branching_benchmark(BranchingBenchmark(out, **options))  # type: ignore[arg-type]

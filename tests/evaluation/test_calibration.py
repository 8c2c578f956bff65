"""How well values foretell the final reward: the report measures what it says."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DiffusionPipeline

from rsm_guidance.core.transitions import GLASS
from rsm_guidance.evaluation.calibration import VALUES, Calibration, calibrate, figures_of, value_source
from rsm_guidance.evaluation.generate import Generation
from rsm_guidance.evaluation.report.tables import values_table
from rsm_guidance.io.names import model_prompts
from rsm_guidance.rewards import resolve_reward
from rsm_guidance.values import Lookahead

GENERATION = Generation(8, 3.0)


def test_figures_of_values() -> None:
    rng = np.random.default_rng(0)
    prompts, runs = rng.normal(size=(300, 1)) * 3, rng.normal(size=(300, 8))
    final = prompts + runs
    perfect = figures_of(final, final, True)
    assert perfect == {"correlation": 1.0, "correlation_within_prompts": 1.0, "bias": 0.0}
    knows_prompts = figures_of(np.repeat(prompts, 8, 1) + 2 + 1e-3 * rng.normal(size=runs.shape), final, True)
    assert knows_prompts["correlation"] > 0.9 and abs(knows_prompts["correlation_within_prompts"]) < 0.1
    assert knows_prompts["bias"] == pytest.approx(2, abs=0.1)
    assert figures_of(np.zeros((3, 2)), np.ones((3, 2)), False) == {
        "correlation": None, "correlation_within_prompts": None, "bias": None,
    }  # fmt: skip


def test_values_foretell_better_where_there_is_less_noise(guided: DiffusionPipeline, tmp_path: Path) -> None:
    out, values = tmp_path / "values.json", (*VALUES, "shapes-drm")
    config = Calibration(model_prompts("shapes", 6), out, values, runs=4, levels=(0.25, 0.9), batch_size=4)
    result = calibrate(config, guided, GENERATION, resolve_reward("shapes-verifier"))
    assert json.loads(out.read_text()) == result and out.with_suffix(".png").stat().st_size > 5000
    late = {name: figures[-1]["correlation"] for name, figures in result["estimators"].items()}
    assert late["tweedie"] > 0.5 and list(late) == list(values)
    assert [f["bias"] is None for f in result["estimators"]["shapes-drm"]] == [True, True], "in units of its own"
    assert "| lookahead:steps=4 | 8.00 |" in values_table(result)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runs": 1}, "2 runs"),
        ({"levels": (0.0,)}, "between 0 and 1"),
        ({"prompts": []}, "at least 1 prompt"),
        ({"values": ()}, "no value to compare"),
    ],
)
def test_impossible_calibrations_are_refused(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=words):
        Calibration(**{"prompts": ["a star"], "out": tmp_path / "x.json"} | options)


def test_what_cannot_be_watched_is_refused(guided: DiffusionPipeline, tmp_path: Path) -> None:
    config = Calibration(["a star"], tmp_path / "x.json", levels=(0.1,), transition=GLASS(4))
    with pytest.raises(ValueError, match="do not stop at level 1"):
        calibrate(config, guided, GENERATION, resolve_reward("shapes-verifier"))
    with pytest.raises(ValueError, match="a reward of images"):
        calibrate(config, guided, GENERATION, resolve_reward("shapes-drm", guided))


def test_estimators_take_options() -> None:
    assert value_source("lookahead:steps=4", None) == Lookahead(4)  # type: ignore[arg-type]
    for text, words in (
        ("lookahead:step=4", "has no option 'step'"),
        ("lookahead:steps=four", "cannot take steps='four': it must be a whole number"),
        ("lookahead:steps", "sets nothing"),
        ("foresight", "unknown reward 'foresight'"),
    ):
        with pytest.raises(ValueError, match=words):
            value_source(text, None)  # type: ignore[arg-type]

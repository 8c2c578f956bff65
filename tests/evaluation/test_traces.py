"""Every sampler's trace can be drawn, survives JSON, and names what it returned."""

import json
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from PIL import Image

import rsm_guidance as rg
from rsm_guidance.cli.main import main
from rsm_guidance.evaluation.report.traces import draw_trace, write_trace_picture
from rsm_guidance.samplers import SAMPLERS, make_sampler


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n != "none"])
def test_every_sampler_can_be_drawn(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel, name: str, tmp_path: Path
) -> None:
    options = {"trajectories": 2} if name == "reward-gradient" else {}
    prompts = ["a red star", "two blue circles"]
    out = guided(
        prompts, sampler=make_sampler(name, **options), reward=drm, seed=0, num_inference_steps=5, guidance_scale=3.0
    )
    trace = json.loads(json.dumps(out.trace, allow_nan=False))
    assert trace["sampler"]["name"] == name and trace["prompts"] == prompts
    assert trace["rewards"] == pytest.approx(out.rewards)
    for row in (0, 1):
        figure = draw_trace(trace, row)
        assert sum(len(axis.lines) + len(axis.collections) for axis in figure.axes) > 0
        assert prompts[row] in figure.get_suptitle()
    if "candidates" in trace and "chosen" in trace["candidates"]:
        for rewards, chosen, returned in zip(
            trace["candidates"]["rewards"], trace["candidates"]["chosen"], out.rewards, strict=True
        ):
            assert rewards[chosen] == pytest.approx(returned, abs=1e-4)
    path = tmp_path / "trace.svg"
    write_trace_picture(path, trace)
    assert path.read_text().startswith("<?xml")


def test_what_cannot_be_drawn_says_so(guided: DiffusionPipeline, drm: rg.DiffusionRewardModel) -> None:
    out = guided("a star", sampler="none", reward=drm, seed=0, num_inference_steps=3)
    with pytest.raises(ValueError, match="compared nothing"):
        draw_trace(out.trace)
    with pytest.raises(ValueError, match="there is no image 3"):
        draw_trace(out.trace, 3)


def test_the_command_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "trace.png"
    arguments = ["sample", "a red star", "--steps", "5", "--out", str(tmp_path / "o.png"), "--plot"]
    main([*arguments, str(plot), "--sampler", "fk-steering", "--set", "particles=6", "threshold=1"])
    assert Image.open(plot).size[0] > 500
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, str(tmp_path / "trace.gif")])
    assert stop.value.code == 2 and "name a .png or .svg file" in capsys.readouterr().err

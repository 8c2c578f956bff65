"""The documented families: shims, cards and table agree, load, and cover what the conformity suite proves."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
from diffusers import DiffusionPipeline

import rsm_guidance as rg
from rsm_guidance import pipelines
from rsm_guidance.cli.families import probe
from rsm_guidance.cli.main import main
from rsm_guidance.engine.families import why_not
from rsm_guidance.pipelines.catalog import BEGIN, END, FAMILIES, card, shim, table
from tests.zoo import ZOO
from tests.zoo.more import MORE

ROOT = Path(__file__).parents[2]
LOAD = """
import json, sys
from diffusers import DiffusionPipeline
from rsm_guidance import custom_pipeline
for name, folder in json.loads(sys.argv[1]).items():
    pipe = DiffusionPipeline.from_pretrained(
        folder, custom_pipeline=custom_pipeline(name), trust_remote_code=True, safety_checker=None
    )
    assert type(pipe).__module__ == "rsm_guidance.pipelines.guided", type(pipe)
    print(name, type(pipe).__name__)
"""


def test_shims_cards_and_table_are_those_of_the_families() -> None:
    assert {p.parent.name for p in (ROOT / "pipelines").glob("*/pipeline.py")} == FAMILIES.keys()
    for name in FAMILIES:
        assert (ROOT / "pipelines" / name / "pipeline.py").read_text() == shim(name)
        assert (ROOT / "pipelines" / name / "README.md").read_text() == card(name)
    assert (ROOT / "docs" / "families.md").read_text().split(BEGIN)[1].split(END)[0] == table()


def test_every_documented_family_can_be_driven_and_is_proven() -> None:
    proven = {type(s.build()).__name__ for s in ZOO.values()}
    for family in FAMILIES.values():
        assert why_not(family.cls) is None, family
    assert {f.pipeline for f in FAMILIES.values()} <= proven


def test_every_exported_class_with_one_scheduler_step_can_be_made() -> None:
    made = 0
    for name in dir(diffusers):
        base = getattr(diffusers, name, None)
        if not (inspect.isclass(base) and issubclass(base, DiffusionPipeline)) or base is DiffusionPipeline:
            continue
        if "deprecated" in base.__module__ or inspect.getsource(base.__call__).count("scheduler.step(") != 1:
            continue
        guided = getattr(pipelines, f"RewardGuided{name}")
        assert issubclass(guided, base)
        names = list(inspect.signature(guided.__call__).parameters)
        stock = [p.name for p in inspect.signature(base.__call__).parameters.values() if p.kind is not p.VAR_KEYWORD]
        assert names[: names.index("sampler")] == stock
        made += 1
    assert made > 200
    with pytest.raises(AttributeError):
        _ = pipelines.RewardGuidedNothing


def saved(name: str, folder: Path) -> str:
    """A tiny pipeline of a family, as a folder."""
    specimen = next(s for s in ZOO.values() if type(s.build()) is FAMILIES[name].cls)
    specimen.build().save_pretrained(folder)
    return str(folder)


def load_in_a_fresh_process(folders: dict[str, str], cache: Path) -> list[str]:
    """Load folders through their shims, one after the other; the names that were loaded."""
    env = os.environ | {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, json.dumps(folders)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.split()[::2]


# The stand-in for the vision processor of Qwen-Image-Edit cannot be saved.
LOADABLE = [name for name in FAMILIES if name != "qwen_image_edit"]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOADABLE)
def test_each_shim_loads_in_a_process_of_its_own(name: str, tmp_path: Path) -> None:
    assert load_in_a_fresh_process({name: saved(name, tmp_path / "model")}, tmp_path / "modules") == [name]


@pytest.mark.slow
def test_all_shims_load_one_after_the_other_in_one_process(tmp_path: Path) -> None:
    folders = {name: saved(name, tmp_path / name) for name in LOADABLE}
    assert load_in_a_fresh_process(folders, tmp_path / "modules") == LOADABLE


def test_probe_tells_what_a_folder_can_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["families"])
    listed = capsys.readouterr().out
    assert all(name in listed for name in FAMILIES)
    assert probe(rg.shapes.model_path()) == [
        "StableDiffusion3Pipeline: can be guided, as custom_pipeline('stable_diffusion_3')",
        "FlowMatchEulerDiscreteScheduler: every sampler",
    ]
    folder = tmp_path / "heun"
    pipe = ZOO["sd15"].build()
    pipe.scheduler = diffusers.HeunDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(folder)
    assert "more than once per level" in probe(str(folder))[1]
    for part in folder.glob("*/*.safetensors"):
        part.unlink()
    assert "as far as its class tells (no weights" in probe(str(folder))[0]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text('{"_class_name": "MyOwnPipeline"}')
    for model, words in ((tmp_path / "other", "does not export"), (tmp_path / "gone", "no such folder")):
        with pytest.raises(SystemExit) as stop:
            main(["families", str(model)])
        assert stop.value.code == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("text_to_video", "TextToVideoSDPipeline: cannot be guided: its scheduler.step is given latents of shape"),
        (
            "sd15_thresholding",
            "none and best-of-n with the transition 'scheduler' (it clips its estimates at a quantile",
        ),
        (
            "flux_control_img2img",
            "FluxControlImg2ImgPipeline: can be guided, as reward_guided(FluxControlImg2ImgPipeline)",
        ),
    ],
)
def test_a_folder_with_weights_is_tried(name: str, words: str, tmp_path: Path) -> None:
    MORE[name].build().save_pretrained(tmp_path)
    assert words in "\n".join(probe(str(tmp_path)))

"""The wheel is complete: built, installed in a clean environment, and run from another directory."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_wheel_carries_everything_and_runs_elsewhere(tmp_path: Path) -> None:
    """The dependencies come from this environment; the package itself only from the wheel."""
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)],
        check=True,
        capture_output=True,
    )
    [wheel] = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for needed in (
        "rsm_guidance/py.typed",
        "rsm_guidance/pipelines/shims/stable_diffusion_3/pipeline.py",
        "rsm_guidance/shapes/weights/model/model_index.json",
        "rsm_guidance/shapes/weights/drm/model.safetensors",
        "rsm_guidance/shapes/weights/lora/pytorch_lora_weights.safetensors",
        "rsm_guidance/training/alignment/presets/diffusion-nft.yaml",
    ):
        assert needed in names
    assert not [n for n in names if n.startswith("tests/")]

    clean = tmp_path / "clean"
    venv.create(clean, with_pip=True)
    python = clean / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel], check=True, capture_output=True
    )
    [site] = (clean / "lib").glob("python*/site-packages")
    ours = [p for p in sys.path if p.endswith("site-packages")]
    # Dependencies only: a .pth line adds a directory to the path without processing that directory's own .pth files,
    # so this environment's editable install of the package stays out.
    (site / "dependencies.pth").write_text("\n".join(ours) + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_MODULES_CACHE": str(tmp_path / "modules")}

    def run(*arguments: str) -> str:
        done = subprocess.run([python, *arguments], cwd=elsewhere, env=env, capture_output=True, text=True, check=True)
        return done.stdout

    assert str(site) in run("-c", "import rsm_guidance; print(rsm_guidance.__file__)")
    run("-m", "rsm_guidance", "sample", "two red circles and a blue square", "--candidates", "2", "--steps", "4")
    assert (elsewhere / "out.png").is_file()
    code = (
        "from diffusers import DiffusionPipeline; from rsm_guidance import custom_pipeline, shapes; "
        "path = custom_pipeline('stable_diffusion_3'); "
        "pipe = DiffusionPipeline.from_pretrained(shapes.model_path(), custom_pipeline=path, trust_remote_code=True); "
        "print(path, type(pipe).__qualname__)"
    )
    assert f"{site}/rsm_guidance/pipelines/shims/stable_diffusion_3 RewardGuided" in run("-c", code)

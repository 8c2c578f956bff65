"""Files and folders appear whole or not at all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from rsm_guidance.io import files
from rsm_guidance.io.fingerprint import fingerprint


def broken(path: Path) -> None:
    path.write_text("half")
    raise OSError("No space left on device")


def test_a_failed_write_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "made" / "result.json"
    files.write_json(path, {"step": 1})
    with pytest.raises(OSError, match="No space"):
        files.write_atomically(path, broken)
    assert json.loads(path.read_text()) == {"step": 1}
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_json_is_strict_and_says_where_it_is_not(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "trace.json"
    with pytest.raises(ValueError, match=r"cannot write .*trace.json: .* levels\[1\].ess is one"):
        files.write_json(path, {"levels": [{"ess": 1.0}, {"ess": bad, "later": bad}]})
    assert not path.exists()
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises((ValueError, RecursionError)):
        files.write_json(path, loop)


def test_tensors_of_any_layout_are_written_with_metadata(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensor = torch.arange(6.0, requires_grad=True).view(2, 3).T
    files.write_tensors(path, {"x": tensor}, {"made_by": "a test"})
    assert torch.equal(load_file(path)["x"], tensor)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"made_by": "a test"}


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    folder = tmp_path / "state"
    files.replace_folder(folder, lambda f: (f / "a").write_text("1"))
    files.replace_folder(folder, lambda f: (f / "b").write_text("2"))
    assert [p.name for p in folder.iterdir()] == ["b"]
    with pytest.raises(OSError, match="No space"):
        files.replace_folder(folder, lambda f: broken(f / "c"))
    assert [p.name for p in folder.iterdir()] == ["b"]
    files.replace_folder(folder, lambda f: (f / "d").write_text("3"))  # what failed is not mixed in
    assert [p.name for p in folder.iterdir()] == ["d"] and [p.name for p in tmp_path.iterdir()] == ["state"]


def test_a_crash_at_any_move_leaves_a_folder_to_recover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, real = tmp_path / "state", os.replace
    files.replace_folder(folder, lambda f: (f / "a").write_text("old"))
    for crash_at in (1, 2):
        calls = []

        def crashing(source: Path, target: Path, at: int = crash_at, calls: list[Path] = calls) -> None:
            calls.append(source)
            if len(calls) == at:
                raise KeyboardInterrupt
            real(source, target)

        monkeypatch.setattr(os, "replace", crashing)
        with pytest.raises(KeyboardInterrupt):
            files.replace_folder(folder, lambda f: (f / "a").write_text("new"))
        monkeypatch.undo()
        assert files.recover_folder(folder) and (folder / "a").read_text() == "old"
    assert not files.recover_folder(tmp_path / "never")


def test_reading_files_needs_no_model_library() -> None:
    code = "import sys, rsm_guidance.io.files; print(sorted({'torch', 'numpy', 'PIL', 'diffusers'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_images_are_read_as_they_were_written(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    files.write_image(tmp_path / "a.png", Image.fromarray(pixels))
    read = files.read_image(tmp_path / "a.png")
    assert read.shape == (1, 3, 5, 7) and torch.equal(
        (read[0] * 255).round().byte(), torch.from_numpy(pixels).permute(2, 0, 1)
    )
    assert files.read_image(tmp_path / "a.png", (14, 10)).shape == (1, 3, 10, 14)
    (tmp_path / "b.png").write_text("no image")
    with pytest.raises(ValueError, match="cannot read the image"):
        files.read_image(tmp_path / "b.png")
    with pytest.raises(ValueError, match="names no image format"):
        files.require_image_name(tmp_path / "c.txt")
    with pytest.raises(ValueError, match="it is a folder"):
        files.require_image_name(tmp_path)


def test_prompts_are_read_from_lines_or_json_lines(tmp_path: Path) -> None:
    plain, rows = tmp_path / "p.txt", tmp_path / "p.jsonl"
    plain.write_text(" a cat \n\na dog\n", encoding="utf-8")
    rows.write_text('{"prompt": "a cat", "id": 1}\n{"prompt": "a dog"}\n', encoding="utf-8")
    assert files.read_prompts(plain) == files.read_prompts(rows) == ["a cat", "a dog"]
    for text, why in (
        ('{"prompt": 3}', "must be a text"),
        ('{"text": "x"}', "with a 'prompt'"),
        ("", "holds no prompts"),
    ):
        rows.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=why):
            files.read_prompts(rows)


def test_a_fingerprint_tells_weights_apart_and_forgets_their_precision() -> None:
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    assert fingerprint(a) != fingerprint(b) and len(fingerprint(a)) == 16
    b.load_state_dict(a.half().state_dict())
    assert fingerprint(a) == fingerprint(b)
    with torch.no_grad():
        b.bias.copy_(-b.bias)  # a sum of magnitudes would not notice
    assert fingerprint(a) != fingerprint(b)

"""Damaged and strange files end commands with exit code 2 and one sentence, or with a right result."""

import os
import random
from pathlib import Path

import pytest
import torch
from PIL import Image

from rsm_guidance.io.files import read_image
from tests.robustness.damage import ODD, damaged, run

COUNT = int(os.environ.get("RSM_ROBUSTNESS", "0")) or 110


@pytest.mark.slow
def test_damaged_files(tmp_path: Path) -> None:
    ended = dict(run(COUNT, tmp_path))
    assert not {name: end.fault + end.error[-300:] for name, end in ended.items() if end.fault}
    assert {end.code for end in ended.values()} >= {0, 2}, "some damage does no harm, most is refused"


def test_all_kinds_and_all_ways_come_up(tmp_path: Path) -> None:
    names = [name.partition(": ")[2] for name, _, _ in damaged(300, tmp_path / "made")]
    assert len({name.partition(",")[0] for name in names}) == 11
    assert all(any(name.endswith(way) for name in names) for way in ODD)


@pytest.mark.parametrize("way", ["16 bits", "CMYK", "1x1", "animated", "turned", "palette", "one bit", "transparent"])
def test_strange_pictures_are_read_as_a_viewer_shows_them(way: str, tmp_path: Path) -> None:

    path = tmp_path / "i.png"
    ODD[way](path, random.Random(0))
    read = read_image(path)
    with Image.open(path) as file:
        size = file.size[::-1] if way == "turned" else file.size
        plain = file.convert("RGBA" if way == "transparent" else "RGB") if way != "16 bits" else None
    assert read.shape == (1, 3, size[1], size[0]) and 0 <= read.min() and read.max() <= 1
    if way not in ("16 bits", "turned"):
        assert plain is not None
        shown = torch.tensor(list(plain.getdata()), dtype=torch.float32)[:, :3].T.reshape(read.shape) / 255
        assert torch.allclose(read, shown, atol=1 / 254)

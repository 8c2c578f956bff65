"""Ten thousand rows are streamed: memory does not grow with their number."""

import random
import tracemalloc
from pathlib import Path

import pyarrow as pa
import pytest

from rsm_guidance.data.preferences import PreferenceFiles, check_preferences, read_preferences
from tests.data.layouts import images_in, pick, write_lines, write_parquet

ROWS, MEGABYTE = 10_000, 1_000_000


def peak(data: PreferenceFiles) -> float:
    """The most memory, in megabytes, that a pass over the records holds, in Python and in Arrow."""
    arrow, most = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        count = 0
        for count, _ in enumerate(data.records(), 1):  # noqa: B007 - counted
            if count % 50 == 0:
                most = max(most, pa.total_allocated_bytes() - arrow)
        assert count == ROWS
        return (tracemalloc.get_traced_memory()[1] + most) / MEGABYTE
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("group", [500, ROWS])
def test_parquet_with_images_inside(tmp_path: Path, group: int) -> None:
    rng = random.Random(0)
    path = tmp_path / "train-00000-of-00001.parquet"
    rows = [
        pick(0) | {"caption": f"p{i}", "jpg_0": rng.randbytes(4000), "jpg_1": rng.randbytes(4000)} for i in range(ROWS)
    ]
    write_parquet(path, rows, row_group_size=group)
    del rows
    assert path.stat().st_size > 75 * MEGABYTE
    assert peak(read_preferences(path)) < 32


def test_lines_and_lists_of_files(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i} " * 100, "path1": f"{i}a.png", "path2": f"{i}b.png"} for i in range(ROWS)]
    path = write_lines(tmp_path / "train.jsonl", rows)
    assert path.stat().st_size > 4 * MEGABYTE
    assert peak(read_preferences(path)) < 2
    listed = tmp_path / "train.json"
    listed.write_text("[" + ",\n".join(path.read_text().splitlines()) + "]")
    assert peak(read_preferences(listed)) < 8  # a block of a megabyte is read at a time


def test_a_check_keeps_no_images(tmp_path: Path) -> None:
    images_in(tmp_path, *(f"{i}.png" for i in range(100)))
    rows = [{"prompt": f"p{i}", "chosen": f"{i % 100}.png", "rejected": f"{(i + 1) % 100}.png"} for i in range(1000)]
    data = read_preferences(write_lines(tmp_path / "a.jsonl", rows))
    tracemalloc.start()
    report = check_preferences(data)
    assert report.usable == 1000 and tracemalloc.get_traced_memory()[1] < 2 * MEGABYTE
    tracemalloc.stop()

"""Small data sets in the layouts in which they are published."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rsm_guidance.data.preferences import Preference, PreferenceFiles, Problem
from tests.data.pictures import encoded, number_of, put


def write_parquet(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, **options)
    return path


def write_json(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data))
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def pick(number: int, labels: tuple[float, float] = (1.0, 0.0), **other: Any) -> dict[str, Any]:
    """A row of Pick-a-Pic."""
    return {
        "are_different": True,
        "best_image_uid": "u0",
        "caption": f"prompt {number}",
        "has_label": True,
        "image_0_uid": f"u{number}a",
        "image_0_url": "https://gone.example/0.png",
        "image_1_uid": f"u{number}b",
        "image_1_url": "https://gone.example/1.png",
        "jpg_0": encoded(2 * number),
        "jpg_1": encoded(2 * number + 1),
        "label_0": labels[0],
        "label_1": labels[1],
        "model_0": "a",
        "model_1": "b",
        "ranking_id": 5,
        "user_id": 6,
        "num_example_per_prompt": 1,
        "__index_level_0__": number,
    } | other


def read(data: PreferenceFiles) -> tuple[list[Preference], list[Problem]]:
    records = list(data.records())
    problems = [record for record in records if isinstance(record, Problem)]
    return [record for record in records if not isinstance(record, Problem)], problems


def compared(preference: Preference) -> tuple[str, int, int, float]:
    """The prompt, the numbers of both images, the better one first, and its probability."""
    p = preference if preference.probability >= 0.5 else preference.swapped()
    return p.prompt, number_of(p.first.load()), number_of(p.second.load()), round(p.probability, 6)


def images_in(folder: Path, *names: str, first: int = 10) -> None:
    """Files of these names whose images have the numbers `first`, `first` + 1, ..."""
    for number, name in enumerate(names, first):
        put(folder / name, number)

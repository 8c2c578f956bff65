"""HPDv2 (Wu et al. 2023, arXiv:2306.09341): pairs for training, ranked lists for testing; images under train/ and test/."""

from collections.abc import Iterator
from typing import Any

from rsm_guidance.data.preferences.formats.base import (
    Format,
    Reading,
    columns,
    each,
    image,
    number,
    ranked,
    text,
    value_of,
)
from rsm_guidance.data.preferences.problems import BadRow, Reason
from rsm_guidance.data.preferences.record import Preference
from rsm_guidance.data.preferences.rows import Row


def _pairs(row: Row, how: Reading) -> Iterator[Preference]:
    prompt = text(row, "prompt")
    paths = value_of(row, "file_path", "image_path")
    votes, ranks = row.values.get("human_preference"), row.values.get("rank")
    given = ranks if votes is None else votes
    if not isinstance(paths, list) or not isinstance(given, list):
        raise BadRow(
            Reason.NO_FIELD, "lists are needed: 'file_path' and 'human_preference', or 'image_path' and 'rank'"
        )
    images = [image(row, path, row.file.stem) for path in paths]
    yield from ranked(row, prompt, images, _ranks(votes, ranks), source="hpdv2")


def _ranks(votes: Any, ranks: Any) -> list[float]:
    """Numbers of which the lower is better."""
    if votes is None:
        return [number(r, "rank") for r in ranks]
    numbers = [-number(v, "human_preference") for v in votes]
    if not any(numbers):
        raise BadRow(Reason.BAD_LABEL, f"'human_preference' prefers no image: {votes}")
    return numbers


FORMAT = Format(
    "HPDv2: comparisons and ranked lists of image files",
    columns(
        "prompt file_path human_preference",
        "prompt image_path human_preference",
        "prompt file_path rank",
        "prompt image_path rank",
    ),
    each(_pairs),
    ("ymhao/HPDv2",),
    "unpack train.tar.gz and test.tar.gz beside train.json and test.json",
)

"""Prompts with the columns that rewards read besides: GenEval's metadata, the text that an image should show."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsm_guidance.io.files import read_prompt_rows


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and columns with one entry for each; None where a line of the file had none.

    Attributes:
        prompts: at least one.
        columns: by name.
    """

    prompts: list[str]
    columns: dict[str, list[Any]] = field(default_factory=dict)


def read_prompt_set(path: Path, first: int | None = None) -> PromptSet:
    """Prompts of a text file, or of JSON lines, whose other fields are columns.

    Args:
        path: UTF-8, one prompt per line, or a JSON object with a "prompt" per line (.jsonl).
        first: at most so many.

    Raises:
        ValueError: if the file is missing, not UTF-8, empty, or a line has no prompt.
    """
    rows = read_prompt_rows(path)[:first]
    names = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    return PromptSet([row["prompt"] for row in rows], {name: [row.get(name) for row in rows] for name in names})


def chosen(columns: Mapping[str, Sequence[Any]], rows: Sequence[int]) -> dict[str, list[Any]]:
    """The entries of some rows."""
    return {name: [values[row] for row in rows] for name, values in columns.items()}

"""Rows of tables, streamed: JSON lines, one JSON list, CSV, parquet.

A row that cannot be read is a problem with its place, and reading goes on behind it where the file allows that.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsm_guidance.core.errors import UsageError
from rsm_guidance.data.preferences.problems import Problem, Reason

_BLOCK = 1 << 20
_BETWEEN = re.compile(r"[\s,]+")
_LONGEST = 1 << 26  # a JSON object that does not end within 64 MiB is broken


@dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        file: where it stands.
        place: where in it, as reports say it.
        values: by column.
    """

    file: Path
    place: str
    values: Mapping[str, Any]


def rows(path: Path) -> Iterator[Row | Problem]:
    """The rows of a file, by its ending: .jsonl, .json, .csv, .tsv or .parquet.

    Raises:
        UsageError: if the file cannot be opened, or has another ending.
    """
    if path.suffix.lower() not in TABLES:
        raise UsageError(f"{path} is no table that can be read; its ending must be one of {', '.join(TABLES)}")
    try:
        yield from TABLES[path.suffix.lower()](path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


def _json_lines(path: Path) -> Iterator[Row | Problem]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            place = f"{path.name}, line {number}"
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                if text.strip():
                    yield _row(path, place, json.loads(text))
            except (ValueError, RecursionError) as error:
                yield Problem(place, Reason.MALFORMED, f"no JSON object: {error}")


def _json(path: Path) -> Iterator[Row | Problem]:
    """The objects of one list, or, as some publish them under this ending, one a line."""
    with path.open("rb") as file:
        start = file.read(_BLOCK).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    yield from _json_list(path) if start == b"[" else _json_lines(path)


def _json_list(path: Path) -> Iterator[Row | Problem]:
    decoder, number = json.JSONDecoder(), 1
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        text, at = file.read(_BLOCK), 0
        at = text.index("[") + 1
        while True:
            place = f"{path.name}, item {number}"
            between = _BETWEEN.match(text, at)
            at = between.end() if between else at
            if text.startswith("]", at):
                return
            try:
                item, end = decoder.raw_decode(text, at)
                whole, why = end < len(text), "a number at its end"  # which may go on
            except (ValueError, RecursionError) as error:
                whole, why = False, str(error)
            if whole:
                at, number = end, number + 1
                yield _row(path, place, item)
                continue
            block = file.read(_BLOCK) if len(text) - at < _LONGEST else ""
            if not block:
                why = "the file ends within its list" if at == len(text) else f"no JSON: {why}"
                yield Problem(place, Reason.MALFORMED, f"{why}; nothing is read from here on")
                return
            text, at = text[at:] + block, 0


def _csv(path: Path) -> Iterator[Row | Problem]:
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.reader(file, delimiter=_delimiter(path), strict=True)
        header: list[str] | None = None
        while True:
            place = f"{path.name}, line {reader.line_num + 1}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield Problem(place, Reason.MALFORMED, f"quotes that do not match: {error}")
                continue
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = [name.strip() for name in cells]
            elif len(cells) != len(header):
                yield Problem(place, Reason.MALFORMED, f"{len(cells)} cells under {len(header)} columns")
            elif any("\ufffd" in cell for cell in cells):
                yield Problem(place, Reason.MALFORMED, "not UTF-8; save the table as UTF-8")
            else:
                yield Row(path, place, dict(zip(header, cells, strict=True)))


def _delimiter(path: Path) -> str:
    """What separates cells: the most frequent of comma, semicolon and tab in the first line."""
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        header = file.readline()
    return max(",;\t", key=header.count)


def _parquet(path: Path) -> Iterator[Row | Problem]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError('parquet files are read with pyarrow: pip install "rsm-guidance[data]"') from error
    try:
        file = pq.ParquetFile(path, pre_buffer=False, buffer_size=_BLOCK)
    except pa.ArrowException as error:
        yield Problem(path.name, Reason.MALFORMED, f"no parquet file: {_first_line(error)}")
        return
    first = 0
    with file:
        for group in range(file.num_row_groups):
            number, first = first, first + file.metadata.row_group(group).num_rows
            try:
                for batch in file.iter_batches(batch_size=32, row_groups=[group]):
                    for values in batch.to_pylist():
                        number += 1
                        yield Row(path, f"{path.name}, row {number}", values)
            except (pa.ArrowException, OSError) as error:
                lost = f"rows {number + 1} to {first} cannot be read: {_first_line(error)}"
                yield Problem(f"{path.name}, row {number + 1}", Reason.MALFORMED, lost)


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _row(path: Path, place: str, values: Any) -> Row | Problem:
    if isinstance(values, dict):
        return Row(path, place, values)
    return Problem(place, Reason.MALFORMED, f"an object with named fields is needed; got {str(values)[:60]!r}")


TABLES = {".jsonl": _json_lines, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}

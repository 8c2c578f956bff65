"""What a format is, and what readers of several formats share."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from rsm_guidance.core.random import derive_seed
from rsm_guidance.data.preferences.problems import BadRow, Problem, Reason
from rsm_guidance.data.preferences.record import ImageSource, Preference
from rsm_guidance.data.preferences.rows import Row


@dataclass(frozen=True)
class Reading:
    """How rows become preferences.

    Attributes:
        seed: names the order of the two images where a format always puts the better one first.
        min_confidence: rows below it, or without one, are left out by formats that state it; None keeps all.
    """

    seed: int = 0
    min_confidence: float | None = None


Found = Iterator[Preference | Problem]
Read = Callable[[Iterable[Row | Problem], Reading], Found]


@dataclass(frozen=True)
class Format:
    """A layout of preference data.

    Attributes:
        title: what it is, in words.
        columns: sets of columns, one of which a table of this format has; empty for what is no table.
        read: rows to preferences.
        hub: the hub ids of data sets in this format.
        note: what to do after such a data set has been downloaded.
        optional: further columns that are read, where others are told to the user; None where they are common.
    """

    title: str
    columns: tuple[frozenset[str], ...]
    read: Read
    hub: tuple[str, ...] = ()
    note: str = ""
    optional: frozenset[str] | None = None

    def matches(self, columns: Iterable[str]) -> bool:
        """Whether a table with these columns is of this format."""
        return any(needed <= set(columns) for needed in self.columns)

    def unused(self, columns: Iterable[str]) -> list[str]:
        """The columns of a table that are not read, where that may be a slip of its author."""
        if self.optional is None:
            return []
        known = self.optional.union(*(needed for needed in self.columns if needed <= set(columns)))
        return [column for column in columns if column not in known]


def columns(*names: str) -> tuple[frozenset[str], ...]:
    """Sets of columns, each written "a b c"."""
    return tuple(frozenset(name.split()) for name in names)


def each(pairs: Callable[[Row, Reading], Iterator[Preference]]) -> Read:
    """A reader of tables in which every row stands for itself."""

    def read(rows: Iterable[Row | Problem], how: Reading) -> Found:
        for row in rows:
            if isinstance(row, Problem):
                yield row
                continue
            try:
                found = list(pairs(row, how))
            except BadRow as error:
                yield error.at(row.place)
            else:
                yield from found

    return read


def text(row: Row, *names: str) -> str:
    """The first of some columns that the row has.

    Raises:
        BadRow: if it has none, or that is no text.
    """
    value = value_of(row, *names)
    if not isinstance(value, str) or not value.strip():
        raise BadRow(Reason.NO_FIELD, f"{names[0]!r} must be a text; got {value!r}")
    return value.strip()


def value_of(row: Row, *names: str) -> Any:
    """The first of some columns that the row has and that is not empty.

    Raises:
        BadRow: if it has none.
    """
    found = next((row.values[n] for n in names if row.values.get(n) not in (None, "")), None)
    if found is None:
        raise BadRow(Reason.NO_FIELD, " or ".join(map(repr, names)))
    return found


def number(value: Any, name: str) -> float:
    """A finite number, also where a table holds it as text.

    Raises:
        BadRow: naming the column, if it is none.
    """
    try:
        result = float(value)
    except (TypeError, ValueError, OverflowError):
        result = math.nan
    if not math.isfinite(result) or isinstance(value, bool):
        raise BadRow(Reason.BAD_LABEL, f"{name!r} must be a number; got {value!r}")
    return result


def share(first: Any, second: Any, names: str) -> float:
    """Share of the votes that go to the first image; votes are not negative, and there is one.

    Raises:
        BadRow: for others.
    """
    a, b = number(first, names), number(second, names)
    if a < 0 or b < 0 or not a + b > 0:
        raise BadRow(Reason.BAD_LABEL, f"{names} must be votes, at least one; got {first!r} and {second!r}")
    return a / (a + b)


def optional(row: Row, name: str) -> str:
    """A column as text, "" where the row does not have it."""
    value = row.values.get(name)
    return "" if value is None else str(value)


def rated(row: Row, names: Mapping[str, tuple[str, str]]) -> dict[str, tuple[float, float]]:
    """Scores of both images by dimension, from two columns each, where both hold a number."""
    found = {}
    for dimension, pair in names.items():
        a, b = (row.values.get(column) for column in pair)
        if isinstance(a, int | float) and isinstance(b, int | float) and math.isfinite(a) and math.isfinite(b):
            found[dimension] = float(a), float(b)
    return found


def image(row: Row, value: Any, *folders: str, stale: bool = False) -> ImageSource:
    """The image that a cell holds: bytes, a struct of bytes and path, or a path relative to the table's folder.

    Args:
        row: of the cell.
        value: of the cell.
        folders: further places to look in, relative to the table's folder.
        stale: whether folders in paths may be out of date, so that the base name is looked for beside the table first.

    Raises:
        BadRow: if it holds none.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray):
        return ImageSource(Path(row.place), bytes(value))
    if not isinstance(value, str) or not value.strip():
        raise BadRow(Reason.NO_FIELD, f"an image is needed, as a path or bytes; got {value!r}")
    if value.startswith(("http://", "https://")):
        raise BadRow(Reason.MISSING, f"{value} is an address; download the images")
    base = row.file.parent
    places = [base / value, *(base / folder / value for folder in folders)]
    if stale:
        places.insert(0, base / Path(value).name)
    return ImageSource(next((p for p in places if _is_file(p)), places[-1] if stale else places[0]))


def ranked(
    row: Row,
    prompt: str,
    images: Sequence[ImageSource],
    ranks: Sequence[float],
    **extra: Any,
) -> Iterator[Preference]:
    """All pairs of a list of images with ranks: the lower is preferred, equal ones tie.

    The pairs of a list weigh 1 together, as in ImageReward's loss (Xu et al. 2023, equation 1).

    Args:
        row: for its place.
        prompt: of all images.
        images: [N], at least two.
        ranks: [N], 1 best.
        extra: further attributes of all pairs; `scores` are [N] mappings from dimension to number.

    Raises:
        BadRow: if there are not as many ranks as images, or there is no pair.
    """
    if len(images) != len(ranks) or len(images) < 2:
        raise BadRow(Reason.BAD_LABEL, f"{len(images)} images and {len(ranks)} ranks make no comparison")
    scores: Sequence[Mapping[str, float]] = extra.pop("scores", [{}] * len(images))
    pairs = list(combinations(range(len(images)), 2))
    for i, j in pairs:
        both = {name: (scores[i][name], scores[j][name]) for name in scores[i].keys() & scores[j].keys()}
        label = 0.5 if ranks[i] == ranks[j] else float(ranks[i] < ranks[j])
        common = {"weight": 1 / len(pairs), "place": row.place, "scores": both, **extra}
        yield Preference(prompt, images[i], images[j], label, **common)


def shuffled(preference: Preference, how: Reading) -> Preference:
    """The images in an order that chance decides: a stream named by the seed, the prompt and the images.

    For formats that put the better image first, so that its place tells nothing.
    """
    names = [i.path.name if i.data is None else i.content() for i in (preference.first, preference.second)]
    swap = derive_seed("order", how.seed, preference.prompt, *names) % 2
    return preference.swapped() if swap else preference


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a null character
        return False

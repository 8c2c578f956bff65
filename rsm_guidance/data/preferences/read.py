"""Preferences from files of any known format, streamed."""

import difflib
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from rsm_guidance.core.errors import UsageError
from rsm_guidance.data.preferences.files import choose_split, is_pair_folder, tables_of
from rsm_guidance.data.preferences.formats import FORMATS, Reading, folder
from rsm_guidance.data.preferences.problems import Problem, Tally
from rsm_guidance.data.preferences.record import Preference
from rsm_guidance.data.preferences.rows import Row, rows
from rsm_guidance.data.preferences.split import part_of

_LOOKED_AT = 100


@dataclass(frozen=True)
class PreferenceFiles:
    """Preferences that are read anew at every pass, with no more than a few rows in memory.

    Iterating gives those that can be read and warns once, at the end, of the rows that cannot, by reason.

    Attributes:
        files: tables, in order; or the one folder of pairs.
        format: name of the format.
        split: the published split, or the part by prompt; "" for all there is.
        part: whether `split` is a part by prompt.
        how: how rows become preferences.
        test_fraction: expected share of the prompts in the part "test".
    """

    files: tuple[Path, ...]
    format: str
    split: str = ""
    part: bool = False
    how: Reading = Reading()
    test_fraction: float = 0.05

    def __iter__(self) -> Iterator[Preference]:
        tally = Tally()
        yield from accepted(self.records(), tally.add)
        if tally.unusable:
            first = f"; first: {tally.kept[0]}"
            warnings.warn(f"{self.files[0]}: {tally.unusable} rows skipped ({tally}){first}", stacklevel=2)

    def records(self) -> Iterator[Preference | Problem]:
        """Preferences, and the problems of rows that are none, in the order of the files."""
        found = FORMATS[self.format].read(_rows(self.files), self.how)
        if not self.part:
            return found
        return (r for r in found if isinstance(r, Problem) or self._is_in_part(r))

    def unused_columns(self) -> list[str]:
        """Columns of one's own table that are not read, such as misspelt ones."""
        first = next((row for row in _rows(self.files) if isinstance(row, Row)), None)
        return [] if first is None else FORMATS[self.format].unused(list(first.values))

    def _is_in_part(self, preference: Preference) -> bool:
        return part_of(preference.prompt, self.test_fraction, self.how.seed) == self.split

    def __str__(self) -> str:
        files = self.files[0].name if len(self.files) == 1 else f"{len(self.files)} files"
        what = f", {'part' if self.part else 'split'} {self.split!r}" if self.split else ""
        return f"{FORMATS[self.format].title} ({files}{what})"


def read_preferences(
    spec: str | Path,
    split: str | None = None,
    format: str | None = None,
    *,
    seed: int = 0,
    min_confidence: float | None = None,
    test_fraction: float = 0.05,
) -> PreferenceFiles:
    """Preferences from a file or folder, whose format is recognised by its files and columns.

    Args:
        spec: a table (.jsonl, .json, .csv, .tsv, .parquet), a folder with `w/` and `l/`, or the folder of a published
            data set.
        split: of data sets that publish splits, one of them (default: "train", or the only one).  Of others, "train" or
            "test", a division by a hash of the prompt and the seed; default: everything.
        format: one of `FORMATS`, where it should not be recognised.
        seed: names the division, and the order of the two images where a format puts the better one first.
        min_confidence: rows below it are left out, of formats that state a confidence.
        test_fraction: expected share of the prompts in "test".

    Raises:
        UsageError: if there is nothing to read, or its format is not known; for a hub id, saying what to download.
    """
    if format is not None and format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, 1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"there is no format {format!r}{meant} Choose one of {', '.join(FORMATS)}")
    how = Reading(seed, min_confidence)
    part_of("", test_fraction)  # refuses fractions that are none
    if format == "folder" or (format is None and is_pair_folder(spec)):
        if not is_pair_folder(spec):
            raise UsageError(f"{spec} is no folder with w/ and l/ in it")
        files, part, name = [Path(spec).expanduser()], split is not None, "folder"
    else:
        tables = tables_of(spec)
        part = split is not None and list(tables) == [""]
        split, files = (split, tables[""]) if part else choose_split(tables, split, spec)
        name = _recognised(files, format)
    if part and split not in ("train", "test"):
        raise UsageError(f"{spec} has no splits of its own, so that the split is 'train' or 'test'; got {split!r}")
    return PreferenceFiles(tuple(files), name, split or "", part, how, test_fraction)


def accepted(
    records: Iterable[Preference | Problem], on_problem: Callable[[Problem], object] | None = None
) -> Iterator[Preference]:
    """The preferences among records; problems go to the function."""
    for record in records:
        if not isinstance(record, Problem):
            yield record
        elif on_problem is not None:
            on_problem(record)


def _rows(files: Iterable[Path]) -> Iterator[Row | Problem]:
    return chain.from_iterable(folder.rows_of(f) if f.is_dir() else rows(f) for f in files)


def _recognised(files: Iterable[Path], format: str | None) -> str:
    """The name of the format of some tables, by the columns of the first row that fits one, among the first rows."""
    read: list[Row | Problem] = []
    for row in islice(_rows(files), _LOOKED_AT):
        read.append(row)
        if isinstance(row, Row):
            fits = [name for name, f in FORMATS.items() if format in (None, name) and f.matches(row.values)]
            if fits:
                return fits[0]
    first = next((row for row in read if isinstance(row, Row)), None)
    if first is not None:
        raise UsageError(f"{first.file} has the columns {', '.join(map(str, first.values))}; {_needed(format)}")
    why = f": {read[0]}" if read else ""
    raise UsageError(f"{', '.join(map(str, files))} holds no rows that can be read{why}")


def _needed(format: str | None) -> str:
    if format is not None:
        known = [" ".join(sorted(c)) for c in FORMATS[format].columns]
        return f"the format {format!r} needs {' or '.join(known)}"
    return (
        "no known format has those.  A table needs prompt, chosen, rejected, or prompt, image_0, image_1, label; "
        f"published formats are {', '.join(FORMATS)}"
    )

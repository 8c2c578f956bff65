"""The commands `data ...`."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rsm_guidance.core.errors import UsageError

if TYPE_CHECKING:
    from rsm_guidance.data.preferences.check import Report


@dataclass(frozen=True)
class DataCheck:
    """Read preference data row by row, decode every image, and say what is wrong.

    Exits with 0 if all rows can be used, 1 if some cannot, 2 if none can.

    rsm-guidance data check choices.csv

    rsm-guidance data check pickapic_v2 --split test --json report.json
    """

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """Table (.jsonl, .json, .csv, .tsv, .parquet), folder of w/ and l/, or folder of a published data set."""
    split: str | None = None
    """A published split, or "train" or "test" by prompt; default: "train" where splits are published, else everything."""
    format: str | None = None
    """Name of the format, where it should not be recognised."""
    min_confidence: float | None = None
    """Rows below it are left out, of formats that state a confidence."""
    limit: int = 20
    """Problems to list."""
    tokenizer: str | None = None
    """Folder or hub id of a tokenizer or pipeline, to count tokens with; default: the fewest that CLIP could make."""
    json: Path | None = None
    """JSON file for the report."""

    def run(self) -> None:
        if self.limit < 0:
            raise UsageError(f"--limit must not be negative; got {self.limit}")
        from tqdm.auto import tqdm

        from rsm_guidance.data.preferences import check_preferences, read_preferences
        from rsm_guidance.data.preferences.check import CLIP_TOKENS
        from rsm_guidance.io.files import require_writable, write_json

        if self.json is not None:
            require_writable(self.json)
        data = read_preferences(self.file, self.split, self.format, min_confidence=self.min_confidence)
        print(data)
        count_tokens, most = (None, CLIP_TOKENS) if self.tokenizer is None else _tokens(self.tokenizer)
        with tqdm(unit="row", leave=False) as bar:
            report = check_preferences(data, self.limit, count_tokens, most, bar.update)
        print("\n".join(_listed(report) + _summary(report)))
        if self.json is not None:
            write_json(self.json, _as_json(report))
        raise SystemExit(report.exit_code)


def _listed(report: "Report") -> list[str]:
    tally = report.problems
    more = tally.unusable - len(tally.kept)
    return [*map(str, tally.kept), *([f"... and {more} more"] if more else [])]


def _summary(report: "Report") -> list[str]:
    """A table of reasons, what can be used, and notes."""
    width = max(map(len, report.problems.counts), default=0)
    lines = [""] if report.problems.counts else []
    for reason, count in report.problems.counts.most_common():
        lines.append(f"{reason:{width}}  {count:>8}{'  (left out by rule)' if reason.harmless else ''}")
    lines.append("")
    lines.append(f"rows         {report.rows}, {report.unusable_rows} of them with problems")
    lines.append(f"preferences  {report.usable} usable, {report.ties} of them ties")
    lines.append(f"prompts      {report.prompts}")
    sizes = [f"{size[0]} x {size[1]}" for size in (report.smallest, report.largest) if size is not None]
    lines.append(f"images       {report.images}" + (f", from {' to '.join(sizes)} pixels" if sizes else ""))
    return lines + [f"note: {note}" for note in report.notes()]


def _as_json(report: "Report") -> dict[str, object]:
    return {
        "data": report.data,
        "rows": report.rows,
        "rows_with_problems": report.unusable_rows,
        "preferences": report.usable,
        "ties": report.ties,
        "prompts": report.prompts,
        "images": report.images,
        "reasons": {str(reason): count for reason, count in report.problems.counts.items()},
        "problems": [{"place": p.place, "reason": str(p.reason), "detail": p.detail} for p in report.problems.kept],
        "notes": report.notes(),
    }


def _tokens(name: str) -> tuple[Callable[[str], int], int]:
    """How to count the tokens of a prompt with a tokenizer, and its limit."""
    from transformers import AutoTokenizer

    from rsm_guidance.io.names import model_location

    location = model_location(name)
    subfolder = "tokenizer" if (Path(location) / "tokenizer").is_dir() else ""
    try:
        tokenizer = AutoTokenizer.from_pretrained(location, subfolder=subfolder)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"cannot load a tokenizer from {name}: {error}") from error
    return lambda prompt: len(tokenizer(prompt)["input_ids"]), tokenizer.model_max_length

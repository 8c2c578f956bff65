"""One command line, run in process in a folder, and what is wrong with how it ended."""

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rsm_guidance.cli.main import main

ON_A_SCREEN = 600  # characters
PATIENCE = 8.0  # seconds that a command of these sizes may take
_LIMIT = 30.0
_BAR = re.compile(r"\[\d\d:\d\d.*/s|s/[a-z]+")  # a progress bar
_HALF = (".partial", ".new", ".old")


class Hang(BaseException):
    """A command that did not end within the limit."""


@dataclass(frozen=True)
class Trial:
    """What became of a command line.

    Attributes:
        words: the command line.
        code: exit code; None for an exception that came through.
        said: what it wrote to the standard error, without progress bars.
        raised: the exception that came through, with its last lines; "" if none.
        seconds: how long it took.
        before, after: files of the folder, by path, and what is in them.
    """

    words: list[str]
    code: int | None
    said: str
    raised: str
    seconds: float
    before: dict[str, str]
    after: dict[str, str]
    folder: Path

    def faults(self, names: Iterable[str] = (), codes: tuple[int, ...] = (0, 2), refused: bool = True) -> list[str]:
        """What is wrong with it: kinds of faults, none for a refusal in one sentence or a result.

        Args:
            names: of which a refusal must say at least one; empty for any refusal.
            codes: exit codes that are right here.
            refused: whether the code 2 is a refusal, and not the verdict of `data check`.
        """
        found = []
        if self.raised:
            found.append("hang" if self.raised.startswith("Hang") else "traceback")
        elif self.code not in codes:
            found.append("wrong exit code")
        if self.seconds > PATIENCE:
            found.append("slow")
        if self.code == 2 and refused:
            sentence = self.said
            if len(sentence) > ON_A_SCREEN or sentence.strip().count("\n"):
                found.append("longer than a screen or a sentence")
            if "Traceback" in sentence:
                found.append("traceback in the refusal")
            if names and not any(name in sentence for name in names):
                found.append("names no file")
            if self.before != self.after:
                found.append("files left behind or changed")
        if any(part in path for path in self.after.keys() - self.before.keys() for part in _HALF):
            found.append("half-written file")
        return found + _not_strict(self.folder, self.after.keys() - self.before.keys())


def attempt(words: list[str], folder: Path) -> Trial:
    """Run a command line in a folder."""
    out, err, raised = io.StringIO(), io.StringIO(), ""
    code: int | None = 0
    before, began = contents(folder), time.perf_counter()
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limited(_LIMIT):
        try:
            main(words)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except (Exception, Hang) as error:
            code = None
            last = [f"{f.filename.rpartition('/')[2]}:{f.lineno}" for f in traceback.extract_tb(error.__traceback__)]
            raised = f"{type(error).__name__}: {str(error)[:300]} [{' '.join(last[-6:])}]"
    seconds = time.perf_counter() - began
    lines = [line for line in err.getvalue().splitlines() if line.strip() and not _BAR.search(line)]
    start = next(
        (i for i, line in enumerate(lines) if line.startswith("rsm-guidance: ")), 0
    )  # warnings may stand before
    return Trial(words, code, "\n".join(lines[start:]), raised, seconds, before, contents(folder), folder)


def contents(folder: Path) -> dict[str, str]:
    """The files of a folder, by path, with a hash of what is in them."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = Path(root, name)
            regular = path.is_file() and not path.is_symlink()
            what = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest() if regular else "-"
            found[str(path.relative_to(folder))] = what
    return found


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `Hang` in the main thread when the time is over."""

    def ring(number: int, frame: object) -> None:
        raise Hang(f"after {seconds:g} s")

    before, timer = signal.signal(signal.SIGALRM, ring), signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)


def _not_strict(folder: Path, paths: Iterable[str]) -> list[str]:
    def refuse(constant: str) -> None:
        raise ValueError(constant)

    for path in paths:
        if path.endswith(".json") and (folder / path).is_file():
            try:
                json.loads((folder / path).read_text(), parse_constant=refuse)
            except ValueError:
                return ["JSON that is not strict"]
    return []


def counts(faults: Iterable[list[str]]) -> str:
    """How often each kind of fault was found, as one line."""
    kinds = Counter(kind for found in faults for kind in found)
    return ", ".join(f"{kind} {count}" for kind, count in kinds.most_common()) or "no fault"

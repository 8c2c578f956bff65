"""How a command ended, and what is wrong with that."""

import contextlib
import io
import json
import os
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import diffusers
import huggingface_hub
from PIL import Image

from rsm_guidance.cli.main import main

ON_A_SCREEN = 1600
SECONDS = 40


@dataclass(frozen=True)
class Outcome:
    """Exit code, what was written to the error stream, and what is wrong: "" if nothing is."""

    code: int
    error: str
    fault: str


class _Slow(BaseException):
    pass


def outcome(words: list[str], folder: Path) -> Outcome:
    """Run a command in a folder, in this process.

    Exit code 0 wants whole files, 2 (`data check`: and 1) wants one sentence, and that nothing was written.
    """
    here, before, code, fault = Path.cwd(), set(folder.rglob("*")), 0, ""
    error, output = io.StringIO(), io.StringIO()
    os.chdir(folder)
    try:
        with contextlib.redirect_stderr(error), contextlib.redirect_stdout(output), _limited():
            main(words)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except _Slow:
        fault = "slow"
    except BaseException as raised:
        at = traceback.extract_tb(raised.__traceback__)[-1]
        fault = f"traceback: {type(raised).__name__}: {str(raised)[:100]} ({Path(at.filename).name}:{at.lineno})"
    finally:
        os.chdir(here)
    said, left = error.getvalue(), set(folder.rglob("*")) - before
    sentence = next((line for line in reversed(said.splitlines()) if line.startswith("rsm-guidance: ")), "")
    if not fault and code not in ((0, 1, 2) if words[0] == "data" else (0, 2)):
        fault = f"exit code {code}"
    elif not fault and code == 2:
        if left:
            fault = f"left {sorted(p.name for p in left)}"
        elif not 0 < len(told := sentence or said or output.getvalue()) < ON_A_SCREEN or "Traceback" in said:
            fault = f"a refusal of {len(told)} characters"
    return Outcome(code, said, fault or next((f for p in left if (f := broken(p))), ""))


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """Seconds of computing, whatever else the machine does, and ten times as many of waiting."""

    def end(*_: object) -> None:
        raise _Slow

    before = [signal.signal(number, end) for number in (signal.SIGPROF, signal.SIGALRM)]
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.alarm(10 * SECONDS)
    try:
        with mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True):
            yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in zip((signal.SIGPROF, signal.SIGALRM), before, strict=True):
            signal.signal(number, handler)
        diffusers.utils.logging.enable_progress_bar()


def _strict(constant: str) -> None:
    raise ValueError(constant)


def broken(path: Path) -> str:
    """What is wrong with a file that a command has written."""
    if ".partial" in path.name or path.name.endswith(".new"):
        return f"half-written {path.name}"
    try:
        if path.suffix == ".json" and path.is_file():
            json.loads(path.read_text(encoding="utf-8"), parse_constant=_strict)
        if path.suffix == ".png":
            with Image.open(path) as image:
                image.load()
    except (OSError, ValueError) as error:
        return f"broken {path.name}: {error}"
    return ""

"""What is interrupted or killed loses nothing, and goes on."""

import functools
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.robustness.kills import JOBS, Job, finish, killed, start, whole
from tests.robustness.outcome import broken


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[float, Any]]:
    """How long a job takes, and what it makes, once for all tests."""
    return functools.cache(lambda name: whole(name, tmp_path_factory.mktemp(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", JOBS)
def test_what_is_killed_goes_on(name: str, tmp_path: Path, undisturbed: Any) -> None:
    assert [wrong for _, wrong in killed(name, 1, tmp_path, undisturbed(name), seed=1)] == [""]


LONG = Job(("sample", "a red star", "--steps", "400", "--reward", "shapes-verifier", "--out", "o.png", "--trace", "t.json",
            "--sampler", "best-of-n:candidates=1000:batch_rows=1"), lambda folder: None)  # fmt: skip


def _signalled(process: "subprocess.Popen[str]", number: int, there: Path, ready: str) -> tuple[int, str]:
    deadline = time.monotonic() + 60
    while not list(there.glob(ready)) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(number)
    error: Any = process.communicate(timeout=60)[1]
    return process.returncode, error


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), [("compare", signal.SIGINT), ("train", signal.SIGTERM)])
def test_signals_end_long_runs_whole_and_they_go_on(
    name: str, number: signal.Signals, tmp_path: Path, undisturbed: Any
) -> None:
    job, there = JOBS[name], tmp_path / "run"
    code, error = _signalled(
        start(job, there), number, there, {"compare": "report/runs/*", "train": "run/state/checkpoint-*"}[name]
    )
    assert code in (0, 128 + number) and "Traceback" not in error
    assert not [fault for path in there.rglob("*") if (fault := broken(path))]
    if code:
        assert "rsm-guidance: interrupted" in error
    finish(start(job, there))
    assert job.made(there) == undisturbed(name)[1]


@pytest.mark.slow
@pytest.mark.parametrize(("number", "ignored"), [(signal.SIGINT, False), (signal.SIGTERM, True)])
def test_signals_keep_the_best_so_far_of_a_sampler(number: signal.Signals, ignored: bool, tmp_path: Path) -> None:
    """SIGTERM even where Ctrl-C is ignored, as in the background of a script."""
    process = start(LONG, tmp_path, ignored)
    time.sleep(6)  # by when some candidates are finished
    process.send_signal(number)
    error = process.communicate(timeout=60)[1]
    assert process.returncode in (0, 128 + number) and "Traceback" not in error, error[-500:]
    if process.returncode == 0:
        assert not broken(tmp_path / "o.png")
        assert json.loads((tmp_path / "t.json").read_text())["ledger"]["stopped"] == "interrupted"

"""`kill -9` at random moments, and the run that goes on: `python -m tests.robustness.kills --moments 40`.

Each command is run once undisturbed; then again and again in fresh folders, killed at a random moment, and run to its end.  What
it has made then must be what the undisturbed run made.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.robustness.outcome import broken

TINY = (
    "{prompts: 8, validation_prompts: 4, steps: 20, batch_groups: 2, evaluate_every: 5, blocks: 1, head_width: 8, "
    "groups: {steps: 3, siblings: 2, autocast: false, batch_size: 2}}"
)


@dataclass(frozen=True)
class Job:
    """A command, and what of its results has to be the same in every run."""

    words: tuple[str, ...]
    made: Callable[[Path], Any]


def _report(folder: Path) -> Any:
    """A comparison without what depends on the clock."""
    found = json.loads((folder / "report/report.json").read_text())
    return {key: (run["reward"], run["evaluations"]) for key, run in found["runs"].items()}


def _trained(folder: Path) -> Any:
    history = json.loads((folder / "run/report.json").read_text())["history"]
    return history, (folder / "run/model/model.safetensors").read_bytes()


JOBS = {
    "sample": Job(
        ("sample", "a red star", "--steps", "6", "--reward", "shapes-verifier", "--out", "o.png", "--sampler",
         "tree-search:simulations=40:tree_file=t.safetensors"),
        lambda folder: (folder / "o.png").read_bytes(),
    ),
    "compare": Job(
        ("compare", "a red star", "--steps", "6", "--images", "2", "--batch-size", "1", "--samplers",
         "none,best-of-n,stepwise,svdd", "--budget", "40", "--pairs", "0", "--out", "report"),
        _report,
    ),
    "train": Job(("train", "shapes-reward", "--config", "tiny.yaml", "--out", "run"), _trained),
}  # fmt: skip


def start(job: Job, folder: Path, ignored: bool = False) -> "subprocess.Popen[str]":
    """The command in a process of its own, which may be told to ignore Ctrl-C, whatever this one is told."""
    folder.mkdir(exist_ok=True)
    (folder / "tiny.yaml").write_text(TINY)
    env = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), env.get("PYTHONPATH", "")])
    words = [sys.executable, "-m", "rsm_guidance", *job.words]
    held = signal.signal(signal.SIGINT, signal.SIG_IGN if ignored else signal.default_int_handler)
    try:
        return subprocess.Popen(words, cwd=folder, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    finally:
        signal.signal(signal.SIGINT, held)


def finish(process: "subprocess.Popen[str]") -> str:
    """What a process says on its error stream; it must end well."""
    error = process.communicate(timeout=120)[1]
    assert process.returncode == 0, error[-500:]
    return error


def whole(name: str, folder: Path) -> tuple[float, Any]:
    """How many seconds a job takes undisturbed, and what it makes."""
    began = time.monotonic()
    finish(start(JOBS[name], folder))
    return time.monotonic() - began, JOBS[name].made(folder)


def killed(
    name: str, moments: int, folder: Path, undisturbed: tuple[float, Any], seed: int = 0
) -> Iterator[tuple[float, str]]:
    """For each moment, seconds into the run, what was lost or broken; "" if nothing was."""
    job, (seconds, expected) = JOBS[name], undisturbed
    rng = random.Random(f"{name}|{seed}")
    for number in range(moments):
        there, moment = folder / str(number), rng.uniform(0.15, 1.0) * seconds
        process = start(job, there)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        process.communicate()
        left = [f for p in there.rglob("*") if ".partial" not in p.name and ".new" not in str(p) and (f := broken(p))]
        finish(start(job, there))
        remains = [str(p.relative_to(there)) for p in there.rglob("*") if ".partial" in p.name or p.suffix == ".new"]
        same = job.made(there) == expected
        wrong = [*left, *(f"{p} remains" for p in remains), *([] if same else ["the result is another one"])]
        yield moment, "; ".join(wrong)
        shutil.rmtree(there)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=40)
    count, failed = parser.parse_args().moments, 0
    with tempfile.TemporaryDirectory() as temporary:
        for index, name in enumerate(JOBS):
            folder = Path(temporary) / name
            folder.mkdir()
            number = len(range(index, count, len(JOBS)))
            for moment, wrong in killed(name, number, folder, whole(name, folder / "whole")):
                failed += bool(wrong)
                sys.stdout.write(f"{name} killed after {moment:.2f} s: {wrong or 'nothing lost'}\n")
                sys.stdout.flush()
    sys.stdout.write(f"{count} moments, {failed} with a loss\n")
    raise SystemExit(failed > 0)

"""Saved states of alignment: stopped within an epoch, killed, in two processes."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rsm_guidance.io.files import read_tensors
from rsm_guidance.training import checkpoint as states
from rsm_guidance.training.alignment import trainer as training
from rsm_guidance.training.alignment.lora_file import FILE
from rsm_guidance.training.alignment.trainer import train_align
from tests.training.alignment.worlds import log, small
from tests.training.reward_model.test_states import run

Family = Callable[[str], Path]


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = training.Journal.__call__

    def stop(self: Any, number: int, numbers: Any) -> None:
        real(self, number, numbers)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training.Journal, "__call__", stop)


def same(a: Path, b: Path) -> bool:
    one, other = load_file(a), load_file(b)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("preset", ["flow-grpo", "diffusion-nft", "awm"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    preset: str, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"updates_per_epoch": 2, "epochs": 3, "evaluation": {"every": 2}}
    whole = small(preset, family("sd3"), tmp_path / "whole", **options)
    report = train_align(whole)
    parts = replace(whole, out=tmp_path / "parts")
    for step in (1, 2):  # in the middle of an epoch, whose samples are then made again, and at its end
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            stopped_at(step, patched)
            train_align(parts)
        assert states.latest(parts.out).name == f"checkpoint-00000{step}"  # type: ignore[union-attr]
    resumed = train_align(parts)
    assert resumed["history"] == report["history"] and resumed["best"] == report["best"]
    assert log(parts.out) == log(whole.out)
    for name in ("objective.safetensors", "averages.safetensors"):
        assert same(whole.out / "checkpoint-000006" / name, parts.out / "checkpoint-000006" / name)
    one, other = (read_tensors(out / FILE) for out in (whole.out, parts.out))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_of_other_settings_is_not_gone_on_with(family: Family, tmp_path: Path) -> None:
    config = small("raft", family("sd3"), tmp_path / "run", form={"keep": 1}, epochs=1)
    train_align(config)
    with pytest.raises(ValueError, match=r"saved with optimizer.lr=0.01, and now it is 0.001"):
        train_align(replace(config, optimizer=replace(config.optimizer, lr=1e-3)))
    assert train_align(replace(config, epochs=2))["history"][-1]["step"] == 2, "more epochs go on"


SCRIPT = """
import sys
from pathlib import Path
from rsm_guidance.training.alignment.trainer import train_align
from rsm_guidance.training.data import leave
from tests.training.alignment.worlds import small
pipeline, out = map(Path, sys.argv[1:3])
options = {"updates_per_epoch": 1, "epochs": int(sys.argv[3]), "save_every": 1, "evaluation": {"every": int(sys.argv[3])}}
train_align(small(sys.argv[4], pipeline, out, **options))
leave()
"""


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["flow-grpo", "diffusion-nft"])
def test_two_processes_equal_one(preset: str, family: Family, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(SCRIPT)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = run(str(script), family("sd3"), tmp_path / "two", 3, preset, launcher=launcher)
    assert process.wait(300) == 0, process.communicate()[0][-3000:]
    one = small(preset, family("sd3"), tmp_path / "one", epochs=3, evaluation={"every": 3})
    train_align(one)
    alone, together = ([e for e in log(out) if "loss" in e] for out in (one.out, tmp_path / "two"))
    assert len(alone) == len(together) == 3
    for a, b in zip(alone, together, strict=True):
        assert a.keys() == b.keys()
        assert all(a[name] == pytest.approx(b[name], rel=1e-2, abs=2e-4) for name in a)
    reports = [json.loads((out / "report.json").read_text())["best"] for out in (one.out, tmp_path / "two")]
    assert reports[0] == pytest.approx(reports[1], rel=1e-2, abs=1e-4)


@pytest.mark.slow
def test_kill_9_at_random_moments_of_saving_loses_nothing(family: Family, tmp_path: Path) -> None:
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(SCRIPT)
    chance, reached = random.Random(0), 0
    for _ in range(2):
        process = run(str(script), family("sd3"), out, 400, "raft")
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < 120:
            newest = states.latest(out) if out.is_dir() else None
            if newest is not None and int(newest.name[-6:]) > reached + 1:
                time.sleep(chance.uniform(0, 0.05))
                break
            time.sleep(0.01)
        process.kill()
        told = process.communicate()[0]
        newest = states.latest(out)
        assert newest is not None and int(newest.name[-6:]) > reached, told[-2000:]
        reached = int(newest.name[-6:])
    config = small(
        "raft", family("sd3"), tmp_path / "whole", epochs=reached, evaluation={"every": 400}, save_every=reached
    )
    train_align(config)
    name = f"checkpoint-{reached:06d}/objective.safetensors"
    assert same(out / name, config.out / name)

"""Saved states of reward training: stopped, killed, on a full disk, in several processes."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from rsm_guidance.core.errors import UsageError
from rsm_guidance.training import checkpoint as states
from rsm_guidance.training.reward_model import trainer as training
from rsm_guidance.training.reward_model.config import (
    LossConfig,
    ModelConfig,
)
from rsm_guidance.training.reward_model.objective import PairObjective
from rsm_guidance.training.reward_model.run import require_run
from rsm_guidance.training.reward_model.trainer import train_reward
from tests.training.reward_model.worlds import log, same_weights, tiny

ROOT = Path(__file__).parents[3]


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = training.Journal.__call__

    def stop(self: Any, number: int, numbers: Any) -> None:
        real(self, number, numbers)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training.Journal, "__call__", stop)


@pytest.mark.parametrize("adaptation", ["lora", "full", "frozen"])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    adaptation: Any, sd3: Path, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ModelConfig(blocks=1, adaptation=adaptation, lora_rank=2, head_width=8)
    whole = tiny(sd3, choices, tmp_path / "whole", model=model)
    report = train_reward(whole)
    parts = replace(whole, out=tmp_path / "parts", data=replace(whole.data, cache=tmp_path / "whole/cache"))
    for step in (2, 5):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            stopped_at(step, patched)
            train_reward(parts)
        assert states.latest(parts.out).name == f"checkpoint-00000{step}"  # type: ignore[union-attr]
        (parts.out / "checkpoint-last").mkdir(exist_ok=True)  # names that are no numbers do not matter
        (parts.out / f"checkpoint-00000{step}.bak").mkdir()
    resumed = train_reward(parts)
    assert resumed["history"] == report["history"] and resumed["levels"] == report["levels"]
    assert log(parts.out) == log(whole.out) and len({entry["step"] for entry in log(whole.out)}) == 6
    assert same_weights(whole.out, parts.out)
    for name in ("objective.safetensors", "averages.safetensors"):
        one, other = (load_file(out / "checkpoint-000006" / name) for out in (whole.out, parts.out))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert train_reward(parts)["levels"] == report["levels"], "a finished run is finished"


def test_the_averages_are_what_is_saved_and_never_what_is_trained(sd3: Path, choices: Path, tmp_path: Path) -> None:
    config = tiny(sd3, choices, tmp_path / "a", steps=4, save_every=1, evaluate_every=1, keep=9)
    train_reward(config)
    for step in range(1, 5):
        live = load_file(config.out / f"checkpoint-00000{step}/objective.safetensors")
        averages = load_file(config.out / f"checkpoint-00000{step}/averages.safetensors")
        assert averages.keys() == live.keys() - {"drm.scorer.trunk.denoiser.pos_embed.pos_embed"}
        apart = sum(not torch.equal(live[name], averages[name]) for name in averages)
        assert apart > len(averages) / 2 or step == 1
    rare = replace(config, out=tmp_path / "b", save_every=4, evaluate_every=4, keep=1)
    train_reward(rare)
    often = [{k: v for k, v in entry.items() if not k.startswith("eval")} for entry in log(config.out)]
    steps = [entry for entry in often if "loss" in entry]
    assert steps == [entry for entry in log(rare.out) if "loss" in entry], "saving and evaluating change nothing"


def test_a_state_of_other_settings_or_data_is_not_gone_on_with(sd3: Path, choices: Path, tmp_path: Path) -> None:
    config = tiny(sd3, choices, tmp_path / "run", steps=2, save_every=2)
    train_reward(config)
    with pytest.raises(ValueError, match=r"saved with optimizer.lr=0.003, and now it is 0.001"):
        train_reward(replace(config, optimizer=replace(config.optimizer, lr=1e-3)))
    with pytest.raises(ValueError, match="saved with training pairs="):
        fewer = choices.with_name("fewer.csv")
        fewer.write_text("\n".join(choices.read_text().splitlines()[:-4]))
        train_reward(replace(config, data=replace(config.data, path=str(fewer))))
    with pytest.raises(UsageError, match="holds the run of checkpoint-000002"):
        train_reward(replace(config, resume="never"))
    assert train_reward(replace(config, steps=4))["history"][-1]["step"] == 4, "more steps go on"


def test_a_loss_that_is_none_stops_at_the_last_good_state(
    sd3: Path, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = PairObjective.forward
    seen: list[int] = []

    def spoiled(self: PairObjective, batch: Any, generator: Any = None) -> Any:
        found = real(self, batch, generator)
        if "loss" in found:
            seen.append(1)
            if len(seen) == 5:
                found["loss"] = found["loss"] * math.nan
        return found

    monkeypatch.setattr(PairObjective, "forward", spoiled)
    config = tiny(sd3, choices, tmp_path / "a")
    with pytest.raises(FloatingPointError, match="loss nan.*lower the learning rate"):
        train_reward(config)
    monkeypatch.undo()
    assert states.latest(config.out).name == "checkpoint-000003"  # type: ignore[union-attr]
    whole = train_reward(replace(config, out=tmp_path / "b"))
    assert train_reward(config)["history"] == whole["history"]


def test_a_full_disk_at_any_file_of_a_save_leaves_the_state_before(
    sd3: Path, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(sd3, choices, tmp_path / "a", steps=2, save_every=1, evaluate_every=2)
    whole = train_reward(config)
    names = ("write_tensors", "write_json", "_on_disk", "commit_folder")
    for number, name in enumerate(names):
        out = tmp_path / f"full{number}"
        shutil.copytree(tmp_path / "a/cache", out / "cache")
        real, calls = getattr(states, name), []

        def full(*args: Any, real: Any = real, calls: list[int] = calls) -> Any:
            calls.append(1)
            if (out / "checkpoint-000001").exists():  # noqa: B023 - called within the loop
                raise OSError(28, "No space left on device")
            return real(*args)

        with monkeypatch.context() as patched, pytest.raises(OSError, match="No space left"):
            patched.setattr(states, name, full)
            train_reward(replace(config, out=out))
        assert calls and states.latest(out).name == "checkpoint-000001"  # type: ignore[union-attr]
        assert train_reward(replace(config, out=out))["history"] == whole["history"]


KILLED = """
import sys
from dataclasses import replace
from pathlib import Path
from rsm_guidance.training.reward_model.trainer import train_reward
from tests.training.reward_model.worlds import tiny
pipeline, data, out = map(Path, sys.argv[1:4])
config = tiny(pipeline, data, out, steps=400, save_every=1, evaluate_every=400)
report = train_reward(replace(config, data=replace(config.data, cache=data.parent / "cache")))
"""


def run(script: str, *arguments: object, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *launcher, script, *map(str, arguments)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.slow
def test_kill_9_at_random_moments_of_saving_loses_nothing(sd3: Path, choices: Path, tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    chance, reached = random.Random(0), 0
    for _ in range(3):
        process = run(str(script), sd3, choices, tmp_path / "out")
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < 120:  # until a few states are written
            newest = states.latest(tmp_path / "out") if (tmp_path / "out").is_dir() else None
            if newest is not None and int(newest.name[-6:]) > reached + 2:
                time.sleep(chance.uniform(0, 0.05))  # anywhere in a save
                break
            time.sleep(0.01)
        process.kill()
        told = process.communicate()[0]
        newest = states.latest(tmp_path / "out")
        assert newest is not None, told[-2000:]
        assert int(newest.name[-6:]) > reached, "it went on from where it was"
        reached = int(newest.name[-6:])
        assert json.loads((newest / "progress.json").read_text())["step"] == reached
    kept = {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith("checkpoint")}
    assert len(kept) <= 4, kept  # two states, one that was being written and one that was being deleted
    whole = tiny(sd3, choices, tmp_path / "whole", steps=reached, save_every=reached, evaluate_every=400)
    train_reward(whole)
    one, other = (
        load_file(folder / f"checkpoint-{reached:06d}/objective.safetensors")
        for folder in (tmp_path / "out", whole.out)
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


TWO = """
import json, sys
from dataclasses import replace
from pathlib import Path
from rsm_guidance.training.data import leave
from rsm_guidance.training.reward_model.config import LossConfig
from rsm_guidance.training.reward_model.trainer import train_reward
from tests.training.reward_model.worlds import tiny
pipeline, data, out = map(Path, sys.argv[1:4])
config = tiny(pipeline, data, out, steps=int(sys.argv[4]), loss=LossConfig(ties="skip"))
train_reward(config)
leave()
"""


@pytest.mark.slow
def test_two_processes_equal_one(sd3: Path, choices: Path, tmp_path: Path) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = run(str(script), sd3, choices, tmp_path / "two", 6, launcher=launcher)
    assert process.wait(300) == 0, process.communicate()[0][-3000:]
    one = tiny(sd3, choices, tmp_path / "one", loss=LossConfig(ties="skip"))
    train_reward(one)
    alone, together = log(one.out), log(tmp_path / "two")
    assert len(together) == len(alone)
    losses = [{e["step"]: e["loss"] for e in entries if "loss" in e} for entries in (alone, together)]
    assert losses[0].keys() == losses[1].keys()
    for step in losses[0]:
        assert losses[0][step] == pytest.approx(losses[1][step], abs=2e-5)
    a, b = (json.loads((out / "report.json").read_text())["levels"] for out in (one.out, tmp_path / "two"))
    for x, y in zip(a, b, strict=True):
        assert x["pairs"] == y["pairs"] and x["loss"] == pytest.approx(y["loss"], abs=2e-3)  # weights are halves


SHARDED = """
from accelerate.utils import DistributedType
from rsm_guidance.training.data import process_state
process_state().distributed_type = DistributedType.MULTI_GPU  # accelerate shards on accelerators only, torch on CPUs, too
"""


@pytest.mark.slow
def test_weights_in_shards_train_as_whole_ones_and_resume(
    sd3: Path, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "sharded.py"
    script.write_text(SHARDED + TWO)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "NO_WRAP")
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for steps in (4, 6):
        process = run(str(script), sd3, choices, tmp_path / "two", steps, launcher=launcher)
        assert process.wait(300) == 0, process.communicate()[0][-3000:]
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    one = tiny(sd3, choices, tmp_path / "one", loss=LossConfig(ties="skip"))
    train_reward(one)
    losses = [{e["step"]: e["loss"] for e in log(out) if "loss" in e} for out in (one.out, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], abs=2e-5)
    for name in ("objective", "averages"):
        a, b = (load_file(out / f"checkpoint-000006/{name}.safetensors") for out in (one.out, tmp_path / "two"))
        assert a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=1e-3) for n in a)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UsageError, match="FSDP takes weights of one precision"):
        require_run(replace(one, dtype="bfloat16"))

"""The trainer of reward models: resume, processes, settings, and what goes wrong."""

import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking
from accelerate.utils import LoggerType
from safetensors.torch import load_file

from rsm_guidance.core.errors import UsageError
from rsm_guidance.reward_models import DiffusionRewardModel, RewardOutput, load_backbone
from rsm_guidance.training import checkpoint as states
from rsm_guidance.training.reward_model import trainer as training
from rsm_guidance.training.reward_model.collate import PreparedData, collate
from rsm_guidance.training.reward_model.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    RewardConfig,
)
from rsm_guidance.training.reward_model.evaluate import score_pairs
from rsm_guidance.training.reward_model.losses import PairLabel, soft
from rsm_guidance.training.reward_model.objective import PairObjective
from rsm_guidance.training.reward_model.run import require_run
from rsm_guidance.training.reward_model.trainer import build_model, build_objective, train_reward
from tests.training.reward_model.worlds import tiny, write_choices

ROOT = Path(__file__).parents[3]


def silent(label: str) -> None:
    return None


def objective_of(config: RewardConfig) -> tuple[PairObjective, PreparedData]:
    drm = build_model(load_backbone(config.pipeline), config)
    data = PreparedData(drm, config, silent)
    return build_objective(drm, data, config), data


def log(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def stopped_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real = training._Log.__call__

    def stop(self: Any, number: int, numbers: Any) -> None:
        real(self, number, numbers)
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(training._Log, "__call__", stop)


def same_weights(a: Path, b: Path) -> bool:
    one, other = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


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


def test_init_from_starts_where_a_finished_model_ended(sd3: Path, choices: Path, tmp_path: Path) -> None:
    first = tiny(sd3, choices, tmp_path / "first", steps=20, evaluate_every=20, save_every=20, ema_decay=None)
    report = train_reward(first)
    second = replace(first, out=tmp_path / "second", init_from=str(first.out), evaluation_levels=(0.0, 0.05))
    entry = train_reward(second)["history"][0]
    clean = {level["sigma"]: level for level in report["levels"]}
    assert entry["step"] == 0
    for level in (0.0, 0.05):
        assert entry[f"accuracy@{level:g}"] == clean[level]["accuracy"]
        assert entry[f"held_out_loss@{level:g}"] == pytest.approx(clean[level]["loss"], rel=1e-6)
    with pytest.raises(UsageError, match=r"made with lora_rank=2, and here it is 4"):
        train_reward(replace(second, out=tmp_path / "x", model=replace(first.model, lora_rank=4)))
    with pytest.raises(ValueError, match="no whole training state; to start from finished weights use init_from"):
        train_reward(replace(second, out=tmp_path / "x", init_from=None, resume=str(first.out)))


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


def test_embeddings_from_the_disk_are_those_of_the_text_encoders(
    sd3: Path, sd15: Path, choices: Path, tmp_path: Path
) -> None:
    for pipeline, blocks in ((sd3, 2), (sd15, 3)):
        config = tiny(pipeline, choices, tmp_path / pipeline.name, model=ModelConfig(blocks=blocks, head_width=8))
        kept, data = objective_of(config)
        plain, other = objective_of(replace(config, data=replace(config.data, embeddings=False)))
        assert data.embeddings is not None and other.embeddings is None
        a, b = (
            score_pairs(objective, part.train, (0.05, 0.7), 4) for objective, part in ((kept, data), (plain, other))
        )
        for level in a:
            assert torch.allclose(*(torch.tensor(s[level].scores) for s in (a, b)), rtol=0, atol=1e-6)
        batch = {**collate([data.train[0]], 0), "level": 100}
        swapped = {**batch, "prompt": ["other"], "embeddings": collate([data.train[-1]], 0)["embeddings"]}
        assert not torch.equal(kept(batch)["scores"], kept(swapped)["scores"]), "prompts matter"


def gradients(objective: PairObjective, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    objective(batch)["loss"].backward()
    return {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(sd3: Path, choices: Path, tmp_path: Path) -> None:
    config = tiny(sd3, choices, tmp_path / "a", model=ModelConfig(blocks=2, lora_rank=2, head_width=8))
    plain, data = objective_of(config)
    again, _ = objective_of(replace(config, gradient_checkpointing=True))
    assert again.drm.trunk.module.gradient_checkpointing or any(
        getattr(m, "gradient_checkpointing", False) for m in again.drm.trunk.modules()
    )
    for objective in (plain, again):
        for name, p in objective.named_parameters():
            if "lora_B" in name:  # as after some steps
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    batch = collate([data.train[i] for i in range(4)], 0)
    one, other = gradients(plain, batch), gradients(again.train(), batch)
    assert one.keys() == other.keys() and sum("lora" in name for name in one) > 4
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-7), name
        # the last block's text queries, whose attention is thrown away, and what moves both scores alike
        idle = "blocks.1.attn.add_q_proj" in name or name.endswith("score_mlp.2.bias")
        assert bool(one[name].abs().max() > 0) != idle, name


def test_micro_batches_give_the_update_of_the_whole_batch(sd3: Path, choices: Path, tmp_path: Path) -> None:
    sizes: tuple[int | None, ...] = (None, 1, 3)
    runs = []
    for size in sizes:
        config = tiny(
            sd3, choices, tmp_path / str(size), steps=3, micro_batch=size, batch_size=5, loss=LossConfig(ties="skip"),
            ema_decay=None, optimizer=OptimizerConfig(lr=1e-3),
        )  # fmt: skip
        train_reward(config)
        runs.append(log(config.out))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert "loss" not in a or a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)


def test_a_step_of_ties_alone_that_do_not_count_changes_nothing(sd3: Path, tmp_path: Path) -> None:
    ties = write_choices(tmp_path / "data", count=6, ties=6)
    config = tiny(
        sd3, ties, tmp_path / "run", loss=LossConfig(ties="skip"), steps=2, save_every=1, keep=3,
        data=DataConfig(str(ties), side=32, held_out_fraction=0.0),
    )  # fmt: skip
    report = train_reward(config)
    first, second = (load_file(config.out / f"checkpoint-00000{i}/objective.safetensors") for i in (1, 2))
    untouched, _ = objective_of(config)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(torch.equal(first[n], p) for n, p in untouched.named_parameters() if n in first), "nor does weight decay"
    assert report["levels"][0]["pairs"] == 0 and report["levels"][0]["ties"] == 6
    assert report["levels"][0]["accuracy"] is None and report["measured_on"] == "training pairs"


def test_a_soft_tie_pulls_scores_together_and_pairs_count_by_their_weight(
    sd3: Path, choices: Path, tmp_path: Path
) -> None:
    margin = torch.tensor([0.7, -0.3], requires_grad=True)
    label = PairLabel(torch.tensor([0.5, 0.5]), torch.tensor([True, True]), torch.zeros(2))
    losses = soft(RewardOutput(margin), RewardOutput(torch.zeros(2)), label)
    losses.sum().backward()
    assert bool((margin.grad.sign() == margin.sign()).all()) and bool((losses > 0).all())  # type: ignore[union-attr]
    equal = RewardOutput(torch.zeros(2))
    assert soft(equal, equal, label).tolist() == pytest.approx([0, 0], abs=1e-7)

    objective, data = objective_of(tiny(sd3, choices, tmp_path / "a"))
    batch = collate([data.train[i] for i in range(3)], 0)
    batch |= {"weight": torch.tensor([1.0, 0.5, 0.5]), "probability": torch.tensor([1.0, 0.0, 0.5])}
    with torch.no_grad():
        m = objective._raw(batch)[0].view(-1, 2) @ torch.tensor([1.0, -1.0])
        found = objective(batch)["loss"]
    tie = math.log(math.cosh(m[2].item() / 2))  # cross-entropy of a tie, less log 2
    by_hand = (math.log1p(math.exp(-m[0])) + 0.5 * math.log1p(math.exp(m[1])) + 0.5 * tie) / 2
    assert found.item() == pytest.approx(by_hand, rel=1e-5) and objective.weight(batch) == 2


def test_noise_belongs_to_the_pair_and_the_epoch(sd3: Path, choices: Path, tmp_path: Path) -> None:
    objective, data = objective_of(tiny(sd3, choices, tmp_path / "a"))
    items = [data.train[i] for i in range(4)]
    with torch.no_grad():
        together = objective._raw(collate(items, 3))[0]
        alone = torch.cat([objective._raw(collate([item], 3))[0] for item in items])
        later = objective._raw(collate(items, 4))[0]
    assert torch.allclose(together, alone, rtol=0, atol=1e-5) and not torch.allclose(together, later, atol=1e-3)


def test_a_pair_and_its_mirror_image_have_one_loss(sd3: Path, choices: Path, tmp_path: Path) -> None:
    objective, data = objective_of(tiny(sd3, choices, tmp_path / "a"))
    batch = {**collate([data.train[i] for i in range(4)], 0), "level": len(objective.table) - 1}  # next to no noise
    mirror = {**batch, "first": batch["second"], "second": batch["first"]}
    a, b = objective(batch)["scores"], objective(mirror)["scores"]
    assert torch.allclose(a[:, 0] - a[:, 1], b[:, 1] - b[:, 0], atol=0.05)


def test_scores_that_do_not_vary_are_noticed(
    sd3: Path, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.build_model

    def dead(pipe: Any, config: RewardConfig) -> Any:
        drm = real(pipe, config)
        torch.nn.init.zeros_(drm.head.score_mlp[0].weight)
        torch.nn.init.zeros_(drm.head.score_mlp[0].bias)
        drm.head.requires_grad_(False)
        return drm

    monkeypatch.setattr(training, "build_model", dead)
    with pytest.warns(UserWarning, match="scores of all held-out images are equal"):
        report = train_reward(tiny(sd3, choices, tmp_path / "a", steps=2, evaluate_every=1))
    assert report["warnings"] == ["the scores of all images are equal"]
    assert {level["accuracy"] for level in report["levels"]} == {0.5}, "equal scores are half right"


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


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_mixed_precision_trains_float32_weights(precision: Any, sd3: Path, choices: Path, tmp_path: Path) -> None:
    config = tiny(sd3, choices, tmp_path / precision, steps=2, precision=precision, dtype="bfloat16")
    report = train_reward(config)
    kept = load_file(config.out / "checkpoint-000002/objective.safetensors")
    assert {t.dtype for n, t in kept.items() if "buffer" not in n and "pos_embed.pos_embed" not in n} == {
        torch.float32
    }, kept.keys()
    assert all(math.isfinite(level["loss"]) for level in report["levels"])


def test_batches_that_processes_cannot_share_and_missing_trackers_are_refused_at_once(tmp_path: Path) -> None:
    config = RewardConfig(tmp_path, "/no/such/pipeline", data=DataConfig("x.csv"), batch_size=7)
    with pytest.raises(
        UsageError, match="batch_size=7 pairs cannot be shared by 2 processes; the nearest that can is 8"
    ):
        require_run(config, 2)
    with pytest.raises(UsageError, match="no tracker 'excel'; choose one of"):
        train_reward(replace(config, report_to=("excel",)))
    with pytest.raises(UsageError, match="the tracker 'wandb' is not installed"):
        train_reward(replace(config, report_to=("wandb",)))
    with pytest.raises(UsageError, match="nothing to train on"):
        train_reward(RewardConfig(tmp_path))


def test_seven_pairs_last_for_any_number_of_steps(sd3: Path, tmp_path: Path) -> None:
    data = write_choices(tmp_path / "data", count=7)
    config = tiny(
        sd3, data, tmp_path / "a", steps=20, batch_size=2, save_every=20, evaluate_every=20,
        data=DataConfig(str(data), side=32, held_out_fraction=0.0),
    )  # fmt: skip
    train_reward(config)
    assert len([e for e in log(config.out) if "loss" in e]) == 20
    epochs = replace(config, out=tmp_path / "b", steps=None, epochs=2.0)
    assert train_reward(epochs)["steps"] == 8, "two passes of four batches, the last of them of one pair"


def test_a_size_that_does_not_suit_the_pipeline_is_refused(sd3: Path, choices: Path, tmp_path: Path) -> None:
    config = tiny(sd3, choices, tmp_path / "a")
    with pytest.raises(UsageError, match="images of 34 x 34 pixels do not suit"):
        train_reward(replace(config, data=replace(config.data, side=34)))


def test_broken_pairs_are_counted_and_left_out(sd3: Path, tmp_path: Path) -> None:
    data = write_choices(tmp_path / "data", count=10)
    images = tmp_path / "data/images"
    (images / "0_0.png").unlink()
    (images / "1_1.png").write_bytes(b"no image")
    shutil.copy(images / "2_0.png", images / "2_1.png")
    config = tiny(sd3, data, tmp_path / "a", steps=1, data=DataConfig(str(data), side=32, held_out_fraction=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = train_reward(config)
    assert report["data"]["pairs"] == 7
    assert report["data"]["skipped"] == {"missing file": 1, "not an image": 1, "identical images": 1}
    assert "1 missing file" in (config.out / "README.md").read_text()


def test_trackers_are_told_by_name(sd3: Path, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, dict[str, float]]] = []

    class Tracker(tracking.GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = True
        tracker = None

        def __init__(self, run_name: str, logging_dir: Any, **options: Any) -> None:
            super().__init__()
            assert run_name == "mine" and Path(logging_dir) == tmp_path / "a"

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            assert values["optimizer.lr"] == 3e-3

        def log(self, values: dict[str, float], step: int, **options: Any) -> None:
            told.append((step, values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    config = tiny(sd3, choices, tmp_path / "a", steps=3, report_to=("tensorboard",), project="mine")
    train_reward(config)
    assert [{"step": step, **values} for step, values in told] == log(config.out)
    assert {"loss", "lr"} <= told[0][1].keys() and "evaluation/mean_accuracy" in told[-1][1]


def test_a_finished_model_is_uploaded_and_a_failed_upload_is_no_failed_run(
    sd3: Path, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(sd3, choices, tmp_path / "a", steps=1, push_to_hub="me/drm", private=True)
    with pytest.warns(UserWarning, match="could not be uploaded to me/drm"):
        monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
        train_reward(config)
    asked: dict[str, Any] = {}

    class Repo:
        repo_id = "me/drm"

    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, name, **options: asked.update(options) or Repo()
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **options: asked.update(options))
    train_reward(config)
    assert asked["private"] and asked["repo_id"] == "me/drm"
    assert set(asked["allow_patterns"]) == {
        "config.json",
        "model.safetensors",
        "README.md",
        "accuracy.png",
        "report.json",
    }


def refuse(*args: Any, **options: Any) -> None:
    raise OSError("no route to the hub")


@pytest.mark.parametrize(
    ("loss", "model"),
    [
        (LossConfig("bradley-terry"), ModelConfig(blocks=1, head="pool")),
        (LossConfig("margin", margin=0.5), ModelConfig(blocks=1, head="drm", head_width=32, dropout=0.1)),
        (LossConfig("win-tie"), ModelConfig(blocks=1, adaptation="last-blocks")),
        (LossConfig("thurstone", noise=0.0, floor=0.01), ModelConfig(blocks=1, output="gaussian")),
        (
            LossConfig("fidelity"),
            ModelConfig(blocks=1, head="query", head_width=32, text_taps=("transformer_blocks.0",)),
        ),
        (LossConfig("ordinal", ratings="rating"), ModelConfig(blocks=1)),
        (LossConfig("oprm"), ModelConfig(blocks=1, ratings=(0.0, 1.0, 2.0))),
    ],
    ids=lambda value: getattr(value, "name", getattr(value, "head", "")),
)
@pytest.mark.slow
def test_losses_heads_and_outputs_train_and_are_kept(
    loss: LossConfig, model: ModelConfig, sd3: Path, choices: Path, tmp_path: Path
) -> None:
    config = tiny(sd3, choices, tmp_path / "a", loss=loss, model=model, steps=3)
    report = train_reward(config)
    assert all(math.isfinite(entry["loss"]) for entry in log(config.out) if "loss" in entry)
    assert report["model"]["output"] == config.output and report["model"]["head"] == model.head
    drm = DiffusionRewardModel.from_pretrained(config.out)
    scores = drm.score_images(torch.rand(2, 3, 32, 32), ["a red thing", "a blue thing"])
    assert scores.isfinite().all()
    if loss.name == "ordinal":
        assert drm.drm_config.ratings == (1.0, 2.0, 3.0, 4.0, 5.0)
        with pytest.raises(UsageError, match="loss.ratings='beauty' is no score of these data; they have rating"):
            train_reward(replace(config, out=tmp_path / "b", loss=LossConfig("ordinal", ratings="beauty")))


def test_settings_of_other_losses_and_outputs_are_refused() -> None:
    with pytest.raises(UsageError, match="the loss 'soft' has no margin; margin and win-tie have"):
        LossConfig(margin=1.0)
    with pytest.raises(UsageError, match="reads loss.ratings"):
        LossConfig("ordinal")
    with pytest.raises(UsageError, match="'oprm' needs model.output=ordinal; got scalar"):
        RewardConfig(loss=LossConfig("oprm"), model=ModelConfig(output="scalar"))
    with pytest.raises(UsageError, match="noise.std positive"):
        NoiseConfig("logit-normal", std=0.0)


def test_prompts_over_the_limit_are_said_once(sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_choices(tmp_path / "data", count=10)
    text = (
        table.read_text().replace("a red thing, number 0", "word " * 60).replace("a blue thing, number 1", "so " * 90)
    )
    table.write_text(text)
    train_reward(tiny(sd3, table, tmp_path / "a", steps=2, data=DataConfig(str(table), side=32, held_out_fraction=0.0)))
    assert capsys.readouterr().err.count("2 prompts have more than 256 tokens, the first at choices.csv, line") == 1


def test_a_loss_that_is_not_finite_leaves_the_last_good_state(
    sd3: Path, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(sd3, choices, tmp_path / "a", steps=6, save_every=2, evaluate_every=2)
    real = training.PairObjective.forward
    calls: list[int] = []

    def spoilt(self: Any, batch: Any, generator: Any = None) -> Any:
        found = real(self, batch, generator)
        calls.append("loss" in found)
        return {**found, "loss": found["loss"] * math.nan} if sum(calls) > 3 and "loss" in found else found

    monkeypatch.setattr(training.PairObjective, "forward", spoilt)
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        train_reward(config)
    monkeypatch.undo()
    kept = states.checkpoints(config.out)[-1]
    assert all(t.isfinite().all() for t in load_file(kept / "objective.safetensors").values())
    assert train_reward(config)["history"][-1]["step"] == 6

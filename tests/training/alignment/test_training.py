"""Runs of the trainer on tiny pipelines: families, what moves, what a LoRA gives in the stock pipeline."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline

from rsm_guidance.core.errors import UsageError
from rsm_guidance.data.prompts import PromptSet
from rsm_guidance.io.files import read_tensors
from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.evaluator import Evaluator
from rsm_guidance.training.alignment.lora_file import FILE, KOHYA
from rsm_guidance.training.alignment.read import presets
from rsm_guidance.training.alignment.trainer import Run, build, read_prompts, train_align
from rsm_guidance.training.data import parts_of
from tests.training.alignment.worlds import REDNESS, log, small

Family = Callable[[str], Path]

RUNS = [
    ("sd15", "ddpo", {}),
    ("sd15", "diffusion-nft", {}),
    ("sd15", "raft", {"form": {"keep": 1}}),
    ("flux", "flow-grpo", {}),
    ("flux", "awm", {}),
    ("flux", "step-grpo", {"rollout": {"children": [3, 3, 3]}, "rewards": [REDNESS]}),
    ("wan", "ram", {"call": {"num_frames": 5}}),
    ("wan", "rsm-zeroth", {"call": {"num_frames": 5}, "rollout": {"children": [2, 3]}}),
    ("wan", "crd", {"call": {"num_frames": 5}}),
]


def built(config: AlignConfig) -> Run:
    pipe = DiffusionPipeline.from_pretrained(config.pipeline)
    pipe.set_progress_bar_config(disable=True)
    return build(config, pipe, *read_prompts(config), PartialState(cpu=True))


@pytest.mark.parametrize(("name", "preset", "options"), RUNS, ids=lambda x: x if isinstance(x, str) else "")
def test_families_train_and_their_lora_gives_the_evaluated_images_in_the_stock_pipeline(
    name: str, preset: str, options: dict[str, Any], family: Family, tmp_path: Path
) -> None:
    config = small(preset, family(name), tmp_path / "run", **options)
    report = train_align(config)
    assert report["best"]["drift"] > 0 and len(log(config.out)) >= 2
    stock = DiffusionPipeline.from_pretrained(family(name))
    stock.set_progress_bar_config(disable=True)
    stock.load_lora_weights(config.out, weight_name=FILE)
    run = built(replace(config, lora=replace(config.lora, init=config.out)))
    ours = run.evaluator.images([0, 1])
    run.evaluator.conditions.stock.pipe = stock  # the same calls, by a pipeline that knows nothing of us
    assert torch.equal(run.evaluator.images([0, 1]), ours), "to the bit"
    assert (config.out / KOHYA).exists() == (name == "sd15")
    assert "```python" in (config.out / "README.md").read_text()
    for picture in ("curves.png", "strengths.png", "samples/step-000000.png", "samples/best.png"):
        assert (config.out / picture).stat().st_size > 1000


def test_every_trained_parameter_moves_and_no_other(family: Family, tmp_path: Path) -> None:
    for checkpointing in (False, True):
        config = small(
            "diffusion-nft", family("sd3"), tmp_path / f"run{checkpointing}", gradient_checkpointing=checkpointing
        )
        run = built(config)
        before = {name: p.detach().clone() for name, p in run.learner.named_parameters()}
        optimizer = torch.optim.SGD([p for p in run.learner.parameters() if p.requires_grad], lr=0.1)
        batches = run.epochs.start(0)
        for _ in range(2):  # lora_A has a gradient once lora_B is not zero
            optimizer.zero_grad()
            run.learner(next(batches))["loss"].backward()
            optimizer.step()
        moved = {name for name, p in run.learner.named_parameters() if not torch.equal(p, before[name])}
        assert moved == {name for name, p in run.learner.named_parameters() if p.requires_grad}
        assert moved and all("lora_" in name for name in moved)
        run.conditions.close()


def test_nothing_of_the_policy_is_left_behind_by_samples_and_measurements(family: Family, tmp_path: Path) -> None:
    run = built(small("awm", family("sd3"), tmp_path / "run"))
    learner = run.learner
    flags = {name: p.requires_grad for name, p in learner.named_parameters()}
    weights = {name: p.detach().clone() for name, p in learner.named_parameters()}
    batches = run.epochs.start(0)
    for step in range(2):
        learner(next(batches))["loss"].backward()
        run.evaluator([{"step": float(step), "reward": 0.0}])
        assert {name: p.requires_grad for name, p in learner.named_parameters()} == flags
        assert max(float((p - weights[n]).abs().max()) for n, p in learner.named_parameters()) == 0
        assert not any(t.requires_grad for role in ("old", "average") for t in learner.policy.weights(role).values())
    assert len([p for group in [list(learner.parameters())] for p in group]) == len(
        {id(p) for p in learner.parameters()}
    )


def test_samples_do_not_depend_on_how_many_are_made_at_once(family: Family, tmp_path: Path) -> None:
    config = small("rsm-zeroth", family("sd3"), tmp_path / "run", rollout={"children": [2, 3]}, prompts_per_epoch=3)
    batches = []
    for at_once in (1, 64):
        run = built(replace(config, rollout_batch=at_once))
        batches.append(next(run.epochs.start(0)))
        run.conditions.close()
    one, many = batches
    order = [torch.argsort(b["row"] * 1000 + b["level"] * 10, stable=True) for b in (one, many)]
    for name in ("x", "mean", "next", "level", "advantage", "share"):
        a, b = (batch[name][index] for batch, index in zip((one, many), order, strict=True))
        assert torch.allclose(a, b, atol=1e-4, rtol=1e-4), name


def test_losses_do_not_depend_on_micro_batches(family: Family, tmp_path: Path) -> None:
    """One sampling, whose rows are cut differently; the loop adds parts up by their weights."""
    for preset in ("flow-grpo", "diffusion-nft", "crd"):
        run = built(small(preset, family("sd3"), tmp_path / preset / "run"))
        with torch.no_grad():
            for name, parameter in run.learner.policy.trained.items():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        batch, found = next(run.epochs.start(0)), []
        for size in (None, 3):
            parts = parts_of(batch, size)
            weights = [run.learner.weight(part) for part in parts]
            losses = [float(run.learner(part)["loss"]) for part in parts]
            found.append(sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights))
        assert len(parts) > 1 and found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-6)
        run.conditions.close()


def test_samples_are_made_in_the_precision_of_updates(family: Family, tmp_path: Path) -> None:
    """Else ratios are not 1 on policy, and clips of 1e-4 cut at random."""
    for settings in ({"precision": "bf16"}, {"precision": "bf16", "dtype": "bfloat16"}):
        config = small("flow-grpo", family("sd3"), tmp_path / settings.get("dtype", "") / "run", **settings)
        train_align(replace(config, optimizer=replace(config.optimizer, lr=1e-12), epochs=1))
        first = next(line for line in log(config.out) if "log_ratio" in line)
        assert abs(first["log_ratio"]) < 1e-6 and first["divergence"] < 1e-6, settings


def test_the_hold_to_the_reference_changes_gradients(family: Family, tmp_path: Path) -> None:
    found = []
    for weight in (1.0e-4, 10.0):
        options: dict[str, Any] = {"trust": {"reference_weight": weight}, "updates_per_epoch": 1}
        run = built(small("flow-grpo", family("sd3"), tmp_path / "run", **options))
        with torch.no_grad():
            for name, parameter in run.learner.policy.trained.items():
                if "lora_B" in name:
                    parameter.fill_(0.01)
        run.learner(next(run.epochs.start(0)))["loss"].backward()
        found.append(torch.cat([p.grad.flatten() for p in run.learner.policy.trained.values() if p.grad is not None]))
        run.conditions.close()
    assert float((found[0] - found[1]).norm()) > 0.1 * float(found[0].norm())


def test_epochs_of_samples_that_are_all_alike_are_gone_through_and_then_stop(family: Family, tmp_path: Path) -> None:
    config = small(
        "flow-grpo", family("sd3"), tmp_path / "run", rewards=[f"{__name__}:constant"], epochs=9,
        advantage={"constant_groups": 3}, trust={"reference": "none", "denominator": None, "reference_weight": None},
    )  # fmt: skip
    with pytest.raises(UsageError, match="scored alike in 3 epochs in a row"):
        train_align(config)
    lines = log(config.out)
    assert [line["step"] for line in lines if "loss" in line] == [1, 2] and lines[-1]["groups_dropped"] == 1
    assert (config.out / "checkpoint-000002").is_dir(), "nothing is lost"


def constant(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return torch.ones(len(images))


class Spoiled:
    """A reward that is not a number from some call on."""

    calls = 0


def spoiled(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    Spoiled.calls += 1
    return torch.full((len(images),), torch.nan if Spoiled.calls > 4 else 0.0) + torch.rand(len(images))


def test_a_reward_that_is_no_number_stops_at_the_last_good_state(family: Family, tmp_path: Path) -> None:
    Spoiled.calls = 0
    config = small("diffusion-nft", family("sd3"), tmp_path / "run", rewards=[f"{__name__}:spoiled"], epochs=20)
    with pytest.raises(UsageError, match="scores must be finite"):
        train_align(config)
    assert list(config.out.glob("checkpoint-*")), "the state before is kept"


def test_a_policy_that_runs_away_is_stopped(family: Family, tmp_path: Path) -> None:
    config = small("flow-grpo", family("sd3"), tmp_path / "run", updates_per_epoch=2, optimizer={"lr": 5.0})
    with pytest.raises(FloatingPointError, match=r"beyond trust.limit=1: lower optimizer.lr"):
        train_align(config)
    assert all(line["loss"] < 1e6 for line in log(config.out) if "loss" in line), "that update was not taken"


def test_training_stops_when_the_gold_reward_has_long_been_better(family: Family, tmp_path: Path) -> None:
    config = small("diffusion-nft", family("sd3"), tmp_path / "run", evaluation={"patience": 2})
    stopped = Evaluator(config, None, PromptSet(["a"]), {}, None, "gold", None, {})  # type: ignore[arg-type]
    rising = [{"reward": float(i), "gold": gold} for i, gold in enumerate((0.0, 1.0, 0.9, 0.8))]
    assert [stopped._overdone(rising[:n]) for n in (2, 3, 4)] == [False, False, True]
    falling = [*rising[:2], {"reward": 0.5, "gold": 0.9}, {"reward": 0.4, "gold": 0.8}]
    assert not stopped._overdone(falling), "the rewards fall, too: that is no over-optimisation"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"prompts": None}, "carries no prompts to train on"),
        ({"rewards": ["ocr"]}, "needs a text to look for"),
        ({"pipeline": "sd15"}, "for flow models"),
        ({"call": {"num_frames": 5}}, "takes no num_frames"),
        ({"resume": "nowhere"}, "holds no whole training state"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], says: str, family: Family, tmp_path: Path) -> None:
    pipeline, others = options.get("pipeline", "sd3"), {n: v for n, v in options.items() if n != "pipeline"}
    with pytest.raises(ValueError, match=says):
        train_align(small("flow-grpo", family(pipeline), tmp_path / "run", **others))


def test_presets_run_as_they_are_but_smaller(family: Family, tmp_path: Path) -> None:
    """The rollouts, rewards and losses of every preset that samples itself, one update each, on one tiny pipeline."""
    shapes: dict[str, dict[str, Any]] = {
        "branch-grpo": {"group": 1, "children": [2, 0, 2]},
        "dynamic-tree-rpo": {"group": 1, "children": [2, 2, 2]},
        "step-grpo": {"children": [2, 2, 2]},
        "tempflow-grpo": {"children": [2, 2, 2]},
        "rsm-zeroth": {"children": [2, 3]},
        "lpo": {"group": 1, "children": [2, 2], "transition": "flow_sde 0.7"},
        "ddpo": {"transition": "flow_sde 0.7"},
        "prdp": {"transition": "flow_sde 0.7"},
        "mix-grpo": {"window": [0, 2], "advance": 1},
        "flow-grpo-fast": {"window": [1, 2]},
        "tp-grpo": {"window": [0, 3]},
        "dense-grpo": {"calibrate": 1},
    }
    for name in presets():
        if name in ("dpo", "flow-dpo", "gdro"):
            continue
        options: dict[str, Any] = {"rollout": shapes.get(name, {})}
        if name == "gardo":
            options["trust"] = {"gate_rewards": [REDNESS], "gate": 0.3}
        run = built(small(name, family("sd3"), tmp_path / name / "run", **options))
        losses = run.learner(next(run.epochs.start(0)), torch.Generator())
        assert all(torch.isfinite(value) for value in losses.values()), name
        assert float(losses.get("log_ratio", torch.zeros(()))) == pytest.approx(0, abs=1e-6), "on policy"
        losses["loss"].backward()
        run.conditions.close()
        json.dumps(log(run.config.out) if (run.config.out / "log.jsonl").exists() else [])


def test_a_damaged_lora_is_refused(family: Family, tmp_path: Path) -> None:
    from rsm_guidance.io.files import write_tensors

    config = small("raft", family("sd3"), tmp_path / "run", form={"keep": 1}, epochs=1)
    train_align(config)
    tensors = read_tensors(config.out / FILE)
    lost = sorted(tensors)[0]
    write_tensors(tmp_path / "bad" / FILE, {name: t for name, t in tensors.items() if name != lost})
    with pytest.raises(UsageError, match="does not fit this transformer.*is missing"):
        built(replace(config, lora=replace(config.lora, init=tmp_path / "bad")))

"""What an update of each preset costs on the embedded model: seconds, denoiser evaluations, peak memory.

    python -m benchmarks.alignment.costs --out benchmarks/results/alignment_costs.json

Four prompts an epoch and small groups, one thread; every preset in a process of its own, whose peak memory is read.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from benchmarks import script
from rsm_guidance.core.ledger import peak_memory
from rsm_guidance.evaluation.report.tables import table
from rsm_guidance.io.files import write_json
from rsm_guidance.reward_models import load_backbone
from rsm_guidance.training.alignment.read import merge, presets, read_align
from rsm_guidance.training.alignment.trainer import build, read_prompts
from rsm_guidance.training.data import parts_of, process_state
from rsm_guidance.training.optim import adamw

SMALL: dict[str, Any] = {
    "prompts_per_epoch": 4,
    "rollout": {"group": 4},
    "evaluation": {"count": 2},
    "micro_batch": 96,
    "reward_sign": None,
}
OWN: dict[str, dict[str, Any]] = {
    "crd": {"form": {"implicit_strength": 1.0}},
    "dynamic-tree-rpo": {"rollout": {"noise_slope": 0.5, "group": 1}},
    "branch-grpo": {"rollout": {"group": 1}},
    "gardo": {"trust": {"gate": 0.3, "gate_rewards": ["shapes-verifier"]}},
    "lpo": {"trust": {"clip": 0.1}, "rollout": {"group": 1, "transition": "flow_sde 0.7"}},
    "p-graft": {"form": {"lowest": 0.5}},
    "prdp": {"trust": {"clip": 0.1}, "rollout": {"transition": "flow_sde 0.7"}, "micro_batch": 4},
    "ddpo": {"rollout": {"transition": "flow_sde 0.7"}},
    "ram": {"form": {"temperature": 0.5, "levels": 4}},
    "vgpo": {
        "estimator": {"discount": 0.9},
        "advantage": {"absolute": 0.1},
        "reward_sign": "positive",
        "rewards": ["shapes-verifier"],
    },
    "rsm-zeroth": {"rollout": {"group": 1}},
    "tempflow-grpo": {"rollout": {"group": 1}},
    "step-grpo": {"rollout": {"group": 1}},
    "dense-grpo": {"rollout": {"calibrate": 0}},
}
"""What presets leave open, and the flow SDE where they were made for DDIM."""

GIVEN = ("dpo", "flow-dpo", "gdro")
"""Presets that learn from files and make no samples."""


@dataclass(frozen=True)
class Config:
    """Presets and where the figures go.

    Attributes:
        out: JSON file.
        only: these presets; default all that make samples.
        inside: one preset, in this process.
    """

    out: Path = Path("costs.json")
    only: tuple[str, ...] = ()
    inside: str | None = None


def measured(name: str) -> dict[str, Any]:
    """The cost of the second epoch of a preset."""
    torch.set_num_threads(1)
    config = read_align(name=name, options=merge(SMALL, OWN.get(name, {})))
    pipe = load_backbone(config.pipeline)
    pipe.set_progress_bar_config(disable=True)
    run = build(config, pipe, *read_prompts(config), process_state())
    optimizer = adamw([(run.learner.policy, 1e-4)], 0.0)
    updates, rows, replay, clock = config.updates_per_epoch, 0, None, 0.0
    spent = {"sampling": 0.0, "updates": 0.0}
    batches = run.epochs.start(0)
    for number in range(2 * updates):
        clock = time.process_time()
        batch = next(islice(batches, 1))
        sampled = time.process_time() - clock
        replay = batch["replay"]
        clock = time.process_time()
        optimizer.zero_grad()
        size = None if config.micro_batch is None else max(1, config.micro_batch // _width(batch))
        for part in parts_of(batch, size):
            run.learner(part)["loss"].backward()
        optimizer.step()
        if number >= updates:
            spent["sampling"] += sampled
            spent["updates"] += time.process_time() - clock
            rows += int(batch["level"].numel())
    run.conditions.close()
    assert replay is not None
    return {
        "sampling_seconds": spent["sampling"], "update_seconds": spent["updates"] / updates, "rows": rows,
        "updates": updates, "guided": replay.evaluations_per_row > 1, "peak_gib": peak_memory() / 2**30,
    }  # fmt: skip


def _width(batch: dict[str, Any]) -> int:
    """Rows of one entry of a batch: of a group or path more than one."""
    return int(batch["level"][:1].numel())


def run(config: Config) -> dict[str, Any]:
    """The figures of all presets."""
    if config.inside is not None:
        return {"presets": {config.inside: measured(config.inside)}}
    found: dict[str, Any] = {}
    for name in config.only or [n for n in presets() if n not in GIVEN]:
        told = config.out.with_suffix(f".{name}.json")
        command = [sys.executable, "-m", "benchmarks.alignment.costs", "--inside", name, "--out", str(told)]
        subprocess.run(command, check=True, capture_output=True)
        found |= json.loads(told.read_text())["presets"]
        told.unlink()
    return {"presets": found}


def report(config: Config) -> dict[str, Any]:
    """Run and write."""
    result = run(config)
    write_json(config.out, result)
    return result


def shown(result: dict[str, Any]) -> str:
    """The table."""
    head = ["preset", "s sampling an epoch", "updates", "s an update", "rows", "guided", "peak GiB"]
    rows = [
        [
            name, f"{r['sampling_seconds']:.1f}", str(r["updates"]), f"{r['update_seconds']:.1f}", str(r["rows"]),
            "yes" if r["guided"] else "no", f"{r['peak_gib']:.1f}",
        ]
        for name, r in result["presets"].items()
    ]  # fmt: skip
    return table(head, rows)


if __name__ == "__main__":
    script(Config, report, shown)

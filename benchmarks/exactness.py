"""Samplers against the exact tilted posterior of Gaussian mixtures: `python -m benchmarks.exactness --help`.

All settings are those that a user gets by default, but for the number of particles, and the mixtures are such as no test uses.
Per case, schedule, value and number of particles: the error of E[r], of the weighted particles and of the returned samples, of
log Z and of the mode weights, with standard errors over independent prompts.  What remains at many particles is the
discretisation of the chain.
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks import script
from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import CPS, DDIM
from rsm_guidance.evaluation.report.tables import table
from rsm_guidance.io.files import write_atomically, write_json
from rsm_guidance.oracles.cases import CASES, HELD_OUT, MixtureValue
from rsm_guidance.oracles.mixture import (
    GaussianMixture,
    GaussianMixtureDenoiser,
    QuadraticReward,
    expected_reward,
    tilt,
)
from rsm_guidance.samplers import (
    BestOfN,
    FKSteering,
    PsiSampler,
    Sampler,
    SamplerOutput,
    Task,
    TreeSampling,
    TwistedSMC,
    run,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CASES = CASES | HELD_OUT
_ANCESTRAL = DDIM(1.0)  # the default of the samplers
_CHUNK = 50_000  # plain runs at once


@dataclass(frozen=True)
class Exactness:
    """Errors of the samplers that claim the tilted posterior, against the exact answer on Gaussian mixtures.

    python -m benchmarks.exactness --particles 4 16 64 256 --steps 60 --work 3200

    Attributes:
        out: JSON file for the result; a plot of the same name lies beside it.  Cells found in it are not repeated.
        particles: numbers of particles, or simulations.
        cases: names of mixtures.
        steps: levels of the schedules.
        work: particles in all prompts of one cell together; there are at least 50 prompts.
        chain: plain runs from which the values of the discretised chain are estimated.
        seed: names all random numbers.
    """

    out: Path = Path("benchmarks/results/exactness.json")
    particles: tuple[int, ...] = (4, 16, 64, 256)
    cases: tuple[str, ...] = tuple(HELD_OUT)
    steps: int = 100
    work: int = 12_800
    chain: int = 500_000
    seed: int = 0


Sized = Callable[[int], Sampler]
EXACT: dict[str, Sized] = {
    "fk-steering": lambda k: FKSteering(k),
    "smc": lambda k: TwistedSMC(k),
    "smc, power 1": lambda k: TwistedSMC(k, power=1.0),
    "psi": lambda k: PsiSampler(k),
    "tree-sampling": lambda k: TreeSampling(k),
}
OTHER: dict[str, Sized] = {
    "fk-steering, cps 0.9 (of its chain)": lambda k: FKSteering(k, transition=CPS(0.9)),
    "fk-steering, best (greedy)": lambda k: FKSteering(k, returned="best"),
    "best-of-n (greedy)": lambda k: BestOfN(k, _ANCESTRAL),
}


def mixture_task(case: str, schedule: NoiseSchedule, prompts: int, exact: bool, seed: int = 0) -> Task:
    """A sampling task on a case, under the exact value or Tweedie's estimate."""
    mixture, reward = _CASES[case]
    names = [f"point {i}" for i in range(prompts)]
    denoiser = GaussianMixtureDenoiser(mixture, schedule, names, seed)
    value = MixtureValue(mixture, reward, denoiser, exact)
    return Task(denoiser, RandomStreams.for_prompts(seed, names), Ledger(images=prompts), reward, value)


def errors(output: SamplerOutput, mixture: GaussianMixture, reward: QuadraticReward) -> dict[str, Any]:
    """Errors (estimate - exact) and standard errors of E[r] and log Z, and the total variation of the mode weights."""
    tilted, log_z = tilt(mixture, reward)
    exact, returned = expected_reward(tilted, reward), output.rewards
    assert returned is not None
    means = returned  # a greedy method answers by what it returns
    if output.particles is not None and output.trace["target"] is not None:
        means = torch.tensor([p.mean_reward for p in output.particles], dtype=torch.float64)
    count = len(means)
    nearest = tilted.component_log_prob(output.latents.double()).argmax(1)
    weights = torch.bincount(nearest, minlength=len(tilted.weights)).double() / count
    found = {
        "reward_error": float(means.mean() - exact),
        "reward_standard_error": float(means.std() / count**0.5),
        "returned_error": float(returned.mean() - exact),
        "returned_standard_error": float(returned.std() / count**0.5),
        "mode_total_variation": float((weights - tilted.weights).abs().sum() / 2),
        "mode_noise": float((tilted.weights * (1 - tilted.weights) / count).sqrt().sum() / math.sqrt(2 * math.pi)),
    }
    if output.log_normalizer is not None:
        z = output.log_normalizer.exp()
        found["log_z_error"] = float(z.mean().log() - log_z)
        found["log_z_standard_error"] = float(z.std() / z.mean() / count**0.5)
    return found


def discretisation(case: str, schedule: NoiseSchedule, runs: int, seed: int = 0) -> dict[str, float]:
    """What finitely many levels cost: E[r] and log Z of the unguided chain itself, tilted, minus the exact ones.

    By importance weights over plain runs.  Samplers of this chain converge to its values, not to those of the mixture.
    """
    mixture, reward = _CASES[case]
    tilted, log_z = tilt(mixture, reward)
    generator = torch.Generator().manual_seed(seed)
    denoiser = GaussianMixtureDenoiser(mixture, schedule, [])
    found = []
    for _ in range(-(-runs // _CHUNK)):
        eps = torch.randn(_CHUNK, mixture.dimension, generator=generator, dtype=torch.float64)
        x = schedule.add_noise(mixture.sample(_CHUNK, generator), eps, 0)
        for level in range(schedule.steps):
            gaussian = _ANCESTRAL(denoiser.predict(x, level), schedule, level, level + 1)
            x = gaussian.sample(torch.randn(x.shape, generator=generator, dtype=torch.float64))
        found.append(reward(x))
    rewards = torch.cat(found)
    weights = (rewards - log_z).exp()
    z, mean = weights.mean(), (weights * rewards).sum() / weights.sum()
    spread = (weights * (rewards - mean)).square().mean().sqrt() / z
    root = math.sqrt(len(rewards))
    return {
        "reward_error": float(mean - expected_reward(tilted, reward)),
        "reward_standard_error": float(spread / root),
        "log_z_error": float(z.log()),
        "log_z_standard_error": float(weights.std() / z / root),
    }


def run_exactness(config: Exactness) -> dict[str, Any]:
    """Run every cell, write JSON and plot, and return the result.

    Raises:
        UsageError: for an unknown case.
    """
    unknown = sorted(set(config.cases) - _CASES.keys())
    if unknown:
        raise UsageError(f"unknown case {unknown[0]!r}; choose from {', '.join(_CASES)}")
    schedules = {
        "flow": NoiseSchedule.flow(config.steps),
        "vp": NoiseSchedule.variance_preserving(config.steps),
    }
    settings = {"steps": config.steps, "seed": config.seed}
    done = _found(config.out, settings)
    rows: list[dict[str, Any]] = []
    for cell in tqdm(_cells(config, list(schedules)), desc="exactness", unit="cell"):
        known = next((d for d in done if cell.items() <= d.items()), None)
        rows.append(known or _measured(cell, schedules[cell["schedule"]], config.seed))
        if known is None:
            write_json(config.out, settings | {"cells": rows + [d for d in done if d not in rows]})
    chains = [
        {"case": case, "schedule": name, **discretisation(case, schedule, config.chain, config.seed)}
        for case in config.cases
        for name, schedule in schedules.items()
    ]
    result = settings | {"discretisation": chains, "cells": rows}
    write_json(config.out, result)
    write_atomically(config.out.with_suffix(".png"), lambda path: plot(result).savefig(path, dpi=130))
    return result


def _cells(config: Exactness, schedules: list[str]) -> list[dict[str, Any]]:
    """Everything that is measured: case, schedule, value, sampler, particles and prompts."""
    return [
        {
            "case": case,
            "schedule": schedule,
            "value": "none" if name == "tree-sampling" else value,
            "sampler": name,
            "particles": k,
            "prompts": max(50, config.work // k),
        }
        for case in config.cases
        for schedule in schedules
        for value in ("exact", "tweedie")
        for name in (*EXACT, *(OTHER if value == "exact" else ()))
        for k in config.particles
        if value == "exact" or name != "tree-sampling"  # it reads no values
    ]


def _measured(cell: dict[str, Any], schedule: NoiseSchedule, seed: int) -> dict[str, Any]:
    """A cell with its errors."""
    task = mixture_task(cell["case"], schedule, cell["prompts"], cell["value"] != "tweedie", seed)
    output = run((EXACT | OTHER)[cell["sampler"]](cell["particles"]), task)
    return cell | errors(output, *_CASES[cell["case"]])


def _found(path: Path, settings: dict[str, int]) -> list[dict[str, Any]]:
    """Cells of an earlier run with the same settings; none if there is no such file, or it is damaged."""
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        cells: list[dict[str, Any]] = earlier["cells"] if settings.items() <= earlier.items() else []
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []
    return cells


@dataclass(frozen=True)
class _Point:
    """Mean absolute error over cases and schedules at a number of particles, from the exact values and from the chain's.

    `deviation` is the largest of the latter in standard errors.
    """

    particles: int
    error: float
    chain_error: float
    deviation: float


def _mean_over_cases(result: dict[str, Any], key: str) -> dict[tuple[str, str], list[_Point]]:
    """Points per sampler and value; `key` is "reward" (of weighted particles), "returned" or "log_z"."""
    chains = {(c["case"], c["schedule"]): c for c in result["discretisation"]}
    known = "reward" if key == "returned" else key
    lines: dict[tuple[str, str], list[_Point]] = {}
    cells = [c for c in result["cells"] if f"{key}_error" in c]
    for name, kind in dict.fromkeys((c["sampler"], c["value"]) for c in cells):
        mine = [c for c in cells if (c["sampler"], c["value"]) == (name, kind)]
        for k in sorted({c["particles"] for c in mine}):
            at = [c for c in mine if c["particles"] == k]
            sizes, chain_errors, deviations = [], [], []
            for cell in at:
                chain = chains[cell["case"], cell["schedule"]]
                error = math.hypot(cell[f"{key}_standard_error"], chain[f"{known}_standard_error"])
                sizes.append(abs(cell[f"{key}_error"]))
                chain_errors.append(abs(cell[f"{key}_error"] - chain[f"{known}_error"]))
                deviations.append(chain_errors[-1] / error)
            point = _Point(k, float(np.mean(sizes)), float(np.mean(chain_errors)), max(deviations))
            lines.setdefault((name, kind), []).append(point)
    return lines


def plot(result: dict[str, Any]) -> "Figure":
    """Mean absolute errors over cases and schedules against particles, as measured from the discretised chain."""
    from matplotlib.figure import Figure  # takes its time, which other commands need not

    figure = Figure(figsize=(12.5, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    names = list(_mean_over_cases(result, "reward"))
    for axis, key, title in zip(axes, ("reward", "log_z"), ("E[r]", "log Z"), strict=True):
        for (name, kind), points in _mean_over_cases(result, key).items():
            i = names.index((name, kind))
            style = {
                "ls": "--" if kind == "tweedie" else "-",
                "marker": "os^Dv<>ph*"[i % 10],
                "color": f"C{i % 10}",
                "ms": 4,
            }
            label = name if kind == "none" else f"{name}, {kind} value"
            axis.plot([p.particles for p in points], [p.chain_error for p in points], label=label, **style)
        sizes = sorted({c["particles"] for c in result["cells"]})
        axis.set(xscale="log", yscale="log", xlabel="particles per prompt", title=f"mean absolute error of {title}")
        axis.set_xticks(sizes, [str(k) for k in sizes])
        axis.set_xticks([], minor=True)
        axis.grid(alpha=0.25, which="both")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return figure


def exactness_table(result: dict[str, Any]) -> str:
    """Mean absolute errors over cases and schedules, as a Markdown table.

    Its last columns are the largest deviation, of all cells with the most particles, from the values of the default chain: of E[r]
    by weighted particles, of E[r] of returned samples, and of log Z.
    """
    rewards, normalizers, returned = (_mean_over_cases(result, key) for key in ("reward", "log_z", "returned"))
    sizes = sorted({c["particles"] for c in result["cells"]})
    head = ["sampler", "value", *(f"{what}, K={k}" for what in ("E[r]", "log Z") for k in sizes)]
    rows = []
    for (name, kind), points in rewards.items():
        other = normalizers.get((name, kind), [])
        errors_of = [f"{p.error:.3f}" for p in points] + ([f"{p.error:.3f}" for p in other] or [""] * len(sizes))
        last = [f"{p[-1].deviation:.1f}" if p else "" for p in (points, returned[name, kind], other)]
        rows.append([name, kind, *errors_of, *last])
    chains = result["discretisation"]
    worst = {key: max(abs(c[f"{key}_error"]) for c in chains) for key in ("reward", "log_z")}
    return table([*head, "E[r], largest deviation", "E[r] returned", "log Z"], rows) + (
        f"\n\nDeviations are in standard errors, from the tilted law of the {result['steps']}-level default chain, which differs from the "
        f"exact one by up to {worst['reward']:.3f} in E[r] and {worst['log_z']:.3f} in log Z."
    )


if __name__ == "__main__":
    script(Exactness, run_exactness, exactness_table)

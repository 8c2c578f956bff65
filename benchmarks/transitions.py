"""What every transition keeps, on Gaussian mixtures with the exact denoiser: `python -m benchmarks.transitions --help`."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from benchmarks import script
from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import GaussianTransition, Transition, parse_transition
from rsm_guidance.evaluation.report.tables import table
from rsm_guidance.io.files import write_json
from rsm_guidance.oracles.cases import CASES
from rsm_guidance.oracles.mixture import GaussianMixtureDenoiser, expected_reward, tilt

_SCHEDULES = {"flow": NoiseSchedule.flow, "vp": NoiseSchedule.variance_preserving}


@dataclass(frozen=True)
class Transitions:
    """Where unguided runs by each transition end, against the law of the data, at few and at many levels.

    python -m benchmarks.transitions

    Attributes:
        out: JSON file for the result.
        transitions: by name, as samplers take them.
        cases: names of mixtures.
        steps: numbers of levels.
        runs: unguided runs per cell.
        seed: of their noise.
    """

    out: Path = Path("benchmarks/results/transitions.json")
    transitions: tuple[str, ...] = (
        "ode",
        "ddim 0.5",
        "ddim 1",
        "flow_sde 0.7",
        "flow_sde 1",
        "glass 4",
        "cps 0.3",
        "cps 0.5",
        "cps 0.9",
    )
    cases: tuple[str, ...] = ("linear", "ring", "random")
    steps: tuple[int, ...] = (20, 60, 200)
    runs: int = 20_000
    seed: int = 0


def ends(case: str, schedule: NoiseSchedule, transition: Transition, runs: int, seed: int) -> Tensor:
    """Clean points [runs, D] of unguided runs with the exact denoiser, from the exact law of the noisiest level."""
    mixture, generator = CASES[case][0], torch.Generator().manual_seed(seed)
    denoiser = GaussianMixtureDenoiser(mixture, schedule, [])

    def normal() -> Tensor:
        return torch.randn(runs, mixture.dimension, generator=generator, dtype=torch.float64)

    x = schedule.add_noise(mixture.sample(runs, generator), normal(), 0)
    for level, target in transition.jumps(schedule):
        x = transition.step(denoiser.predict, denoiser.predict(x, level), schedule, level, target, normal())
    return x


def biases(case: str, x: Tensor) -> dict[str, float]:
    """What is wrong with points [R, D] that should follow a case's mixture.

    The largest bias of the mean in standard deviations; the variance within modes as a share of the true one (points belong to
    the mode that is likeliest); and the errors of log Z and of E[r] under the tilted law, by importance weights.
    """
    mixture, reward = CASES[case]
    tilted, log_z = tilt(mixture, reward)
    mode = mixture.component_log_prob(x).argmax(1)
    within = ((x - mixture.means[mode]).square() / mixture.variances[mode]).mean()
    rewards = reward(x)
    weights = (rewards - log_z).exp()
    return {
        "mean": float(((x.mean(0) - mixture.mean) / mixture.variance.sqrt()).abs().max()),
        "variance": float((x.var(0) / mixture.variance).mean()),
        "variance_within_modes": float(within),
        "log_z_error": float(weights.mean().log()),
        "reward_error": float((weights * rewards).sum() / weights.sum() - expected_reward(tilted, reward)),
    }


def one_step(transition: Transition, schedule: NoiseSchedule, level: int) -> dict[str, float] | None:
    """A step from the true x0 and eps: its coefficient on x0 and its standard deviation of noise, relative to the level's.

    None for a transition that asks the denoiser again.
    """
    if not isinstance(transition, GaussianTransition):
        return None
    alpha, sigma = schedule.coefficients(level)
    zero, one = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)

    def mean(x0: Tensor, eps: Tensor) -> float:
        prediction = Prediction(alpha * x0 + sigma * eps, x0, eps, eps - x0)
        return float(transition(prediction, schedule, level, level + 1).mean)

    alpha_next, sigma_next = schedule.coefficients(level + 1)
    spread = math.hypot(mean(zero, one), transition.std(schedule, level, level + 1))
    return {"signal": mean(one, zero) / alpha_next, "noise": spread / sigma_next}


def run_transitions(config: Transitions) -> dict[str, Any]:
    """Run every cell, write JSON, and return the result.

    Raises:
        UsageError: for an unknown case or transition.
    """
    unknown = sorted(set(config.cases) - CASES.keys())
    if unknown:
        raise UsageError(f"unknown case {unknown[0]!r}; choose from {', '.join(CASES)}")
    named = {name: parse_transition(name) for name in config.transitions}
    cells = [
        (name, kind, steps, case)
        for name in named
        for kind in _SCHEDULES
        for steps in config.steps
        for case in config.cases
        if not (kind == "vp" and name.startswith("flow_sde"))
    ]
    rows = []
    for name, kind, steps, case in tqdm(cells, desc="transitions", unit="cell"):
        schedule = _SCHEDULES[kind](steps)
        found = biases(case, ends(case, schedule, named[name], config.runs, config.seed))
        rows.append({"transition": name, "schedule": kind, "steps": steps, "case": case, **found})
    middle = NoiseSchedule.flow(20)
    steps = {name: one_step(transition, middle, 10) for name, transition in named.items()}
    result = {"runs": config.runs, "seed": config.seed, "one_step": steps, "cells": rows}
    write_json(config.out, result)
    return result


def transitions_table(result: dict[str, Any]) -> str:
    """A row per transition: means over cases and schedules, as a Markdown table."""
    steps = sorted({c["steps"] for c in result["cells"]})
    head = ["transition", "keeps marginals", "one step"]
    head += [f"{what}, N={n}" for what in ("variance within modes", "error of E*[r]", "error of log Z") for n in steps]
    rows = []
    for name, single in result["one_step"].items():

        def mean(key: str, n: int, name: str = name) -> float:
            found = [c[key] for c in result["cells"] if (c["transition"], c["steps"]) == (name, n)]
            return sum(map(abs, found)) / len(found)

        kept = "yes" if parse_transition(name).keeps_marginals else "no"
        exact = "" if single is None else f"{single['signal']:.3f}, {single['noise']:.3f}"
        figures = [f"{mean('variance_within_modes', n):.2f}" for n in steps]
        figures += [f"{mean(key, n):.3f}" for key in ("reward_error", "log_z_error") for n in steps]
        rows.append([name, kept, exact, *figures])
    return table(head, rows)


if __name__ == "__main__":
    script(Transitions, run_transitions, transitions_table)

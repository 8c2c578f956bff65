"""Estimators of value guidance against the exact one: `python -m benchmarks.alignment.estimators --help`.

A mixture of three Gaussians in the plane, a quadratic reward, one step of the flow SDE from states of each level.  Guidance is
grad E[r(x0) | x] at the next level.  An estimator has a bias, which no budget removes, and a deviation of one sample, which n
samples reduce by sqrt(n); both are given relative to the exact guidance (root mean squares over states).  The study is that of
Reward Score Matching (2604.17415), whose own figures are of the same kind and other mixtures.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from benchmarks import script
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import ODE, FlowSDE
from rsm_guidance.evaluation.report.tables import table
from rsm_guidance.io.files import write_atomically, write_json
from rsm_guidance.oracles.mixture import (
    GaussianMixture,
    GaussianMixtureDenoiser,
    QuadraticReward,
    expected_reward,
    posterior,
)
from rsm_guidance.training.alignment.levels import geometry

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIXTURE = GaussianMixture.from_weights([1.0, 1.0, 1.0], [[-2.0, 0.0], [2.0, 0.5], [0.0, 2.0]], 0.2)
REWARD = QuadraticReward.around([1.5, 1.0], 0.4)


@dataclass(frozen=True)
class Estimators:
    """Bias and deviation of value estimators by noise level.

    Attributes:
        out: JSON file for the result; a plot of the same name lies beside it.
        steps: levels of the schedule.
        states: states per level.
        children: of each state.
        noise: a of the flow SDE.
        seed: names all random numbers.
    """

    out: Path = Path("benchmarks/results/alignment_estimators.json")
    steps: int = 20
    states: int = 64
    children: int = 2048
    noise: float = 0.7
    seed: int = 0


def run(options: Estimators) -> dict[str, Any]:
    """Measure every second level but the first and the last two."""
    schedule = NoiseSchedule.flow(options.steps)
    generator = torch.Generator().manual_seed(options.seed)
    rows = [_level(options, schedule, level, generator) for level in range(1, options.steps - 1, 2)]
    result = {"options": {k: str(v) for k, v in vars(options).items() if k != "out"}, "levels": rows}
    write_json(options.out, result)
    figure = _plot(rows)
    write_atomically(options.out.with_suffix(".png"), lambda path: figure.savefig(path, dpi=120, format="png"))
    return result


def _level(options: Estimators, schedule: NoiseSchedule, level: int, generator: torch.Generator) -> dict[str, Any]:
    denoiser = GaussianMixtureDenoiser(MIXTURE, schedule, ["a"])
    transition, count = FlowSDE(options.noise), options.children
    x = MIXTURE.noised(*schedule.coefficients(level)).sample(options.states, generator)
    x = x.repeat_interleave(count, 0)
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    step = geometry(transition, schedule, level, level + 1)
    children = transition(denoiser.predict(x, level), schedule, level, level + 1).sample(noise)
    law = posterior(MIXTURE, children, *schedule.coefficients(level + 1))

    def gradient(of: Callable[[Tensor], Tensor]) -> Tensor:
        at = children.clone().requires_grad_()
        return torch.autograd.grad(of(at).sum(), at)[0]

    def value(at: Tensor) -> Tensor:
        return expected_reward(posterior(MIXTURE, at, *schedule.coefficients(level + 1)), REWARD)

    def tweedie(at: Tensor) -> Tensor:
        return REWARD(denoiser.predict(at, level + 1).x0)

    def completed() -> Tensor:
        at = children
        for i in range(level + 1, schedule.steps):
            at = ODE()(denoiser.predict(at, i), schedule, i, i + 1).center
        return REWARD(at)

    def per_state(each: Tensor) -> Tensor:
        return each.view(options.states, count, -1)

    exact, v = per_state(gradient(value)).mean(1), value(children)
    scale = float(exact.square().sum(1).mean().sqrt())

    def zeroth(rewards: Tensor, centred: bool = True) -> dict[str, float]:
        own, r = per_state(v), per_state(rewards)
        e = per_state(noise) / step.std
        gap = r - own  # the same noise for both leaves little noise in their difference
        off = (gap - gap.mean(1, keepdim=True)) * e
        each = ((r - r.mean(1, keepdim=True)) if centred else r) * e
        return _summary(off, each, scale)

    first = per_state(gradient(tweedie))
    full = REWARD(law.sample(1, generator)[:, 0])
    return {
        "sigma": schedule.coefficients(level)[1],
        "guidance": scale,
        "full rollout": zeroth(full),
        "full rollout, not centred": zeroth(full, centred=False),
        "ODE completion": zeroth(completed()),
        "Tweedie": zeroth(tweedie(children)),
        "Tweedie, gradient": _summary(first - per_state(gradient(value)), first, scale),
    }


def _summary(off: Tensor, each: Tensor, scale: float) -> dict[str, float]:
    """Bias from errors [S, K, 2] of single samples, less what their own noise adds to its square; deviation of estimates."""
    noise = off.var(1).sum(1) / off.shape[1]
    bias = float((off.mean(1).square().sum(1) - noise).mean().clamp(min=0).sqrt())
    return {"bias": bias / scale, "deviation": float(each.var(1).sum(1).mean().sqrt()) / scale}


def _names(rows: list[dict[str, Any]]) -> list[str]:
    return [name for name, cell in rows[0].items() if isinstance(cell, dict)]


def _plot(rows: list[dict[str, Any]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, what in zip(figure.subplots(1, 2), ("bias", "deviation"), strict=True):
        for name in _names(rows):
            axes.plot([r["sigma"] for r in rows], [r[name][what] for r in rows], marker=".", label=name)
        axes.set(xlabel="noise level", ylabel=f"{what} / exact guidance", yscale="log")
    figure.axes[0].legend(fontsize=7)
    return figure


def summary(result: dict[str, Any]) -> str:
    """Bias, and root mean square error at 24 samples, by estimator and level."""
    rows = result["levels"]
    lines = [
        [
            name,
            *[
                f"{r[name]['bias']:.2f} / {math.hypot(r[name]['bias'], r[name]['deviation'] / 24**0.5):.2f}"
                for r in rows
            ],
        ]
        for name in _names(rows)
    ]
    return table(["bias / error of 24", *[f"{r['sigma']:.2f}" for r in rows]], lines)


if __name__ == "__main__":
    script(Estimators, run, summary)

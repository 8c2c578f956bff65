"""Can branching pay? `rsm-guidance benchmark branching`.

Unguided stochastic runs, and from every noise level of each of them fresh branches that go on to the end.  A run is good if
its final reward reaches a bar.  Per level, over branches at that level:

- *repaired*: the share of good branches of bad runs; *kept*: of good runs.  Equal shares mean that nothing is decided yet
  and no value can tell states apart; 0 and 1 that everything is.
- *advantage*: good branches of bad runs per denoiser evaluation, relative to fresh starts for the same prompts (the other
  runs of the prompt).  It bounds what any search that judges finished images can gain over best-of-N by branching at that
  level: below 1 it is better to start anew.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scipy.stats import bootstrap
from tqdm.auto import tqdm

from rsm_guidance.core.transitions import Gaussian, Transition
from rsm_guidance.io.files import write_atomically, write_json
from rsm_guidance.evaluation.generate import Generation, load_pipeline, watched
from rsm_guidance.samplers import Problem
from rsm_guidance.shapes import caption_set, model_path
from rsm_guidance.values import DiffusionRewardModel, resolve_reward

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class BranchingBenchmark:
    """What becomes of branches of good and of bad runs, per noise level.

    Attributes:
        out: JSON file for the result; a plot of the same name lies beside it.
        captions: number of held-out captions.
        runs: unguided runs per caption, >= 2.
        branches: of each run at each level, >= 1.
        steps: denoising steps.
        reward: of finished images, by which runs are good or bad.
        accept: reward with which an image is good.
        transition: of the runs; stochastic, between single levels.
        model: folder of the pipeline.
        seed: names all random numbers.
        batch_size: captions per batch.
        autocast: run in bfloat16 autocast, which is faster on CPUs.
    """

    out: Path = Path("branching.json")
    captions: int = 64
    runs: int = 6
    branches: int = 4
    steps: int = 10
    reward: str = "shapes-correct"
    accept: float = 0.5
    transition: Transition = Transition("cps", 0.9)
    model: str = model_path()
    seed: int = 0
    batch_size: int = 16
    autocast: bool = False


def run_branching_benchmark(config: BranchingBenchmark) -> dict[str, Any]:
    """Branch the runs, write JSON and plot, and return the result.

    Raises:
        ValueError: for fewer than two runs or one branch, a transition that cannot branch, a reward that is a reward model,
            or no caption with good and bad runs.
    """
    if config.runs < 2 or min(config.captions, config.branches, config.batch_size, config.steps) < 1:
        raise ValueError(
            f"branching compares with fresh starts: at least 2 runs, 1 branch and 1 caption; got {config.runs}, "
            f"{config.branches}, {config.captions}"
        )
    if config.transition.kind not in ("ddim", "cps", "flow_sde") or config.transition.noise == 0:
        raise ValueError(
            f"branches need a stochastic transition between single levels (ddim, cps or flow_sde with noise above 0); got "
            f"{config.transition}"
        )
    reward = resolve_reward(config.reward)
    if isinstance(reward, DiffusionRewardModel):
        raise ValueError("reward must be a function of images, such as shapes-correct")
    pipe, generation = load_pipeline(config.model), Generation.for_model(config.model, config.steps)
    prompts = [c.text for c in caption_set(config.captions, 0)]
    tables: list[tuple[np.ndarray, np.ndarray]] = []
    for start in tqdm(range(0, len(prompts), config.batch_size), desc="branching", unit="batch"):
        batch = prompts[start : start + config.batch_size]
        with watched(pipe, batch, generation, reward, config.seed, config.autocast) as (problem, denoiser):
            tables.append(_branched(problem, config))
            sigma = denoiser.schedule.sigma.tolist()
    good, branches = (
        np.concatenate(parts, axis) for parts, axis in zip(zip(*tables, strict=True), (0, 1), strict=True)
    )
    result: dict[str, Any] = {
        "captions": config.captions, "runs": config.runs, "branches": config.branches, "steps": config.steps,
        "reward": config.reward, "accept": config.accept, "transition": str(config.transition), "autocast": config.autocast,
        **branching_figures(good, branches),
    }  # fmt: skip
    for figures in result["levels"]:
        figures["sigma"] = round(sigma[figures["level"]], 4)
    write_json(config.out, result)
    write_atomically(config.out.with_suffix(".png"), lambda path: plot(result).savefig(path, dpi=130))
    return result


def _branched(problem: Problem, config: BranchingBenchmark) -> tuple[np.ndarray, np.ndarray]:
    """Which of the runs [B, R] are good, and which of their branches [N - 1, B, R, M] at the levels 1..N-1."""
    schedule, runs = problem.denoiser.schedule, list(range(config.runs))
    rows = problem.rows.repeat(config.runs)

    def judged(x: torch.Tensor) -> np.ndarray:
        rewards = problem.final_rewards(x, rows)
        assert rewards is not None
        return (rewards >= config.accept).numpy().reshape(config.runs, -1).T

    def onward(x: torch.Tensor, level: int, names: list[int]) -> torch.Tensor:
        for at in range(level, schedule.steps):
            x = problem.advance(x, rows, (at, at + 1), config.transition, names)[1]
        return x

    gaussians: list[Gaussian] = []
    x = torch.cat([problem.initial(c) for c in runs])
    for level in range(schedule.steps):
        prediction = problem.denoiser.predict(x, level, rows)
        gaussians.append(config.transition(prediction, schedule, level, level + 1))
        x = problem.step(gaussians[-1], level, runs)
    levels = []
    for level, gaussian in enumerate(gaussians[:-1]):
        found = []
        for branch in range(config.branches):
            names = [c + config.runs * (1 + level * config.branches + branch) for c in runs]
            found.append(judged(onward(problem.step(gaussian, level, names), level + 1, names)))
        levels.append(np.stack(found, -1))
    return judged(x), np.stack(levels)


def branching_figures(good: np.ndarray, branches: np.ndarray) -> dict[str, Any]:
    """Shares with their 95% intervals over captions.

    Args:
        good: bool [C, R], which runs of each caption are good.
        branches: bool [N - 1, C, R, M], which of their branches at each level 1..N-1 are.

    Raises:
        ValueError: if no caption has good runs and bad ones.
    """
    if not (good.any(1) & ~good.all(1)).any():
        raise ValueError(
            f"no caption has good and bad runs ({int(good.sum())} of {good.size} are good): there is nothing to compare; "
            "choose another accept, or more captions or runs"
        )
    steps = len(branches) + 1
    others = (good.sum(1, keepdims=True) - good) / (good.shape[1] - 1)
    fresh = _ratio((others * ~good).sum(1), (~good).sum(1))
    levels = []
    for level, found in enumerate(branches, 1):
        share = found.mean(2)
        repaired = ((share * ~good).sum(1), (~good).sum(1))
        advantage = _ratio(repaired[0] * steps / (steps - level), (others * ~good).sum(1))
        levels.append({
            "level": level, "evaluations": steps - level, "repaired": _ratio(*repaired),
            "kept": _ratio((share * good).sum(1), good.sum(1)), "advantage": advantage,
        })  # fmt: skip
    return {"good": round(float(good.mean()), 4), "fresh": fresh, "levels": levels}


def _ratio(above: np.ndarray, below: np.ndarray) -> list[float]:
    """Ratio of two sums over captions [C], with its 95% bootstrap interval."""
    used = (above != 0) | (below != 0)
    above, below = above[used].astype(float), below[used].astype(float)
    ratio = float(above.sum() / below.sum())
    if len(above) < 2:
        return [ratio, ratio, ratio]

    def statistic(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios: np.ndarray = a.sum(axis) / b.sum(axis)
        return ratios

    found = bootstrap(
        (above, below), statistic, paired=True, vectorized=True, n_resamples=2000, method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval  # fmt: skip
    return [round(float(v), 4) for v in (ratio, found.low, found.high)]


def plot(result: dict[str, Any]) -> "Figure":
    """Shares, and the advantage over fresh starts, against the noise level."""
    from matplotlib.figure import Figure  # takes its time, which other commands need not

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    sigma = [f["sigma"] for f in result["levels"]]
    for axis, key, name, colour in (
        (left, "kept", "branches of good runs", "C2"),
        (left, "repaired", "branches of bad runs", "C3"),
        (right, "advantage", "branches of bad runs", "C3"),
    ):
        middle, low, high = zip(*(f[key] for f in result["levels"]), strict=True)
        axis.plot(sigma, middle, marker="o", ms=4, color=colour, label=name)
        axis.fill_between(sigma, low, high, color=colour, alpha=0.2, lw=0)
    left.axhline(result["fresh"][0], color="0.4", lw=1, ls="--", label="fresh starts for the bad runs' prompts")
    left.set(title="share of good images", ylim=(0, 1.02))
    right.axhline(1, color="0.4", lw=1, ls="--", label="fresh starts = 1")
    right.set(title="good images per evaluation", ylim=(0, None))
    for axis in (left, right):
        axis.set_xlabel("noise level sigma of the branch")
        axis.invert_xaxis()
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8)
    return figure


def branching_table(result: dict[str, Any]) -> str:
    """The figures per level as a Markdown table."""
    rows = {
        "kept: branches of good runs": "kept",
        "repaired: branches of bad runs": "repaired",
        "advantage over fresh starts": "advantage",
    }
    lines = ["| noise level | " + " | ".join(f"{f['sigma']:.2f}" for f in result["levels"]) + " |"]
    lines.append("|---|" + "---|" * len(result["levels"]))
    for name, key in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{f[key][0]:.2f}" for f in result["levels"]) + " |")
    return "\n".join(lines)

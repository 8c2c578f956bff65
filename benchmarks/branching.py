"""Can branching pay? `python -m benchmarks.branching --help`.

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
from scipy.stats import bootstrap
from tqdm.auto import tqdm

from benchmarks import script
from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.transitions import Transition, parse_transition, require_gaussian
from rsm_guidance.evaluation.generate import Generation, task_of
from rsm_guidance.evaluation.report.tables import table
from rsm_guidance.io.files import write_atomically, write_json
from rsm_guidance.pipelines.load import load_pipeline
from rsm_guidance.rewards import resolve_reward
from rsm_guidance.rollouts import collect
from rsm_guidance.samplers import Task
from rsm_guidance.shapes import caption_set

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Branching:
    """Whether branching can pay: how often branches of bad runs come out good, per noise level, beside fresh starts.

    python -m benchmarks.branching --captions 64 --autocast

    Attributes:
        out: JSON file for the result; a plot of the same name lies beside it.
        captions: number of held-out captions.
        runs: unguided runs per caption, >= 2.
        branches: of each run at each level, >= 1.
        steps: denoising steps.
        reward: of finished images, by which runs are good or bad.
        accept: reward with which an image is good.
        transition: of the runs; stochastic, between single levels.
        model: packaged name, folder or hub id of the pipeline.
        seed: names all random numbers.
        batch_size: captions per batch.
        autocast: run in bfloat16 autocast, which is faster on CPUs.
    """

    out: Path = Path("benchmarks/results/branching.json")
    captions: int = 64
    runs: int = 6
    branches: int = 4
    steps: int = 10
    reward: str = "shapes-correct"
    accept: float = 0.5
    transition: str = "cps 0.9"
    model: str = "shapes"
    seed: int = 0
    batch_size: int = 16
    autocast: bool = False


def run_branching(config: Branching) -> dict[str, Any]:
    """Branch the runs, write JSON and plot, and return the result.

    Raises:
        UsageError: for fewer than two runs or one branch, a transition that cannot branch, a reward that scores latents,
            or no caption with good and bad runs.
    """
    if config.runs < 2 or min(config.captions, config.branches, config.batch_size, config.steps) < 1:
        raise UsageError(
            f"branching compares with fresh starts: at least 2 runs, 1 branch and 1 caption; got {config.runs}, "
            f"{config.branches}, {config.captions}"
        )
    transition = parse_transition(config.transition)
    require_gaussian(transition, "branches part where a step draws noise", noisy=True)
    pipe, generation = load_pipeline(config.model), Generation.for_model(config.model, config.steps)
    reward = resolve_reward(config.reward, pipe)
    if hasattr(reward, "value"):
        raise UsageError("the reward must be one of images, such as shapes-correct")
    prompts = [c.text for c in caption_set(config.captions, 0)]
    tables: list[tuple[np.ndarray, np.ndarray]] = []
    for start in tqdm(range(0, len(prompts), config.batch_size), desc="branching", unit="batch"):
        batch = prompts[start : start + config.batch_size]
        with task_of(pipe, batch, generation, reward, config.seed, config.autocast) as task:
            tables.append(_branched(task, transition, config))
            sigma = task.schedule.sigma.tolist()
    good, branches = (
        np.concatenate(parts, axis) for parts, axis in zip(zip(*tables, strict=True), (0, 1), strict=True)
    )
    result: dict[str, Any] = {
        "captions": config.captions, "runs": config.runs, "branches": config.branches, "steps": config.steps,
        "reward": config.reward, "accept": config.accept, "transition": str(transition), "autocast": config.autocast,
        **branching_figures(good, branches),
    }  # fmt: skip
    for figures in result["levels"]:
        figures["sigma"] = round(sigma[figures["level"]], 4)
    write_json(config.out, result)
    write_atomically(config.out.with_suffix(".png"), lambda path: plot(result).savefig(path, dpi=130))
    return result


def _branched(task: Task, transition: Transition, config: Branching) -> tuple[np.ndarray, np.ndarray]:
    """Which of the runs [B, R] are good, and which of their branches [N - 1, B, R, M] at the levels 1..N-1.

    The step that reaches a level draws the run's own noise for child 0, and fresh noise for each of the M branches.
    """
    levels, good = [], np.empty(0)
    for level in range(task.steps - 1):
        rollout = collect(task.denoiser, task.streams, transition, config.runs, {level: config.branches + 1})
        rewards = task.final_scores(rollout.latents, rollout.rows)
        assert rewards is not None
        accepted = (rewards >= config.accept).numpy().reshape(task.count, config.runs, config.branches + 1)
        good = accepted[..., 0]
        levels.append(accepted[..., 1:])
    return good, np.stack(levels)


def branching_figures(good: np.ndarray, branches: np.ndarray) -> dict[str, Any]:
    """Shares with their 95% intervals over captions.

    Args:
        good: bool [C, R], which runs of each caption are good.
        branches: bool [N - 1, C, R, M], which of their branches at each level 1..N-1 are.

    Raises:
        UsageError: if no caption has good runs and bad ones.
    """
    if not (good.any(1) & ~good.all(1)).any():
        raise UsageError(
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
    head = ["noise level", *(f"{f['sigma']:.2f}" for f in result["levels"])]
    return table(head, [[name, *(f"{f[key][0]:.2f}" for f in result["levels"])] for name, key in rows.items()])


if __name__ == "__main__":
    script(Branching, run_branching, branching_table)

"""How well values foretell the final reward: `rsm-guidance benchmark values`.

Unguided stochastic runs are watched by value estimators at several noise levels.  Per level and estimator: the correlation
over runs of the value with the reward of the finished image, that within each prompt (which is all that choosing among
candidates of one prompt can use), and the bias, the mean difference of an estimate in the reward's units.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from rsm_guidance.core.contracts import Reward, Value, ValueSource
from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import CPS, Transition
from rsm_guidance.data.prompts import chosen
from rsm_guidance.evaluation.generate import Generation, task_of
from rsm_guidance.io.config import check_options, read_options
from rsm_guidance.io.files import write_atomically, write_json
from rsm_guidance.rollouts import trajectories
from rsm_guidance.samplers import Task
from rsm_guidance.values import ESTIMATORS, resolve_value

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_RUNS = 100_000
VALUES = ("tweedie", "smoothed", "lookahead", "lookahead:steps=4")


@dataclass(frozen=True)
class Calibration:
    """What is watched.

    Attributes:
        prompts: of the runs.
        out: JSON file for the result; a plot of the same name lies beside it.
        values: estimators, each with options of its own, as in "lookahead:steps=4", and diffusion reward models.
        runs: unguided runs per prompt, >= 2.
        levels: noise levels, as shares of the steps.
        transition: of the runs.
        seed: names all random numbers.
        batch_size: prompts per batch.
        autocast: run in bfloat16 autocast, which is faster on CPUs.
        columns: what the reward reads besides the prompts, an entry for each.
    """

    prompts: list[str]
    out: Path
    values: tuple[str, ...] = VALUES
    runs: int = 8
    levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    transition: Transition = CPS(0.9)
    seed: int = 0
    batch_size: int = 16
    autocast: bool = False
    columns: Mapping[str, list[Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.runs < 2 or not self.prompts or self.batch_size < 1:
            raise UsageError(
                "values are compared within prompts: at least 1 prompt, 2 runs and a batch of 1; got "
                f"{len(self.prompts)}, {self.runs} and {self.batch_size}"
            )
        if self.runs > _MOST_RUNS:
            raise UsageError(f"at most {_MOST_RUNS} runs of a prompt are held in memory; got {self.runs}")
        if not self.levels or not all(0 < share < 1 for share in self.levels):
            raise UsageError(f"levels are shares of the steps between 0 and 1; got {self.levels}")
        if not self.values:
            raise UsageError("there is no value to compare; name at least one, such as tweedie")


def value_source(text: str, pipe: DiffusionPipeline) -> ValueSource:
    """What makes a value: "lookahead:steps=4" for an estimator with options, else as in `values.resolve_value`.

    Raises:
        UsageError: if there is no such estimator or reward model, or it does not take the options.
    """
    if text.partition(":")[0] not in ESTIMATORS:
        return resolve_value(text, pipe)
    name, options = read_options(text)
    source: ValueSource = ESTIMATORS[name](**check_options(ESTIMATORS[name], options, f"the value {name!r}"))
    return source


def calibrate(config: Calibration, pipe: DiffusionPipeline, generation: Generation, reward: Reward) -> dict[str, Any]:
    """Watch the runs, write JSON and plot, and return the result.

    Args:
        config: what to watch.
        pipe: any pipeline that can be guided.
        generation: arguments of its call.
        reward: of finished images, which the values foretell.

    Raises:
        UsageError: for a reward that scores latents itself, or levels that the transition does not stop at.
    """
    if hasattr(reward, "value"):
        raise UsageError(
            f"values foretell the reward of finished images, and {reward.name} scores latents; give a reward of images, and "
            "the model among the values"
        )
    sources = {text: value_source(text, pipe) for text in config.values}
    found: dict[str, list[list[np.ndarray]]] = {name: [] for name in sources}
    finals: list[np.ndarray] = []
    costs: dict[str, float] = {}
    same_units: dict[str, bool] = {}
    for start in tqdm(range(0, len(config.prompts), config.batch_size), desc="values", unit="batch"):
        batch = config.prompts[start : start + config.batch_size]
        columns = chosen(config.columns, range(start, start + len(batch)))
        with task_of(pipe, batch, generation, reward, config.seed, config.autocast, columns) as task:
            values: dict[str, Value] = {
                n: s.value(task.denoiser, task.reward, task.streams) for n, s in sources.items()
            }
            costs = {name: float(value.evaluations_per_row) for name, value in values.items()}
            same_units = {name: value.share == 0 for name, value in values.items()}
            schedule = task.schedule
            levels = _levels(config, schedule)
            scores, final = _watched(task, values, levels, config)
        for name in sources:
            found[name].append(scores[name])
        finals.append(final)
    table = np.concatenate(finals)
    result: dict[str, Any] = {
        "prompts": len(config.prompts), "runs": config.runs, "steps": schedule.steps, "reward": reward.name,
        "transition": str(config.transition), "autocast": config.autocast, "evaluations_per_row": costs, "levels": levels,
        "sigma": [float(schedule.sigma[i]) for i in levels],
        "estimators": {
            name: [
                figures_of(np.concatenate(per_level), table, same_units[name]) for per_level in zip(*batches, strict=True)
            ]
            for name, batches in found.items()
        },
    }  # fmt: skip
    write_json(config.out, result)
    write_atomically(config.out.with_suffix(".png"), lambda path: plot(result).savefig(path, dpi=130))
    return result


def _levels(config: Calibration, schedule: NoiseSchedule) -> list[int]:
    """The levels of a run at which values are asked."""
    levels = sorted({min(max(1, round(share * schedule.steps)), schedule.steps - 1) for share in config.levels})
    stops = {target for _, target in config.transition.jumps(schedule)}
    missed = [level for level in levels if level not in stops]
    if missed:
        raise UsageError(f"runs by {config.transition} do not stop at level {missed[0]}; choose ddim, cps or flow_sde")
    return levels


def _watched(
    task: Task, values: dict[str, Value], levels: list[int], config: Calibration
) -> tuple[dict[str, list[np.ndarray]], np.ndarray]:
    """Values by estimator and level, and final rewards, [B, R] each, of R runs of every prompt."""
    scores: dict[str, list[np.ndarray]] = {name: [] for name in values}
    for step in trajectories(task.denoiser, task.streams, config.transition, range(config.runs)):
        if step.target in levels:
            for name, value in values.items():
                said = value(step.next, step.target, step.rows)
                scores[name].append(said.double().cpu().numpy().reshape(task.count, config.runs))
    final = task.final_scores(step.next, step.rows)
    assert final is not None
    return scores, final.numpy().reshape(task.count, config.runs)


def figures_of(values: np.ndarray, final: np.ndarray, same_units: bool) -> dict[str, float | None]:
    """Figures of values [C, R] against final rewards [C, R], prompts by runs."""

    def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
        return None if a.std() < 1e-9 or b.std() < 1e-9 else round(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]), 4)

    within = [m - m.mean(1, keepdims=True) for m in (values, final)]
    return {
        "correlation": correlation(values, final),
        "correlation_within_prompts": correlation(within[0], within[1]),
        "bias": round(float((values - final).mean()), 4) if same_units else None,
    }


def plot(result: dict[str, Any]) -> "Figure":
    """Correlations and bias against the noise level."""
    from matplotlib.figure import Figure  # takes its time, which other commands need not

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    titles = {
        "correlation": "correlation with the final reward",
        "correlation_within_prompts": "correlation within prompts",
        "bias": "bias",
    }
    for axis, (key, title) in zip(axes, titles.items(), strict=True):
        for i, (name, figures) in enumerate(result["estimators"].items()):
            points = _known(result["sigma"], [f[key] for f in figures])
            if points:
                axis.plot(*zip(*points, strict=True), marker="os^Dv"[i % 5], ms=4, color=f"C{i % 10}", label=name)
        axis.axhline(0, color="0.7", lw=0.8)
        axis.set(title=title, xlabel="noise level sigma")
        axis.invert_xaxis()
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    return figure


def _known(sigma: Iterable[float], values: Iterable[float | None]) -> list[tuple[float, float]]:
    return [(s, v) for s, v in zip(sigma, values, strict=True) if v is not None]

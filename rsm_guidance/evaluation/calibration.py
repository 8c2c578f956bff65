"""How well values foretell the final reward: `rsm-guidance benchmark values`.

Unguided stochastic runs are watched by value estimators at several noise levels.  Per level and estimator: the correlation
over runs of the value with the reward of the finished image, that within each caption (which is all that choosing among
candidates of one prompt can use), and the bias, the mean difference of an estimate in the reward's units.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from rsm_guidance.core.contracts import Value
from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.transitions import Transition
from rsm_guidance.io.files import write_atomically, write_json
from rsm_guidance.evaluation.generate import Generation, load_pipeline, watched
from rsm_guidance.shapes import caption_set, model_path
from rsm_guidance.values import DiffusionRewardModel, DRMValue, EstimatedValue, Lookahead, Smoothed, Tweedie, load_judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ValuesBenchmark:
    """Correlation and bias of value estimators, per noise level, against the final reward.

    Attributes:
        out: JSON file for the result; a plot of the same name lies beside it.
        captions: number of held-out captions.
        runs: unguided runs per caption, >= 2.
        levels: noise levels, as shares of the steps.
        steps: denoising steps.
        reward: of finished images.
        drm: reward model among the estimators.
        transition: of the runs.
        model: folder of the pipeline.
        seed: names all random numbers.
        batch_size: captions per batch.
        autocast: run in bfloat16 autocast, which is faster on CPUs.
    """

    out: Path = Path("values.json")
    captions: int = 64
    runs: int = 8
    levels: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    steps: int = 20
    reward: str = "shapes-verifier"
    drm: str = "shapes-drm"
    transition: Transition = Transition("cps", 0.9)
    model: str = model_path()
    seed: int = 0
    batch_size: int = 16
    autocast: bool = False


def run_values_benchmark(config: ValuesBenchmark) -> dict[str, Any]:
    """Watch the runs, write JSON and plot, and return the result.

    Raises:
        ValueError: for fewer than two runs per caption, a level outside (0, 1), or a reward that is a reward model.
    """
    if config.runs < 2 or config.captions < 1 or config.batch_size < 1:
        raise ValueError(
            f"values are compared within captions: at least 1 caption and 2 runs; got {config.captions}, {config.runs}"
        )
    if not config.levels or not all(0 < share < 1 for share in config.levels):
        raise ValueError(f"levels are shares of the steps between 0 and 1; got {config.levels}")
    reward, drm = load_judge(config.reward), load_judge(config.drm)
    if isinstance(reward, DiffusionRewardModel) or not isinstance(drm, DiffusionRewardModel):
        raise ValueError("reward must be a function of images and drm a diffusion reward model")
    pipe = load_pipeline(config.model)
    generation = Generation.for_model(config.model, config.steps)
    levels = sorted({max(1, round(share * config.steps)) for share in config.levels})
    found: dict[str, dict[int, list[np.ndarray]]] = {}
    finals, costs = [], {}
    sigma: list[float] = []
    prompts = [c.text for c in caption_set(config.captions, 0)]
    for start in tqdm(range(0, len(prompts), config.batch_size), desc="values", unit="batch"):
        batch = prompts[start : start + config.batch_size]
        with watched(pipe, batch, generation, reward, config.seed, config.autocast) as (problem, denoiser):
            estimators: dict[str, Value] = {
                "Tweedie": EstimatedValue(denoiser, reward, Ledger(), Tweedie()),
                "smoothed, 4": EstimatedValue(denoiser, reward, Ledger(), Smoothed(4), problem.streams),
                "lookahead, 2": EstimatedValue(denoiser, reward, Ledger(), Lookahead(2)),
                "lookahead, 4": EstimatedValue(denoiser, reward, Ledger(), Lookahead(4)),
                "DRM": DRMValue(drm, denoiser, Ledger(), denoiser.token_grid),
            }
            costs = {name: v.evaluations_per_row for name, v in estimators.items()}
            sigma = denoiser.schedule.sigma.tolist()
            rows, slots = problem.rows.repeat(config.runs), list(range(config.runs))
            x = torch.cat([problem.initial(c) for c in slots])
            for jump in config.transition.jumps(denoiser.schedule):
                _, x = problem.advance(x, rows, jump, config.transition, slots)
                if jump[1] in levels:
                    for name, value in estimators.items():
                        scores = value(x, jump[1], rows).double().numpy().reshape(config.runs, -1).T
                        found.setdefault(name, {}).setdefault(jump[1], []).append(scores)
            final = problem.final_rewards(x, rows)
            assert final is not None
            finals.append(final.numpy().reshape(config.runs, -1).T)
    table = np.concatenate(finals)
    result: dict[str, Any] = {
        "captions": config.captions, "runs": config.runs, "steps": config.steps, "reward": config.reward, "drm": config.drm,
        "autocast": config.autocast, "evaluations_per_row": costs, "levels": levels, "sigma": [sigma[i] for i in levels],
        "estimators": {
            name: [_figures(np.concatenate(by_level[i]), table, name != "DRM") for i in levels]
            for name, by_level in found.items()
        },
    }  # fmt: skip
    write_json(config.out, result)
    write_atomically(config.out.with_suffix(".png"), lambda path: plot(result).savefig(path, dpi=130))
    return result


def _figures(values: np.ndarray, final: np.ndarray, same_units: bool) -> dict[str, float | None]:
    """Figures of values [C, R] against final rewards [C, R], captions by runs."""

    def correlation(a: np.ndarray, b: np.ndarray) -> float | None:
        return None if a.std() < 1e-9 or b.std() < 1e-9 else round(float(np.corrcoef(a.ravel(), b.ravel())[0, 1]), 4)

    within = [m - m.mean(1, keepdims=True) for m in (values, final)]
    return {
        "correlation": correlation(values, final),
        "correlation_within_captions": correlation(within[0], within[1]),
        "bias": round(float((values - final).mean()), 4) if same_units else None,
    }


def plot(result: dict[str, Any]) -> "Figure":
    """Correlations and bias against the noise level."""
    from matplotlib.figure import Figure  # takes its time, which other commands need not

    figure = Figure(figsize=(13, 3.8), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, key, title in zip(
        axes, ("correlation", "correlation_within_captions", "bias"),
        ("correlation with the final reward", "correlation within captions", "bias"), strict=True,
    ):  # fmt: skip
        for i, (name, figures) in enumerate(result["estimators"].items()):
            points = [(s, f[key]) for s, f in zip(result["sigma"], figures, strict=True) if f[key] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), marker="os^Dv"[i % 5], ms=4, label=name)
        axis.axhline(0, color="0.7", lw=0.8)
        axis.set(title=title, xlabel="noise level sigma")
        axis.invert_xaxis()
        axis.grid(alpha=0.25)
    axes[0].legend(fontsize=8)
    return figure


def values_table(result: dict[str, Any]) -> str:
    """Correlation within captions (bias) per estimator and level, as a Markdown table."""
    lines = ["| value | evaluations | " + " | ".join(f"{s:.2f}" for s in result["sigma"]) + " |"]
    lines.append("|---|---|" + "---|" * len(result["sigma"]))
    for name, figures in result["estimators"].items():
        cells = [
            ("" if f["correlation_within_captions"] is None else f"{f['correlation_within_captions']:.2f}")
            + ("" if f["bias"] is None else f" ({f['bias']:+.2f})")
            for f in figures
        ]
        lines.append(f"| {name} | {result['evaluations_per_row'][name]:.2f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)

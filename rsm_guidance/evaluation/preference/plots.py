"""Plots of how scores agree with preferences; matplotlib takes its time, so it is loaded when something is drawn."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rsm_guidance.evaluation.preference.figures import Figures
from rsm_guidance.io.files import write_atomically


def draw_levels(curves: Mapping[str, Mapping[float, Figures]], path: Path) -> None:
    """Accuracy against the noise level, with one standard error, pairs taken as independent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for label, curve in curves.items():
        points = [
            (s, f["accuracy"], f["standard_error"]) for s, f in sorted(curve.items()) if f["accuracy"] is not None
        ]
        if points:
            sigma, accuracy, error = np.array(points, float).T
            axes.errorbar(sigma, accuracy, error, marker="o", capsize=3, label=label)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="noise level sigma", ylabel="pair accuracy", ylim=(0.35, 1.02))
    if axes.containers:
        axes.legend()
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=150))


def draw_calibration(curves: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Share of pairs whose higher-scored image is preferred, against the probability that the scores give it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot([0.5, 1], [0.5, 1], color="grey", linewidth=0.8, linestyle=":")
    for label, found in curves.items():
        shown = found["bins"]
        axes.plot([b["predicted"] for b in shown], [b["observed"] for b in shown], marker="o", label=label)
    axes.set(xlabel="predicted probability", ylabel="share preferred", xlim=(0.48, 1.02))
    axes.legend()
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=150))

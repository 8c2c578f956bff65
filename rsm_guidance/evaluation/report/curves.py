"""A comparison's report as curves."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

NAMED = 6
"""Samplers that have a colour and a name; the others are grey."""
_MARKS = "os^Dv<>pXh*"
_UNITS = {"evaluations": "NFE per image", "seconds": "seconds per image"}


def curves(report: dict[str, Any]) -> Figure:
    """The first gold reward, where there is one, and the proxy reward, against NFE and against seconds."""
    gold = list(report["settings"]["monitors"])[:1]
    figure = Figure(figsize=(12.5, 4.3 * (len(gold) + 1)), layout="constrained")
    axes = figure.subplots(len(gold) + 1, 2, squeeze=False)
    names = {name: f"gold reward: {name}" for name in gold} | {"reward": f"proxy reward: {report['settings']['guide']}"}
    coloured = best_samplers(report)
    for row, (quantity, name) in zip(axes, names.items(), strict=True):
        for axis, unit in zip(row, _UNITS, strict=True):
            _draw(axis, report, quantity, unit, coloured)
            axis.set(xscale="log", xlabel=_UNITS[unit], ylabel=name[:48])
            axis.xaxis.set_major_formatter(ScalarFormatter())
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_xticks(_ticks([r[unit] for r in report["runs"].values()]))
            axis.grid(alpha=0.25)
    axes[0][1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    return figure


def best_samplers(report: dict[str, Any]) -> list[str]:
    """Labels of the best samplers at their largest budgets, at most six, by the first gold reward, else by the proxy."""
    gold = next(iter(report["settings"]["monitors"]), None)
    largest: dict[str, dict[str, Any]] = {}
    for run in report["runs"].values():
        known = largest.get(run["label"])
        if known is None or run["evaluations"] > known["evaluations"]:
            largest[run["label"]] = run
    score = {label: (r["reward"] if gold is None else r["monitors"][gold])[0] for label, r in largest.items()}
    return sorted(score, key=lambda label: -score[label])[:NAMED]


def _draw(axis: Axes, report: dict[str, Any], quantity: str, unit: str, coloured: list[str]) -> None:
    """One line per sampler, with intervals; the coloured ones on top, in the order of the legend."""
    labels = list(dict.fromkeys(r["label"] for r in report["runs"].values()))
    others = [label for label in labels if label not in coloured]
    for i, label in enumerate([*coloured, *others]):
        runs = sorted((r for r in report["runs"].values() if r["label"] == label), key=lambda r: r["evaluations"])
        y = np.array([r["reward"] if quantity == "reward" else r["monitors"][quantity] for r in runs])
        named = label in coloured
        shift = 1 + 0.006 * (i - len(labels) / 2)  # apart, so that intervals can be told from each other
        axis.errorbar(
            [r[unit] * shift for r in runs],
            y[:, 0],
            [y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]],
            label=label if named else "others" if label == others[0] else None,
            color=f"C{coloured.index(label)}" if named else "0.75",
            marker=_MARKS[coloured.index(label)] if named else ".",
            ms=5 if named else 3,
            lw=1.2 if named else 0.7,
            elinewidth=0.7,
            zorder=3 if named else 1,
        )


def _ticks(values: list[float]) -> list[float]:
    """1, 2 and 5 times powers of ten around positive values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    marks = [m * 10.0**e for e in range(low, high + 1) for m in (1, 2, 5)]
    return [m for m in marks if 0.7 * min(values) <= m <= 1.4 * max(values)]

"""A comparison's report as curves and as a table."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter


def curves(report: dict[str, Any]) -> Figure:
    """Reward, and the first monitor where there is one, against denoiser evaluations and against seconds."""
    watched = list(report["settings"]["monitors"])[:1]
    rows = [*watched, "reward"]
    figure = Figure(figsize=(12.5, 4.3 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), 2, squeeze=False)
    names = {name: f"monitor: {name}" for name in watched} | {
        "reward": "guide: " + report["settings"]["guide"].partition(" model ")[0]
    }
    labels = list(dict.fromkeys(r["label"] for r in report["runs"].values()))
    marks, colours = "os^Dv<>pXh*", [f"C{i}" for i in range(10)]
    for row, quantity in enumerate(rows):
        for column, (axis, unit) in enumerate((("evaluations", "denoiser evaluations"), ("seconds", "seconds"))):
            ax = axes[row][column]
            for i, label in enumerate(labels):
                runs = [r for r in report["runs"].values() if r["label"] == label]
                runs.sort(key=lambda r: r["evaluations"])
                y = np.array([r["reward"] if quantity == "reward" else r["monitors"][quantity] for r in runs])
                style = {"marker": marks[i % len(marks)], "color": colours[i % 10], "ms": 5, "lw": 1.2}
                style |= {"ls": ("-", "--", ":")[i // 10 % 3]}
                shift = 1 + 0.006 * (i - len(labels) / 2)  # apart, so that intervals can be told from each other
                ax.errorbar(
                    [r[axis] * shift for r in runs], y[:, 0], [y[:, 0] - y[:, 1], y[:, 2] - y[:, 0]],
                    label=label, elinewidth=0.7, **style,
                )  # fmt: skip
            ax.set(xscale="log", xlabel=f"{unit} per image", ylabel=names[quantity][:48])
            ax.xaxis.set_major_formatter(ScalarFormatter())
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_xticks(_ticks([r[axis] for r in report["runs"].values()]))
            ax.grid(alpha=0.25)
    axes[0][1].legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8)
    return figure


def _ticks(values: list[float]) -> list[float]:
    """1, 2 and 5 times powers of ten around positive values."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    marks = [m * 10.0**e for e in range(low, high + 1) for m in (1, 2, 5)]
    return [m for m in marks if 0.7 * min(values) <= m <= 1.4 * max(values)]


def table(report: dict[str, Any]) -> str:
    """The report as a Markdown table, one row per run."""
    watched = list(report["settings"]["monitors"])
    head = ["sampler", "evaluations", *watched, "guide", "diversity", "s/image"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    show: Callable[[list[float]], str] = lambda v: f"{v[0]:.3f} [{v[1]:.3f}, {v[2]:.3f}]"  # noqa: E731
    for key, r in report["runs"].items():
        cells = [key, f"{r['evaluations']:.0f}", *(show(r["monitors"][n]) for n in watched), f"{r['reward'][0]:.2f}"]
        cells += ["" if r["diversity"] is None else f"{r['diversity'][0]:.3f}", f"{r['seconds']:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)

"""Plots of a training: its curves, and the strength of guidance at each noise level."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rsm_guidance.io.files import write_atomically

_SHOWN = (("reward", "reward"), ("gold", "gold reward"), ("diversity", "diversity"), ("drift", "drift of velocities"))


def draw_curves(history: Sequence[Mapping[str, float]], path: Path) -> None:
    """What was evaluated, against the updates made."""
    from matplotlib.figure import Figure

    shown = [(name, label) for name, label in _SHOWN if name in history[0]]
    figure = Figure(figsize=(3.4 * len(shown), 2.9), layout="constrained")
    for axis, (name, label) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        axis.plot([entry["step"] for entry in history], [entry[name] for entry in history], marker="o", markersize=3)
        axis.set(xlabel="updates", title=label)
        axis.grid(alpha=0.25)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=120))


def draw_strengths(strengths: Mapping[str, Sequence[Any]], path: Path) -> None:
    """The realised strength h of each level, relative to their mean."""
    from matplotlib.figure import Figure

    points = [(s, h) for s, h in zip(strengths["sigma"], strengths["h"], strict=True) if h]
    mean = sum(h for _, h in points) / max(len(points), 1)
    figure = Figure(figsize=(5, 3), layout="constrained")
    axis = figure.add_subplot()
    axis.plot([s for s, _ in points], [h / mean for _, h in points], marker="o")
    axis.set(xlabel="noise level sigma", ylabel="strength h / mean", ylim=(0, None))
    axis.grid(alpha=0.25)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=120))

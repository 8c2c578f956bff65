"""A run as a picture: candidates, lineages and trees of one image, drawn from its trace."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.collections import LineCollection
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rsm_guidance.io.files import write_atomically

_CHOSEN, _OTHER = "C3", "0.6"


def draw_trace(trace: dict[str, Any], row: int = 0) -> Figure:
    """What a run tried for one image: its tree, its lineages, its candidates per level, or its finished candidates.

    Args:
        trace: as in `SamplerOutput.trace`, or read back from JSON.
        row: which image.

    Raises:
        ValueError: if there is no such image, or the run compared nothing (as `none` does).
    """
    count = len(trace["prompts"])
    if not 0 <= row < count:
        raise ValueError(f"the trace is of {count} images; there is no image {row}")
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    levels = [entry for entry in trace.get("levels", []) if isinstance(entry, dict)]
    drawn = []
    if trace.get("tree"):
        drawn.append(lambda axis: _tree(axis, trace["tree"][row]))
    elif any("ancestors" in entry for entry in levels):
        drawn.append(lambda axis: _lineage(axis, levels, row, trace))
    elif any("scores" in entry for entry in levels):
        drawn.append(lambda axis: _levels(axis, levels, row))
    if trace.get("candidates", {}).get("rewards"):
        drawn.append(lambda axis: _candidates(axis, trace["candidates"], row))
    elif trace.get("lookahead"):
        drawn.append(lambda axis: _candidates(axis, {"rewards": trace["lookahead"]["rewards"], "chosen": None}, row))
    if not drawn:
        raise ValueError(
            f"the sampler {trace['sampler']['name']!r} compared nothing in this run; there is nothing to draw"
        )
    for axis, draw in zip(
        np.atleast_1d(figure.subplots(1, len(drawn), width_ratios=[3, 2][: len(drawn)])), drawn, strict=True
    ):
        draw(axis)
    reward = "" if trace.get("rewards") is None else f"   reward {trace['rewards'][row]:.3f}"
    figure.suptitle(f"{trace['sampler']['name']}: {trace['prompts'][row]}{reward}", fontsize=10)
    return figure


def write_trace_picture(path: Path, trace: dict[str, Any], row: int = 0) -> None:
    """Draw a trace into a PNG or SVG file, atomically."""
    figure = draw_trace(trace, row)
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=130))


def _tree(axis: Axes, tree: dict[str, Any]) -> None:
    """Nodes by level, leaves evenly spread, parents over the middle of their children; colours are values."""
    parent, level = tree["parent"], np.array(tree["level"])
    children: dict[int, list[int]] = {}
    for node, above in enumerate(parent):
        if above is not None and above >= 0:
            children.setdefault(above, []).append(node)
    place = np.zeros(len(parent))
    order = [node for node in range(len(parent)) if parent[node] is None or parent[node] < 0]
    stack, column = order[::-1], 0
    while stack:  # depth first, so that branches do not cross
        node = stack.pop()
        if node in children:
            stack += children[node][::-1]
        else:
            place[node], column = column, column + 1
    for node in sorted(children, key=lambda n: -level[n]):
        place[node] = np.mean([place[child] for child in children[node]])
    path, node = set(), tree["chosen"]
    while node is not None and node >= 0:
        path.add(node)
        node = parent[node]
    edges = [(above, node) for above, below in children.items() for node in below]
    for chosen, colour, width in ((False, _OTHER, 0.5), (True, _CHOSEN, 1.8)):
        lines = [[(level[a], place[a]), (level[n], place[n])] for a, n in edges if (n in path) == chosen]
        axis.add_collection(LineCollection(lines, colors=colour, linewidths=width, zorder=1 + chosen))
    value = np.array([np.nan if v is None else v for v in tree["value"] or [None] * len(parent)], float)
    finite = value[np.isfinite(value)]
    scale = Normalize(*(np.percentile(finite, [5, 95]) if len(finite) else (0, 1)))
    size = 6 + 40 * np.sqrt(np.array(tree["visits"], float) / max(1, max(tree["visits"])))
    axis.scatter(level, place, s=size, c=value, cmap="viridis", norm=scale, zorder=3, linewidths=0)
    if len(finite) and axis.figure is not None:
        axis.figure.colorbar(ScalarMappable(scale, "viridis"), ax=axis, label="value", shrink=0.8)
    axis.autoscale()
    axis.set(
        xlabel="level (0 is noise, before it the root)",
        yticks=[],
        title=f"{len(parent)} nodes, {len(tree['leaves'])} leaves",
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _lineage(axis: Axes, levels: list[dict[str, Any]], row: int, trace: dict[str, Any]) -> None:
    """Particles over levels; each line leads to the ancestor, and the lineage of the returned particle stands out."""
    entries = [entry for entry in levels if "ancestors" in entry]
    returned = trace.get("candidates", {}).get("chosen")
    count = len(entries[0]["ancestors"][row])
    followed = {returned[row]} if returned else set()
    for index in range(len(entries) - 1, -1, -1):
        entry, before = entries[index], entries[index - 1]["level"] if index else 0
        ancestors = entry["ancestors"][row]
        for slot, ancestor in enumerate(ancestors):
            mine = slot in followed
            axis.plot(
                [before, entry["level"]],
                [ancestor, slot],
                color=_CHOSEN if mine else _OTHER,
                lw=1.8 if mine else 0.7,
                zorder=1 + mine,
            )
        followed = {ancestors[slot] for slot in followed if slot < len(ancestors)}
    sizes = [entry["effective_sample_size"][row] for entry in entries if "effective_sample_size" in entry]
    note = f", mean effective sample size {np.mean(sizes):.1f}" if sizes else ""
    axis.set(xlabel="level (0 is noise)", ylabel="particle", title=f"lineages of {count} particles{note}")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))


def _levels(axis: Axes, levels: list[dict[str, Any]], row: int) -> None:
    """Scores of the candidates of every level, the chosen or kept ones connected or filled."""
    path = []
    for entry in levels:
        scores = entry.get("scores")
        if not scores or row >= len(scores) or not scores[row]:
            continue
        mine = np.atleast_1d(np.array(scores[row], float))
        axis.scatter([entry["level"]] * len(mine), mine, s=12, color=_OTHER, zorder=1)
        if "kept" in entry:
            kept = mine[entry["kept"][row]]
            axis.scatter([entry["level"]] * len(kept), kept, s=14, color=_CHOSEN, zorder=2)
        elif "chosen" in entry and len(mine) > entry["chosen"][row]:
            path.append((entry["level"], mine[entry["chosen"][row]]))
    if path:
        axis.plot(*zip(*path, strict=True), color=_CHOSEN, marker="o", ms=4, lw=1.3, zorder=2)
    axis.set(xlabel="level (0 is noise)", ylabel="value at that level", title="candidates per level")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def _candidates(axis: Axes, candidates: dict[str, Any], row: int) -> None:
    """Rewards of the finished candidates in the order they were made, and the best so far."""
    rewards = np.array(candidates["rewards"][row], float)
    axis.scatter(range(len(rewards)), rewards, s=12, color=_OTHER)
    axis.step(range(len(rewards)), np.maximum.accumulate(rewards), where="post", color="C0", lw=1)
    if candidates.get("chosen"):
        chosen = candidates["chosen"][row]
        axis.scatter([chosen], [rewards[chosen]], s=36, color=_CHOSEN, zorder=3)
    axis.set(xlabel="finished candidate", ylabel="reward", title=f"{len(rewards)} finished")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))

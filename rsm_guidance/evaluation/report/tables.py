"""Results as Markdown tables."""

from typing import Any


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def comparison_table(report: dict[str, Any]) -> str:
    """A comparison, one row per run: NFE, the gold rewards with their intervals, the proxy reward, diversity and seconds."""
    watched = list(report["settings"]["monitors"])
    rows = []
    for key, r in report["runs"].items():
        gold = [f"{mean:.3f} [{low:.3f}, {high:.3f}]" for mean, low, high in (r["monitors"][name] for name in watched)]
        diversity = "" if r["diversity"] is None else f"{r['diversity'][0]:.3f}"
        rows.append([key, f"{r['evaluations']:.0f}", *gold, f"{r['reward'][0]:.2f}", diversity, f"{r['seconds']:.2f}"])
    return table(["sampler", "NFE", *watched, "proxy reward", "diversity", "s/image"], rows)


def values_table(result: dict[str, Any]) -> str:
    """Correlation within prompts (bias) per estimator and noise level."""
    rows = []
    for name, figures in result["estimators"].items():
        cells = [
            ("" if f["correlation_within_prompts"] is None else f"{f['correlation_within_prompts']:.2f}")
            + ("" if f["bias"] is None else f" ({f['bias']:+.2f})")
            for f in figures
        ]
        rows.append([name, f"{result['evaluations_per_row'][name]:.2f}", *cells])
    return table(["value", "NFE", *(f"{sigma:.2f}" for sigma in result["sigma"])], rows)


def engine_table(result: dict[str, Any]) -> str:
    """Milliseconds per step of every pipeline and path, their ratio to stock, and peak memory."""
    rows = []
    for model in result["models"]:
        for name, path in model["paths"].items():
            milliseconds, gigabytes = 1000 * path["seconds_per_step"], path["peak_memory_bytes"] / 1e9
            rows.append([model["pipeline"], name, f"{milliseconds:.2f}", f"{path['ratio']:.3f}", f"{gigabytes:.2f}"])
    return table(["pipeline", "path", "ms per step", "of stock", "peak GB"], rows)

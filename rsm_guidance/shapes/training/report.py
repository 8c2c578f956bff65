"""How good a reward model is: pair and sibling accuracy, and how values foretell the outcome, per noise level."""

from pathlib import Path

import numpy as np
import torch

from rsm_guidance.core.random import generator_of
from rsm_guidance.io.files import write_atomically
from rsm_guidance.reward_models import DiffusionRewardModel
from rsm_guidance.shapes.training.groups import BranchGroups
from rsm_guidance.training.reward_model.losses import pairs_won

SIGMAS = (0.05, 0.2, 0.4, 0.6, 0.75, 0.85, 0.92, 0.97)
_FEW_PAIRS = 20


@torch.no_grad()
def pair_accuracy(drm: DiffusionRewardModel, groups: BranchGroups, sigma: float, seed: int = 0) -> tuple[float, int]:
    """Accuracy on finished samples re-noised to one level, and the number of pairs."""
    g, k = groups.finals.shape[:2]
    noise = torch.randn(groups.finals.shape, generator=generator_of("pair accuracy", seed))
    latents = (1 - sigma) * groups.finals.float() + sigma * noise
    prompts = [p for p in groups.prompts for _ in range(k)]
    right, count = pairs_won(drm.score(latents.flatten(0, 1), 1000 * sigma, prompts).view(g, k), groups.scores)
    return right / max(count, 1), count


@torch.no_grad()
def sibling_accuracy(drm: DiffusionRewardModel, groups: BranchGroups) -> dict[float, tuple[float, int]]:
    """Accuracy on siblings by the noise level at which they lie: sigma -> (accuracy, pairs)."""
    k = groups.scores.shape[1]
    result = {}
    for sigma in sorted(set(groups.sigma.tolist())):
        index = (groups.sigma == sigma).nonzero().flatten()
        prompts = [groups.prompts[i] for i in index.tolist() for _ in range(k)]
        scores = drm.score(groups.children(index).float().flatten(0, 1), 1000 * sigma, prompts).view(-1, k)
        right, count = pairs_won(scores, groups.scores[index])
        if count:
            result[sigma] = (right / count, count)
    return result


@torch.no_grad()
def value_correlation(drm: DiffusionRewardModel, groups: BranchGroups) -> dict[float, float]:
    """Correlation over all prompts of the score of latents on their way with what they end in, by level from noise to data.

    The last level is that of the finished samples, 0.
    """
    g, k, steps = groups.paths.shape[:3]
    prompts = [p for p in groups.prompts for _ in range(k)]
    known = [(float(groups.sigmas[0, n]), groups.paths[:, :, n]) for n in range(steps)]
    result = {}
    for sigma, latents in [*known, (0.0, groups.finals)]:
        scores = drm.score(latents.float().flatten(0, 1), 1000 * sigma, prompts)
        both = torch.stack([scores.double().cpu(), groups.scores.flatten().double()])
        result[sigma] = float(torch.corrcoef(both)[0, 1].nan_to_num())  # 0 where either does not vary
    return result


def validation_accuracy(drm: DiffusionRewardModel, groups: BranchGroups) -> dict[str, float]:
    """Pair accuracy over three levels, sibling accuracy, mean correlation of values, and a mean of all.

    The mean is half of the accuracy over all pairs together, half of the correlation.
    """
    drm.eval()
    pairs, siblings = (
        [pair_accuracy(drm, groups, s) for s in (0.05, 0.4, 0.75)],
        [*sibling_accuracy(drm, groups).values()],
    )

    def pooled(results: list[tuple[float, int]]) -> float:
        return sum(a * n for a, n in results) / max(1, sum(n for _, n in results))

    values = list(value_correlation(drm, groups).values())
    found = {"pair": pooled(pairs), "sibling": pooled(siblings), "correlation": sum(values) / len(values)}
    return {**found, "mean": (pooled(pairs + siblings) + found["correlation"]) / 2}


def report_accuracy(drm: DiffusionRewardModel, groups: BranchGroups, plot: Path) -> dict[str, object]:
    """Accuracy per level on held-out captions, generated images only, and a plot of it."""
    pair = {s: pair_accuracy(drm, groups, s) for s in SIGMAS}
    sibling = sibling_accuracy(drm, groups)
    draw_accuracy({"re-noised pairs": pair, "siblings": sibling}, plot)
    return {
        "pair": [{"sigma": s, "accuracy": a, "pairs": n} for s, (a, n) in pair.items()],
        "sibling": [{"sigma": s, "accuracy": a, "pairs": n} for s, (a, n) in sibling.items()],
        "correlation": [{"sigma": s, "correlation": c} for s, c in value_correlation(drm, groups).items()],
        "validation": validation_accuracy(drm, groups),
    }


def draw_accuracy(curves: dict[str, dict[float, tuple[float, int]]], path: Path) -> None:
    """Accuracy against noise level with one standard error, pairs taken as independent; levels of few pairs left out."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for label, curve in curves.items():
        points = [(sigma, a, n) for sigma, (a, n) in curve.items() if n >= _FEW_PAIRS]
        if not points:
            continue
        sigma, accuracy, count = np.array(points).T
        error = np.sqrt(accuracy * (1 - accuracy) / count)
        axes.errorbar(sigma, accuracy, error, marker="o", capsize=3, label=label)
    axes.axhline(0.5, color="grey", linewidth=0.8, linestyle=":")
    axes.set(xlabel="noise level sigma", ylabel="accuracy", ylim=(0.35, 1.0), title="Reward model on held-out captions")
    if axes.containers:
        axes.legend()
    write_atomically(path, lambda partial: figure.savefig(partial, dpi=150))

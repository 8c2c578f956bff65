"""Held-out pairs at several noise levels, scored by all processes together."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object

from rsm_guidance.data.order import epoch_batches
from rsm_guidance.data.preferences import PreferenceData
from rsm_guidance.evaluation.preference.figures import PairScores
from rsm_guidance.training.reward_model.collate import collate
from rsm_guidance.training.reward_model.objective import PairObjective

LEVELS = (0.0, 0.05, 0.2, 0.4, 0.6, 0.75, 0.85, 0.95)
"""Noise levels (sigma) of reports."""


@torch.no_grad()
def score_pairs(
    objective: PairObjective,
    data: PreferenceData,
    levels: Sequence[float],
    size: int,
    limit: int | None = None,
    processes: int = 1,
    process: int = 0,
) -> dict[float, PairScores]:
    """Raw scores of pairs at noise levels; every process calls it, and gets all of them.

    Args:
        objective: what scores.
        data: the pairs.
        levels: sigma; the nearest entry of the scheduler's table is used.
        size: pairs per forward pass.
        limit: pairs, from the first on; default all.
        processes: that share the work.
        process: this one.

    Returns:
        By level, in the order of the data.
    """
    found: dict[float, PairScores] = {}
    count = min(len(data), limit or len(data))
    entries = data.entries[:count]
    labels = np.array([entry.probability for entry in entries], np.float32)
    names = [entry.source for entry in entries], [entry.category for entry in entries]
    batches = list(_batches(data, count, size))[process::processes]
    for level in levels:
        own: list[tuple[int, float, float]] = []
        for batch in batches:
            index = int(objective.table.nearest(torch.tensor([level])))
            scores = objective({**batch, "level": index})["scores"].float().cpu()
            own += [(pair, *map(float, row)) for pair, row in zip(batch["pair"], scores, strict=True)]
        everyone = gather_object(own) if processes > 1 else own
        ordered = np.array([row[1:] for row in sorted(everyone)], np.float64)
        found[level] = PairScores(ordered, labels, *names)
    return found


def _batches(data: PreferenceData, count: int, size: int) -> Iterator[dict[str, Any]]:
    """Batches of one bucket each."""
    for rows in epoch_batches(data.groups[:count], size, 0, 0):
        yield collate([data[row] for row in rows], 0)

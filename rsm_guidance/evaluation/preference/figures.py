"""How well scores agree with preferences: accuracy, ties, calibration, and agreement between rewards.

A pair is decided if the probability that its first image is preferred is not 1/2.  Ties are counted apart: they have no right
answer, but a good reward scores their images alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Figures = dict[str, float | int | None]
_BINS = 10
_FLAT = 1e-6


@dataclass(frozen=True)
class PairScores:
    """Scores of pairs by one reward at one noise level.

    Attributes:
        scores: [N, 2], of the first and the second image.
        probability: [N], that the first is preferred.
        source, category: [N], what the pairs come from.
    """

    scores: np.ndarray
    probability: np.ndarray
    source: Sequence[str] = ()
    category: Sequence[str] = ()

    @property
    def margin(self) -> np.ndarray:
        """Score of the first less that of the second [N]."""
        return np.asarray(self.scores[:, 0] - self.scores[:, 1], float)

    @property
    def decided(self) -> np.ndarray:
        """Whether one image of a pair is preferred [N]."""
        return np.asarray(self.probability != 0.5)

    def part(self, chosen: np.ndarray) -> "PairScores":
        """Some of the pairs, by a mask [N]."""
        names = [
            [n for n, c in zip(column, chosen, strict=True) if c] for column in (self.source, self.category) if column
        ]
        return PairScores(self.scores[chosen], self.probability[chosen], *names)


def figures_of(pairs: PairScores) -> Figures:
    """Figures of some pairs.

    Returns:
        "pairs" decided, "accuracy" over them (equal scores count half) and its "standard_error", "ties" and
        "tie_separation" (probability that a decided pair is further apart than a tie; 1/2 if ties look like the others),
        "loss" (soft Bradley-Terry, less its best value), "margin" (mean |difference|), and "mean" and "deviation" of the
        scores.  None where there is nothing to tell.
    """
    margin, decided = pairs.margin, pairs.decided
    right = np.where(margin == 0, 0.5, (margin > 0) == (pairs.probability > 0.5))[decided]
    count = int(decided.sum())
    accuracy = float(right.mean()) if count else None
    return {
        "pairs": count,
        "accuracy": accuracy,
        "standard_error": None if accuracy is None else float(np.sqrt(accuracy * (1 - accuracy) / count)),
        "ties": len(margin) - count,
        "tie_separation": _above(np.abs(margin[decided]), np.abs(margin[~decided])),
        "loss": float(soft_loss(margin, pairs.probability).mean()) if len(margin) else None,
        "margin": float(np.abs(margin).mean()) if len(margin) else None,
        "mean": float(pairs.scores.mean()) if len(margin) else None,
        "deviation": float(pairs.scores.std()) if len(margin) else None,
    }


def grouped(pairs: PairScores, by: str) -> dict[str, Figures]:
    """Figures by "source" or "category"; pairs without one are under ""."""
    names = np.array(list(getattr(pairs, by)) or [""] * len(pairs.scores), object)
    return {str(name): figures_of(pairs.part(names == name)) for name in sorted(set(names))}


def scores_vary(pairs: PairScores) -> bool:
    """Whether scores tell images apart at all."""
    return bool(np.ptp(pairs.scores) > _FLAT * (1 + np.abs(pairs.scores).max()))


def soft_loss(margin: np.ndarray, probability: np.ndarray) -> np.ndarray:
    """Cross-entropy of sigmoid(margin) against probabilities, less their entropy; all [N]."""
    p = np.asarray(probability, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = -np.nan_to_num(p * np.log(p)) - np.nan_to_num((1 - p) * np.log1p(-p))
    return p * np.logaddexp(0, -margin) + (1 - p) * np.logaddexp(0, margin) - entropy


def calibration(pairs: PairScores, bins: int = _BINS) -> dict[str, Any]:
    """How often the first image is preferred where sigmoid(margin) says so: bins of equal width over [0.5, 1].

    The image of the higher score counts as the first, so that no order of the pairs matters.

    Returns:
        "bins" with "predicted", "observed" and "pairs", and "error", their mean difference weighted by pairs.
    """
    margin, probability = pairs.margin, np.asarray(pairs.probability, float)
    predicted = 1 / (1 + np.exp(-np.abs(margin)))
    observed = np.where(margin >= 0, probability, 1 - probability)
    observed = np.where(margin == 0, 0.5, observed)
    index = np.minimum(((predicted - 0.5) * 2 * bins).astype(int), bins - 1)
    found = [
        {
            "predicted": float(predicted[index == i].mean()),
            "observed": float(observed[index == i].mean()),
            "pairs": int(n),
        }
        for i in range(bins)
        if (n := (index == i).sum())
    ]
    total = sum(b["pairs"] for b in found)
    error = sum(abs(b["predicted"] - b["observed"]) * b["pairs"] for b in found) / total if total else None
    return {"bins": found, "error": error}


def agreement(one: PairScores, other: PairScores) -> Figures:
    """How two rewards agree on the same pairs.

    Returns:
        "same_choice" (share of pairs that both tell apart and order alike), "correlation" and "rank_correlation" of their
        differences.
    """
    from scipy.stats import rankdata

    a, b = one.margin, other.margin
    told = (a != 0) & (b != 0)
    return {
        "pairs": int(told.sum()),
        "same_choice": float(((a > 0) == (b > 0))[told].mean()) if told.any() else None,
        "correlation": _correlation(a, b),
        "rank_correlation": _correlation(rankdata(a), rankdata(b)),
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _above(high: np.ndarray, low: np.ndarray) -> float | None:
    """Probability that one of `high` is above one of `low`, equal ones half."""
    if not len(high) or not len(low):
        return None
    ordered = np.sort(low)
    below, equal = np.searchsorted(ordered, high), np.searchsorted(ordered, high, side="right")
    return float(((below + equal) / 2).mean() / len(low))

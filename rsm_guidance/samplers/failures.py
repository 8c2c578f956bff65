"""What becomes of candidates whose score is not a number: they lose, and the run goes on.

A failed score is replaced by one below every score known for its prompt, a finite one, so that differences and weights
stay numbers.  The call fails only where all scores of all finished images do.
"""

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.rewards import RewardError

_WORST = -1e9  # where nothing is known to compare with


@dataclass
class Failures:
    """The failed scores of one run.

    Attributes:
        count: how many there were.
        first: what the first of them was.
        judged: whether any finished image got a score.
    """

    count: int = 0
    first: str = ""
    judged: bool = False
    _replaced: set[float] = field(default_factory=set)
    _worst: dict[str, float] = field(default_factory=dict)

    def outranked(self, scores: Tensor, rows: Tensor, name: str) -> Tensor:
        """Scores [R] of latents of rows [R], with those that failed below all others.

        Raises:
            RewardError: if several were compared and none has, nor ever had, a score.
        """
        good = scores.isfinite()
        if bool(good.any()):
            self._worst[name] = min(float(scores[good].min()), self._worst.get(name, torch.inf))
        if bool(good.all()):
            return scores
        index = int((~good).nonzero()[0])
        message = f"{name} returned {float(scores[index])} for item {index} of {len(scores)}"
        if not self.count:
            self.first = message
            warnings.warn(f"{message}; such candidates lose", RuntimeWarning, stacklevel=2)
        self.count += int((~good).sum())
        if len(scores) > len(set(rows.tolist())) and name not in self._worst:
            raise RewardError(f"{message}, and no other score was a number; scores must be finite")
        replaced = scores.clone()
        for i in (~good).nonzero().flatten().tolist():
            known = scores[good & (rows == rows[i])]
            known = known if len(known) else scores[good]
            if len(known):
                low, high = float(known.min()), float(known.max())
                replaced[i] = low - max(high - low, 1e-3 * abs(low), 1e-6)
            else:
                replaced[i] = self._worst.get(name, 0.0) + _WORST
        self._replaced.update(replaced[~good].tolist())
        return replaced

    def closed(self, rewards: Tensor) -> Tensor:
        """The final rewards [B], NaN for images whose score failed.

        Raises:
            RewardError: if no image has one.
        """
        if self.count and not self.judged:
            raise RewardError(f"{self.first}, and no finished image got a score; scores must be finite")
        lost = torch.tensor([reward in self._replaced for reward in rewards.tolist()])
        return torch.where(lost, torch.nan, rewards)

    def record(self) -> dict[str, Any]:
        """For the trace."""
        return {"failed_scores": {"count": self.count, "first": self.first}} if self.count else {}

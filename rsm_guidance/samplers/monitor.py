"""A held-out reward that watches a run: reported beside the guide, and a reason to stop where the two part.

Whenever a sampler judges finished images, the monitor sees them, too.  Per image asked for it follows the best one so far
by the guide.  While the guide's best rises and the monitor's verdict of it does not, the run is over-optimising: after
`patience` such rises in a row a row counts as done, and when all rows are done the run stops and returns its best so far.
(The rule is ours.)
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rsm_guidance.core.contracts import Reward
from rsm_guidance.rewards import judged, name_of


@dataclass(frozen=True)
class Monitor:
    """What watches.

    Attributes:
        reward: a function of images and prompts that the guide does not contain.
        patience: rises of the guide without a rise of the monitor after which a row is done, >= 1; None never stops.
    """

    reward: Reward
    patience: int | None = None

    def __post_init__(self) -> None:
        if not callable(self.reward):
            raise ValueError(
                f"a monitor's reward is a function of images and prompts; got {type(self.reward).__name__}"
            )
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1; got {self.patience}")


@dataclass
class Watch:
    """The state of a monitor over one run of B rows: the best so far by the guide, and what the monitor says of it."""

    monitor: Monitor
    rows: int
    guide: Tensor = field(init=False)
    verdict: Tensor = field(init=False)
    misses: Tensor = field(init=False)
    history: list[dict[str, list[float | None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.guide = torch.full((self.rows,), -torch.inf, dtype=torch.float64)
        self.verdict = self.guide.clone()
        self.misses = torch.zeros(self.rows, dtype=torch.int64)

    def see(self, images: Tensor, prompts: list[str], rows: Tensor, guide: Tensor) -> None:
        """Finished images [R, ...] of some rows, and what the guide says of them [R]."""
        reward = self.monitor.reward
        verdicts = judged(lambda: reward(images, prompts), len(images), f"the monitor {name_of(reward)}")
        for row, rewarded, seen in zip(rows.tolist(), guide.tolist(), verdicts.tolist(), strict=True):
            if rewarded > self.guide[row]:
                first = bool(self.guide[row].isinf())
                better = first or seen > float(self.verdict[row])
                self.misses[row] = 0 if better else self.misses[row] + 1
                self.guide[row], self.verdict[row] = rewarded, seen
        known = [None if v == -torch.inf else v for v in self.guide.tolist()]
        self.history.append({"guide": known, "monitor": [None if k is None else v for k, v in zip(known, self.verdict.tolist(), strict=True)]})  # fmt: skip

    @property
    def parted(self) -> bool:
        """Whether guide and monitor have parted in every row."""
        patience = self.monitor.patience
        return patience is not None and bool((self.misses >= patience).all())

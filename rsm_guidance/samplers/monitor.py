"""A gold (held-out) reward that watches a run: reported beside the proxy that guides, and a reason to stop where they part.

Whenever a sampler scores finished images, the gold reward scores them, too.  Per image asked for it follows the best one so
far by the proxy.  While the proxy's best rises and its gold score does not, the run is over-optimising: after `patience` such
rises in a row a prompt counts as done, and when all are done the run stops and returns its best so far.  (The rule is ours.)
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.contracts import Reward
from rsm_guidance.rewards import RowReward, as_reward, check_rows, scored


@dataclass(frozen=True)
class Monitor:
    """What watches.

    Attributes:
        reward: a reward that the proxy does not contain.
        patience: rises of the proxy without a rise of the gold reward after which a prompt is done, >= 1; None never stops.
    """

    reward: Reward
    patience: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", as_reward(self.reward))
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience must be at least 1; got {self.patience}")


@dataclass
class Watch:
    """The state of a monitor over one run: the best so far by the proxy [B], and its gold score [B].

    Attributes:
        monitor: what watches.
        prompts: of the rows [B].
        columns: what the gold reward requires besides, B entries each.
        history: after every scoring, both of every row.
    """

    monitor: Monitor
    prompts: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    proxy: Tensor = field(init=False)
    gold: Tensor = field(init=False)
    bad_rounds: Tensor = field(init=False)
    history: list[dict[str, list[float | None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_rows(self.monitor.reward, self.prompts, self.columns)
        self.proxy = torch.full((len(self.prompts),), -torch.inf, dtype=torch.float64)
        self.gold = self.proxy.clone()
        self.bad_rounds = torch.zeros(len(self.prompts), dtype=torch.int64)

    def see(self, images: Tensor, rows: Tensor, proxy: Tensor) -> None:
        """Finished images [R, ...] of some rows, and their scores [R] by the proxy."""
        reward = RowReward(self.monitor.reward, self.prompts, self.columns)
        gold = scored(lambda: reward(images, rows), len(images), f"the monitor {reward.name}", finite=False)
        for row, by_proxy, by_gold in zip(rows.tolist(), proxy.tolist(), gold.tolist(), strict=True):
            if by_proxy > self.proxy[row]:
                better = not bool(self.gold[row].isfinite()) or by_gold > float(self.gold[row])
                self.bad_rounds[row] = 0 if better else self.bad_rounds[row] + 1
                self.proxy[row], self.gold[row] = by_proxy, by_gold
        columns = {"guide": self.proxy, "monitor": self.gold}
        self.history.append({n: [v if math.isfinite(v) else None for v in c.tolist()] for n, c in columns.items()})

    @property
    def stopped(self) -> bool:
        """Whether proxy and gold reward have parted for every prompt."""
        patience = self.monitor.patience
        return patience is not None and bool((self.bad_rounds >= patience).all())

"""Credit by comparing paths that share a past.

- Terminal (DDPO, Flow-GRPO): every stochastic step gets the reward of the path.  Unbiased; the noise of all other steps is in it.
- Branch group (TempFlow-GRPO, 2508.04324; RSM, 2604.17415): K children of one state, each completed by the ODE, so that a
  child's reward differs from its siblings' by one step alone.
- Tree (BranchGRPO, 2509.06040): a node is worth what its leaves are, by their mean or by a softmax over their log-densities;
  it is compared with the nodes of its depth.
- Immediate score (Step-GRPO, 2605.25661): K children of one state, scored at their own noise level by a diffusion reward model.
"""

import torch
from torch import Tensor


def terminal(rewards: Tensor, steps: int) -> Tensor:
    """The reward [R] of each path, for each of its steps: [R, S]."""
    return rewards[:, None].expand(-1, steps)


def node_values(leaves: Tensor, lineage: Tensor, log_weights: Tensor | None = None) -> Tensor:
    """Values [N] of the nodes of one depth from the rewards [R] of leaves, whose node of that depth is lineage [R].

    The mean over a node's leaves; with log_weights [R] their mean by softmax weights.  A node without leaves is NaN.
    """
    count = int(lineage.max()) + 1
    if log_weights is None:
        weights = torch.ones_like(leaves)
    else:
        top = torch.full((count,), -torch.inf, dtype=leaves.dtype).scatter_reduce(
            0, lineage, log_weights.to(leaves), "amax"
        )
        weights = (log_weights.to(leaves) - top[lineage]).exp()
    zero = torch.zeros(count, dtype=leaves.dtype)
    return zero.index_add(0, lineage, weights * leaves) / zero.index_add(0, lineage, weights)


def balance(counts: Tensor) -> Tensor:
    """Weights mean(k) / k_s [S] of the rows of each step, so that steps with more branches count no more (RSM's code).

    `counts` [S] are branches per step; the mean is over steps that have any, and the others get 0.
    """
    active = counts > 0
    mean = counts[active].double().mean()
    return torch.where(active, mean / counts.clamp(min=1).double(), 0.0)

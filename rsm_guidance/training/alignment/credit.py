"""From credits of steps to advantages, as a configuration asks: groups by prompt, seed, depth or step, and what is added to them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from rsm_guidance.training.alignment.advantages import Advantages, absolute, advantages, diversity, group_by
from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.estimators import value_ratio


def step_advantages(
    config: AlignConfig,
    credits: Tensor,
    prompts: Tensor,
    seeds: Tensor,
    depths: Tensor | None = None,
    steps: Tensor | None = None,
    distances: Tensor | None = None,
) -> Advantages:
    """Advantages [R * S] of credits, row after row.

    Args:
        config: its estimator, advantage and reward weights.
        credits: [R, S], or [R, S, M] for M rewards, of R trajectories, nodes or children and their S steps.
        prompts, seeds: whole numbers [R]; seeds name the initial noise, or the state that siblings share.
        depths: of nodes of a tree [R].
        steps: levels [R, S] at which the steps start; 0..S - 1 by default.
        distances: to the nearest sibling [R], for `advantage.diversity`.

    Raises:
        ValueError: where `depths` or `distances` are asked for and missing, and as `advantages` and `value_ratio` do.
    """
    a, table = config.advantage, credits.double().reshape(*credits.shape[:2], -1)
    rows, count, rewards = table.shape
    levels = torch.arange(count).expand(rows, count) if steps is None else steps
    keys = {"prompt": prompts, "seed": _joint(prompts, seeds), "depth": depths}
    groups = group_by(*[_needed(keys.get(k), k, count) if k != "step" else levels.reshape(-1) for k in a.by])
    anchor = None
    if a.absolute is not None:
        first = count if a.absolute_steps is None else a.absolute_steps
        combined = (table * torch.tensor(_weights(config, rewards), dtype=table.dtype)).sum(2)
        anchor = torch.where(levels < first, absolute(combined, a.absolute), 0.0).reshape(-1)
    found = advantages(
        table.reshape(rows * count, rewards),
        groups,
        deviation=a.deviation,
        weights=_weights(config, rewards),
        clip=a.clip,
        min_std=a.min_std,
        max_mean=a.max_mean,
        anchor=anchor,
    )
    values, kept = found.values, found.kept
    if config.estimator.ratio:
        values = values * value_ratio(table.mean(2)).reshape(-1)
    if a.diversity:
        values = diversity(values, _needed(distances, "distances", count), groups)
    if a.positive_only:
        kept = kept & (values > 0)
        values = torch.where(kept, values, 0.0)
    return Advantages(values, kept, found.groups, found.dropped)


def _joint(prompts: Tensor, seeds: Tensor) -> Tensor:
    return group_by(prompts, seeds)


def _weights(config: AlignConfig, rewards: int) -> Sequence[float]:
    return config.reward_weights or (1.0,) * rewards


def _needed(key: Tensor | None, name: str, count: int) -> Tensor:
    if key is None:
        raise ValueError(f"this configuration needs {name} of every row")
    return key[:, None].expand(-1, count).reshape(-1)

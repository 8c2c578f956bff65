"""Weighted particles: reweighting, resampling and the final draw, for the sequential Monte Carlo samplers.

Weights are float64 [B, K] in the log-domain.  They are carried from level to level and forgotten only by resampling, so that
products of increments telescope.
"""

from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from rsm_guidance.core.random import Purpose
from rsm_guidance.core.resampling import Scheme, resample
from rsm_guidance.core.transitions import Transition
from rsm_guidance.core.weights import choose, effective_sample_size, log_mean_exp, normalize
from rsm_guidance.samplers.kernel import (
    Particles,
    Result,
    State,
    candidates_of,
    grouped,
    pick,
    places,
    table,
    tilted_law,
)
from rsm_guidance.samplers.task import Task


def require_stochastic(transition: Transition, count: int) -> None:
    """Raise a ValueError if several particles could not part."""
    if not transition.stochastic and count > 1:
        raise ValueError(
            "particles need a stochastic transition (ddim, cps, flow_sde, glass): copies would stay copies"
        )


def target_of(transition: Transition, returned: Literal["best", "sample"]) -> str | None:
    """The law of what `concluded` returns, in the limit of many particles; None for the best."""
    return tilted_law(transition) if returned == "sample" else None


def particles(task: Task, x: Tensor, k: int, **carried: Tensor) -> State:
    """K equally weighted particles [B * K, ...] for each prompt."""
    zero = torch.zeros(task.count, k, dtype=torch.float64)
    return State(x, k, None, None, zero, zero[:, 0], dict(carried))


def reweighted(state: State, increment: Tensor) -> State:
    """Multiply the weights: log-increments [B, K]."""
    return replace(state, log_weights=state.log_weights + increment)


def resampled(task: Task, state: State, level: int, scheme: Scheme, threshold: float) -> tuple[State, dict[str, Any]]:
    """Resample the prompts whose effective sample size fell below `threshold` K; the others keep their weights.

    Returns the population, and for the trace its effective sample sizes [B] and the ancestors [B, K].
    """
    size = effective_sample_size(state.log_weights)
    due = size < threshold * state.k - 1e-9
    ancestors = torch.arange(state.k).expand(task.count, -1).clone()
    record = {"effective_sample_size": size, "ancestors": ancestors}
    if not bool(due.any()):
        return state, record
    for row in due.nonzero().flatten().tolist():
        uniform = task.streams.uniforms(row, state.k, Purpose.RESAMPLE, level)
        ancestors[row] = resample(state.log_weights[row][None], uniform[None], scheme)[0]
    moved = places(ancestors, state.k)
    total = state.log_normalizer + log_mean_exp(state.log_weights)
    return State(
        state.x[moved],
        state.k,
        None if state.x0 is None else state.x0[moved],
        None if state.prediction is None else state.prediction.pick(moved),
        torch.where(due[:, None], 0.0, state.log_weights),
        torch.where(due, total, state.log_normalizer),
        {name: values.gather(1, ancestors) for name, values in state.carried.items()},
    ), record


def heaviest(state: State) -> Tensor:
    """The estimate [B, ...] of the clean latents of each prompt's heaviest particle."""
    x0 = state.x if state.x0 is None else state.x0
    return x0 if state.k == 1 else pick(x0, state.log_weights.argmax(1), state.k)


def final_table(task: Task, state: State) -> Tensor | None:
    """Scores [B, K] of the finished particles, or None without anything that scores."""
    scores = task.final_scores(state.x, task.rows_of(state.k))
    return None if scores is None else table(scores, state.k)


def concluded(task: Task, state: State, rewards: Tensor, returned: Literal["best", "sample"]) -> Result:
    """One particle per prompt, when the last weights are in: by its reward [B, K], or drawn by its weight; and all of them.

    A draw by weight is a sample of the target, up to a bias of order 1 / K; it has no weight any more.  Where there was nothing to
    choose, now or at a resampling, it is particle 0, the unguided run.
    """
    weights = normalize(state.log_weights)
    if returned == "best":
        chosen = rewards.argmax(1)
    else:
        uniform = [task.streams.uniform(row, Purpose.DRAW) for row in range(task.count)]
        chosen = choose(weights, torch.tensor(uniform, dtype=torch.float64))
        alike = (weights == weights[:, :1]).all(1) & (state.log_normalizer == 0)
        chosen = torch.where(alike, 0, chosen)
    return Result(
        pick(state.x, chosen, state.k),
        rewards[task.rows, chosen],
        state.log_normalizer + log_mean_exp(state.log_weights),
        [Particles(*each) for each in zip(grouped(state.x, state.k), rewards, weights, strict=True)],
        {"candidates": candidates_of(rewards, chosen, weights)},
    )

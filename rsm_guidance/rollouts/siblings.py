"""Rollouts whose samples part at single steps: children of one state, which differ by the noise of one step alone.

`branches` are children of the states of ODE runs, each completed by the ODE (TempFlow-GRPO, 2508.04324; RSM, 2604.17415).
`candidates` are children at every step of a stochastic run, scored at their own level, one of which goes on (Step-GRPO,
2605.25661).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from rsm_guidance.core.contracts import Denoiser
from rsm_guidance.core.random import Purpose, RandomStreams
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.rollouts.collect import ODE_STEPS, initial_noise, interleave, take, walk
from rsm_guidance.rollouts.record import Label, Rollout, Step

Continues = Literal["random", "best", "first"]


@dataclass(frozen=True)
class Siblings:
    """K children each of R states of one level.

    Attributes:
        step: from the states to the children [R * K, ...], the children of a state side by side.
        children: K.
        finals: latents [R * K, ...] of their completions; None where they were not completed.
        scores: of the children at their own level [R * K]; None where they were not scored.
    """

    step: Step
    children: int
    finals: Tensor | None = None
    scores: Tensor | None = None


def completed(denoiser: Denoiser, streams: RandomStreams, x: Tensor, level: int, rows: Tensor) -> Tensor:
    """Clean latents [R, ...] of ODE runs from x [R, ...] at a level; x itself at the clean one."""
    jumps = [(at, at + 1) for at in range(level, denoiser.schedule.steps)]
    for step in walk(denoiser, streams, ODE_STEPS, x, rows, [(0,)] * len(x), jumps):
        x = step.next
    return x


def branches(
    denoiser: Denoiser,
    streams: RandomStreams,
    transition: Transition,
    group: int,
    children: Sequence[int],
    same_start: bool = False,
) -> tuple[Rollout, list[Siblings]]:
    """ODE runs of every prompt, and the completed children of their states.

    It costs N evaluations a run, and N - s - 1 a child of level s.

    Args:
        denoiser: the model, with B prompts.
        streams: where noise comes from.
        transition: how a child is drawn.
        group: runs per prompt.
        children: K of each level from the noisiest on, 0 for none.
        same_start: whether the runs of a prompt start from one noise; they then are equal.

    Returns:
        The runs [B * group, ...], prompt-major, and the children of each level that has some.
    """
    rows, labels, x = _starts(denoiser, streams, group, same_start)
    stem, found = Rollout(rows=rows, labels=labels), []
    for level, target in ODE_STEPS.jumps(denoiser.schedule):
        prediction = denoiser.predict(x, level, rows)
        count = children[level] if level < len(children) else 0
        if count:
            step = _children(denoiser, streams, transition, prediction, rows, labels, (level, target), count)
            finals = completed(denoiser, streams, step.next, target, step.rows)
            found.append(Siblings(step, count, finals))
        stem.steps.append(take(denoiser, streams, ODE_STEPS, prediction, rows, labels, (level, target)))
        x = stem.steps[-1].next
    stem.latents = x
    return stem, found


def candidates(
    denoiser: Denoiser,
    streams: RandomStreams,
    transition: Transition,
    group: int,
    children: Sequence[int],
    score: Callable[[Tensor, int, Tensor], Tensor],
    continues: Continues = "random",
    same_start: bool = False,
) -> tuple[Rollout, list[Siblings]]:
    """Runs of every prompt that draw K candidates at each step and go on from one of them.

    It costs one evaluation a run and step, and one score a candidate.

    Args:
        denoiser, streams, group, same_start: as in `branches`.
        transition: how candidates are drawn; levels without candidates step by the ODE.
        children: K of each level from the noisiest on, 0 or 1 for no candidates.
        score: scores [R] of latents x [R, ...] at a level for rows [R].
        continues: which of the candidates goes on; random ones are drawn by name.

    Returns:
        The runs that went on, and the candidates of each level that has some, with their scores.
    """
    rows, labels, x = _starts(denoiser, streams, group, same_start)
    run, found = Rollout(rows=rows, labels=labels), []
    for jump in ODE_STEPS.jumps(denoiser.schedule):
        prediction = denoiser.predict(x, jump[0], rows)
        count = children[jump[0]] if jump[0] < len(children) else 0
        if count < 2:
            run.steps.append(take(denoiser, streams, ODE_STEPS, prediction, rows, labels, jump))
            x = run.steps[-1].next
            continue
        step = _children(denoiser, streams, transition, prediction, rows, labels, jump, count)
        scores = score(step.next, jump[1], step.rows)
        found.append(Siblings(step, count, scores=scores))
        chosen = torch.arange(len(rows)) * count + _chosen(streams, scores, rows, labels, jump[0], count, continues)
        run.steps.append(_picked(step, chosen))
        x = run.steps[-1].next
    run.latents = x
    return run, found


def _starts(
    denoiser: Denoiser, streams: RandomStreams, group: int, same_start: bool
) -> tuple[Tensor, list[Label], Tensor]:
    count = len(denoiser.prompts)
    x = interleave([initial_noise(denoiser, streams, 0 if same_start else g) for g in range(group)])
    return torch.arange(count).repeat_interleave(group), [(g,) for _ in range(count) for g in range(group)], x


def _children(
    denoiser: Denoiser,
    streams: RandomStreams,
    transition: Transition,
    prediction: Prediction,
    rows: Tensor,
    labels: Sequence[Label],
    jump: tuple[int, int],
    count: int,
) -> Step:
    parents = torch.arange(len(rows)).repeat_interleave(count)
    named: list[Label] = [(*label, jump[0], j) for label in labels for j in range(count)]
    return take(denoiser, streams, transition, prediction.pick(parents), rows[parents], named, jump, parents)


def _chosen(
    streams: RandomStreams,
    scores: Tensor,
    rows: Tensor,
    labels: Sequence[Label],
    level: int,
    count: int,
    continues: Continues,
) -> Tensor:
    """Which of its candidates each run goes on with [R]."""
    if continues == "best":
        return scores.cpu().reshape(-1, count).argmax(1)
    if continues == "first":
        return torch.zeros(len(rows), dtype=torch.int64)
    drawn = [streams.uniform(r, Purpose.SELECT, *label, level) for r, label in zip(rows.tolist(), labels, strict=True)]
    return (torch.tensor(drawn, dtype=torch.float64) * count).long()


def _picked(step: Step, index: Tensor) -> Step:
    """The step of some of its rows."""
    prediction = None if step.prediction is None else step.prediction.pick(index)
    noise = None if step.noise is None else step.noise[index]
    return replace(
        step,
        x=step.x[index],
        prediction=prediction,
        noise=noise,
        next=step.next[index],
        rows=step.rows[index],
        parents=step.parents[index],
    )

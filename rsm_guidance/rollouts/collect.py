"""Runs a denoiser from noise to clean latents and records every step.

`walk` steps latents on by a transition; `follow` lets the pipeline's own solver run; `trajectories` chooses between them for
whole runs from named initial noises.  `collect` gives finished rollouts for training: ODE and SDE runs, SDE windows inside ODE
runs, and trees whose branches share their stem.

Noise is named by row, label, level and child (`core.random`), so that the first candidate's first child is always the
unguided run of the seed, whatever the batch.  Latents are prompt-major everywhere: all candidates of the first prompt, then
all of the second.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from rsm_guidance.core.contracts import Denoiser
from rsm_guidance.core.random import Purpose, RandomStreams
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import ODE, Transition
from rsm_guidance.rollouts.record import Label, Rollout, Step

ODE_STEPS = ODE()


def step_noise(
    streams: RandomStreams, rows: Tensor, labels: Sequence[Label], level: int, shape: Sequence[int], child: int = 0
) -> Tensor:
    """Standard normal noise [R, ...] of the steps that leave `level`, for latents of rows [R] with labels [R]."""
    return streams.normals(rows.tolist(), shape, [(Purpose.STEP, *label, level, child) for label in labels])


def initial_noise(denoiser: Denoiser, streams: RandomStreams, candidate: int) -> Tensor:
    """Initial latents [B, ...] of a candidate; those of candidate 0 are the stock pipeline's."""
    return denoiser.initial(initial_generators(streams, candidate) if candidate else None)


def initial_generators(streams: RandomStreams, candidate: int) -> list[torch.Generator]:
    """Generators [B] of a candidate's initial latents."""
    return [streams.generator(row, Purpose.INITIAL, candidate) for row in range(len(streams.names))]


def interleave(per_candidate: Sequence[Tensor]) -> Tensor:
    """Latents [B, ...] of each of K candidates, prompt-major: [B * K, ...].  Those of a single one are handed on as they are."""
    return per_candidate[0] if len(per_candidate) == 1 else torch.stack(tuple(per_candidate), 1).flatten(0, 1)


def walk(
    denoiser: Denoiser,
    streams: RandomStreams,
    transition: Transition,
    x: Tensor,
    rows: Tensor,
    labels: Sequence[Label],
    jumps: Sequence[tuple[int, int]],
    prediction: Prediction | None = None,
) -> Iterator[Step]:
    """Step latents x [R, ...] on over the levels (from, to) of `jumps`.

    Args:
        denoiser: the model.
        streams: where noise comes from.
        transition: how to step.
        x: latents at the first level.
        rows: prompt of each [R].
        labels: names of their noise [R].
        jumps: one step each.
        prediction: that of x, where it is known already.
    """
    parents = torch.arange(len(x))
    for level, target in jumps:
        known = prediction or denoiser.predict(x, level, rows)
        prediction = None
        step = take(denoiser, streams, transition, known, rows, labels, (level, target), parents)
        yield step
        x = step.next


def take(
    denoiser: Denoiser,
    streams: RandomStreams,
    transition: Transition,
    prediction: Prediction,
    rows: Tensor,
    labels: Sequence[Label],
    jump: tuple[int, int],
    parents: Tensor | None = None,
    child: int = 0,
) -> Step:
    """One step of latents whose prediction is known, over the levels `jump` = (from, to)."""
    level, target = jump
    x, noise = prediction.x, None
    if transition.stochastic:
        noise = step_noise(streams, rows, labels, level, x.shape[1:], child)
    used = torch.zeros(1) if noise is None else noise
    reached = transition.step(
        lambda y, at: denoiser.predict(y, at, rows), prediction, denoiser.schedule, level, target, used
    )
    origin = torch.arange(len(x)) if parents is None else parents
    return Step(level, target, x, prediction, noise, reached, rows, transition, origin)


def follow(
    denoiser: Denoiser,
    transition: Transition,
    rows: Tensor,
    generators: list[torch.Generator] | None = None,
    start: Tensor | None = None,
) -> Iterator[Step]:
    """Run the pipeline's own solver for rows [R], from its own start or from generators [R] or latents `start`."""
    x, parents = start, torch.arange(len(rows))
    for level, (prediction, reached) in enumerate(denoiser.follow(rows, generators, start)):
        seen = prediction.x if prediction is not None else x if x is not None else reached
        yield Step(level, level + 1, seen, prediction, None, reached, rows, transition, parents)
        x = reached


def trajectories(
    denoiser: Denoiser,
    streams: RandomStreams,
    transition: Transition,
    candidates: Sequence[int],
    rows: Tensor | None = None,
    start: Tensor | None = None,
) -> Iterator[Step]:
    """Whole unguided runs of some candidates of some rows.

    Args:
        denoiser: the model.
        streams: where noise comes from.
        transition: how to step; the pipeline's own solver serves, too.
        candidates: K numbers; candidate 0 is the unguided run.
        rows: prompts [P] to run, all B by default; latents are [P * K, ...], prompt-major.
        start: latents [P * K, ...] to start from, instead of the candidates' own; every run then draws what candidate 0
            draws on its way, so that the outcome depends on nothing else.
    """
    count, k = len(denoiser.prompts), len(candidates)
    prompts = torch.arange(count) if rows is None else rows
    each = prompts.repeat_interleave(k)
    if transition.whole_runs:
        yield from _own_solver(denoiser, streams, transition, candidates, prompts, start)
        return
    labels: list[Label] = [(c,) for _ in range(len(prompts)) for c in candidates]
    if start is None:
        noises = [initial_noise(denoiser, streams, c) for c in candidates]
        x = interleave([n if len(prompts) == count else n[prompts] for n in noises])
    else:
        x, labels = start, [(0,)] * len(each)
    yield from walk(denoiser, streams, transition, x, each, labels, transition.jumps(denoiser.schedule))


def _own_solver(
    denoiser: Denoiser,
    streams: RandomStreams,
    transition: Transition,
    candidates: Sequence[int],
    prompts: Tensor,
    start: Tensor | None,
) -> Iterator[Step]:
    each = prompts.repeat_interleave(len(candidates))
    if start is not None:
        return follow(denoiser, transition, each, start=start)
    if list(candidates) == [0] and len(prompts) == len(denoiser.prompts):
        return follow(denoiser, transition, each)
    per_candidate = [initial_generators(streams, c) for c in candidates]
    generators = [of[r] for r in prompts.tolist() for of in per_candidate]
    return follow(denoiser, transition, each, generators)


def collect(
    denoiser: Denoiser,
    streams: RandomStreams,
    transition: Transition,
    group: int = 1,
    splits: Mapping[int, int] | None = None,
    window: tuple[int, int] | None = None,
    outside: Transition = ODE_STEPS,
    same_start: bool = False,
) -> Rollout:
    """Finished trajectories of every prompt, with their steps.

    `ODE()` gives deterministic runs, a stochastic transition SDE runs.  With a `window` only its levels are stochastic.  With
    `splits` the trajectories are a tree: at each of these levels every trajectory goes on as so many children, which share
    the denoiser evaluation of their parent and draw noise of their own.  Its cost is one denoiser evaluation for each
    trajectory and level before the split.

    Args:
        denoiser: the model, with B prompts.
        streams: where noise comes from.
        transition: how to step.
        group: trajectories per prompt that start from noises of their own.
        splits: children by level.
        window: levels (first, last + 1) that step by `transition`; all by default.
        outside: how the other levels step.
        same_start: whether all trajectories of a prompt start from the noise of the first.

    Returns:
        Trajectories [B * group * children, ...], prompt-major.

    Raises:
        ValueError: for a group or a split below 1, or a split where the step draws no noise.
    """
    splits, schedule = dict(splits or {}), denoiser.schedule
    low, high = window or (0, schedule.steps)
    if group < 1 or min(splits.values(), default=1) < 1:
        raise ValueError(f"group and splits must be at least 1; got {group} and {splits}")
    jumps = transition.jumps(schedule)
    lost = [s for s in splits if s not in {level for level, _ in jumps if low <= level < high}]
    if lost or (splits and not transition.stochastic):
        raise ValueError(f"children can only part where a step draws noise; got splits {splits} with {transition}")
    rows = torch.arange(len(denoiser.prompts)).repeat_interleave(group)
    labels: list[Label] = [(g,) for _ in range(len(denoiser.prompts)) for g in range(group)]
    x = interleave([initial_noise(denoiser, streams, 0 if same_start else g) for g in range(group)])
    rollout = Rollout()
    for jump in jumps:
        level, children = jump[0], splits.get(jump[0], 1)
        prediction = denoiser.predict(x, level, rows)
        parents = torch.arange(len(x)).repeat_interleave(children)
        if children > 1:
            prediction, rows = prediction.pick(parents), rows[parents]
            labels = [label if j == 0 else (*label, level, j) for label in labels for j in range(children)]
        how = transition if low <= level < high else outside
        rollout.steps.append(take(denoiser, streams, how, prediction, rows, labels, jump, parents))
        x = rollout.steps[-1].next
    rollout.latents, rollout.rows, rollout.labels = x, rows, labels
    return rollout

"""From credits to the rows of updates: a sample's advantage or coefficient, and what is trained together.

Everything here looks at the whole epoch, of all processes, so that neither micro-batches nor their number change a number.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.random import RandomStreams, derive_seed, generator_of
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.training.alignment.advantages import group_by
from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.credit import step_advantages
from rsm_guidance.training.alignment.estimators import balance
from rsm_guidance.training.alignment.experience import Experience
from rsm_guidance.training.alignment.objective import coefficients
from rsm_guidance.training.alignment.trust_regions import uncertain

Rows = dict[str, Tensor]
Gather = Callable[[Any], list[Any]]
"""An object of every process, in their order."""


def alone(thing: Any) -> list[Any]:
    """`Gather` of a single process."""
    return [thing]


@dataclass(frozen=True)
class Lesson:
    """What an epoch teaches.

    Attributes:
        updates: rows [M, ...] of this process for each update, or [G, K, ...] where groups stay together; possibly none.
        log: figures of the epoch, over all processes.
        informative: whether any group of any process says anything.
    """

    updates: list[Rows]
    log: dict[str, float]
    informative: bool


@dataclass(frozen=True)
class _All:
    """The samples of all processes [R], and where those of this one are."""

    mine: slice
    credits: Tensor
    prompts: Tensor
    seeds: Tensor
    levels: Tensor
    rewards: Tensor
    gate: Tensor
    features: Tensor


def lesson(
    config: AlignConfig, own: Experience, schedule: NoiseSchedule, seed: int, gather: Gather = alone, process: int = 0
) -> Lesson:
    """The rows that an epoch's samples are trained on.

    Args:
        config: of the training.
        own: samples of this process.
        schedule: the levels.
        seed: of all draws, named by the epoch.
        gather: from all processes.
        process: number of this one.
    """
    everyone = gather(own.compared)
    start = sum(len(part[0]) for part in everyone[:process])
    columns: Any = [torch.cat(column) for column in zip(*everyone, strict=True)]
    found = _All(slice(start, start + len(own.credits)), *columns)
    near = _nearest(found.features, found.prompts) if found.features.shape[1] else None
    made = step_advantages(config, found.credits, found.prompts, found.seeds, found.levels[:, 0], found.levels, near)
    values, kept = (t.view(found.levels.shape) for t in (made.values, made.kept))
    log = {
        **{f"reward_{number}": float(mean) for number, mean in enumerate(found.rewards.mean(0))},
        "reward_std": float(_combined(config, found.rewards).std(correction=0)),
        "groups_dropped": made.dropped / max(made.groups, 1),
        "samples": float(len(found.rewards)),
    }
    if config.form.family == "reverse":
        rows, units = _steps(config, own, found, values, kept, schedule.steps, seed)
        count = len(found.credits)
    elif config.form.whole_groups:
        rows, units, count = _groups(config, own, found, values, kept)
    else:
        rows, units, count = *_samples(config, own, found, values, kept), len(found.credits)
    updates = _cut(rows, units, count, config.updates_per_epoch, seed)
    if config.form.family == "reverse" or config.form.name in ("prdp", "lpo"):
        return Lesson(updates, log, bool(kept.any()))
    noised = [_noised(config, part, schedule, derive_seed(seed, "noise", n)) for n, part in enumerate(updates)]
    return Lesson(noised, log, bool(kept.any()))


def _combined(config: AlignConfig, rewards: Tensor) -> Tensor:
    """The weighted sum [R] of rewards [R, M]."""
    weights = config.reward_weights or (1.0,) * rewards.shape[1]
    return rewards @ torch.tensor(weights, dtype=rewards.dtype)


def _nearest(features: Tensor, prompts: Tensor) -> Tensor:
    """1 - cosine [R] to the nearest other sample of the prompt."""
    found = torch.zeros(len(features), dtype=torch.float64)
    for prompt in prompts.unique():
        index = (prompts == prompt).nonzero().flatten()
        distance = 1 - features[index] @ features[index].T
        found[index] = distance.fill_diagonal_(torch.inf).min(1).values.double()
    return found


def _held(config: AlignConfig, found: _All) -> Tensor:
    """Which samples [R] are held to the reference, of all processes."""
    if config.trust.gate is None:
        return torch.ones(len(found.rewards), dtype=torch.bool)
    return uncertain(_combined(config, found.rewards), found.gate, config.trust.gate)


def _steps(
    config: AlignConfig, own: Experience, found: _All, advantage: Tensor, kept: Tensor, steps: int, seed: int
) -> tuple[Rows, Tensor]:
    """Rows of steps, with "advantage", "share" (of their loss) and "held" (to the reference), and their trajectories."""
    form, trust = config.form, config.trust
    low, high = (math.ceil(share * steps - 1e-9) for share in form.part)
    chosen = (found.levels >= low) & (found.levels < high)
    if form.share < 1:
        draw = torch.rand(chosen.shape, generator=generator_of(seed, "share"), dtype=torch.float64)
        order = torch.where(chosen, draw, 2.0).argsort(1).argsort(1)
        chosen &= order < (chosen.sum(1, keepdim=True) * form.share).round().clamp(min=1)
    if trust.reference == "none" and trust.proximal == "none" and not trust.norm_weight:
        chosen &= kept  # nothing is to be learnt from the others
    share = torch.ones(chosen.shape, dtype=torch.float64)
    if config.time.balanced:
        share = balance(torch.bincount(found.levels.flatten(), minlength=steps))[found.levels]
    extra = {"advantage": advantage, "share": share, "held": _held(config, found)[:, None].expand(chosen.shape)}
    mine = chosen[found.mine]
    rows = {name: t[mine] for name, t in (own.fields | {n: t[found.mine] for n, t in extra.items()}).items()}
    numbers = torch.arange(len(found.credits))[:, None].expand(chosen.shape)[found.mine][mine]
    if own.anchors:
        count = len(own.anchors["level"])
        free = {"advantage": torch.zeros(count).double(), "share": torch.ones(count).double()}
        anchors = own.anchors | free | {"held": torch.ones(count, dtype=torch.bool)}
        rows = {name: torch.cat([t, anchors[name]]) for name, t in rows.items()}
        numbers = torch.cat([numbers, found.mine.start + torch.arange(count) % max(len(own.credits), 1)])
    return rows, numbers


def _samples(config: AlignConfig, own: Experience, found: _All, advantage: Tensor, kept: Tensor) -> tuple[Rows, Tensor]:
    """Finished samples with their "coefficient", "reward", "held" and numbers ("sample")."""
    groups, combined = group_by(found.prompts), _combined(config, found.rewards)
    number = coefficients(config, combined, advantage[:, 0], groups)
    extra = {
        "coefficient": number, "reward": combined, "held": _held(config, found),
        "sample": torch.arange(len(combined)), "group": groups,
    }  # fmt: skip
    rows = own.fields | {name: t[found.mine] for name, t in extra.items()}
    relative = config.form.name in ("nft", "awm", "ram", "rvm", "dgpo", "crd")
    holds = config.trust.reference != "none" or config.trust.proximal != "none" or config.trust.norm_weight > 0
    says = kept[:, 0] if relative else number != 0
    chosen = (says | holds)[found.mine]
    return {name: t[chosen] for name, t in rows.items()}, rows["sample"][chosen]


def _groups(
    config: AlignConfig, own: Experience, found: _All, advantage: Tensor, kept: Tensor
) -> tuple[Rows, Tensor, int]:
    """Whole groups [G, K, ...] of samples, paths or children, with the numbers of the groups and how many there are."""
    keys = [found.prompts] if config.form.name != "lpo" else [found.prompts, found.seeds, found.levels[:, 0]]
    groups, combined = group_by(*keys), _combined(config, found.rewards)
    extra = {
        "coefficient": coefficients(config, combined, advantage[:, 0], groups), "reward": combined,
        "held": _held(config, found), "sample": torch.arange(len(combined)), "group": groups,
    }  # fmt: skip
    fields = {name: t[:, 0] if config.form.name == "lpo" else t for name, t in own.fields.items()}
    rows = fields | {name: t[found.mine] for name, t in extra.items()}
    order, sizes = rows["group"].argsort(stable=True), torch.bincount(rows["group"])
    kinds = sizes[sizes > 0].unique().tolist()
    if len(kinds) > 1:
        raise UsageError(
            f"the form {config.form.name!r} compares whole groups, which must be of one size; these have {kinds}: give every "
            "level the same number of rollout.children"
        )
    grouped = {name: t[order].unflatten(0, (-1, int(kinds[0]))) for name, t in rows.items()}
    holds = config.trust.reference != "none" or config.trust.norm_weight > 0
    alive = kept[found.mine].any(1)[order].unflatten(0, (-1, int(kinds[0]))).any(1) | holds
    rows = {name: t[alive] for name, t in grouped.items()}
    return rows, rows["group"][:, 0], int(groups.max()) + 1


def _cut(rows: Rows, units: Tensor, count: int, updates: int, seed: int) -> list[Rows]:
    """The rows of each update.  `units` [M] of all `count` are shared out; rows of one unit stay together."""
    place = torch.empty(count, dtype=torch.int64)
    place[torch.randperm(count, generator=generator_of(seed, "order"))] = torch.arange(count)
    update = place[units] * updates // count
    return [{name: t[update == number] for name, t in rows.items()} for number in range(updates)]


def noised(rows: Rows, levels: Tensor, schedule: NoiseSchedule, seed: int) -> Rows:
    """Clean samples "x0" [R, ...] at a level each, as "x", with "eps", "level", "alpha" and "sigma"; noise is named by "sample"."""
    streams, x0 = RandomStreams(seed, (("", 0),)), rows["x0"]
    names = [(n,) for n in rows["sample"].tolist()]
    return _at(rows, levels, streams.normals([0] * len(names), x0.shape[1:], names).to(x0), schedule)


def _noised(config: AlignConfig, rows: Rows, schedule: NoiseSchedule, seed: int) -> Rows:
    """Every sample at `form.levels` levels; groups share noise and level.

    The levels are those of the sampler within the trained part, each as often as any other; noise is named by sample or
    group, so that it does not depend on what else is in the batch.
    """
    low, high = (math.ceil(share * schedule.steps - 1e-9) for share in config.form.part)
    count, grouped = config.form.levels or high - low, config.form.whole_groups
    names = (rows["group"][:, 0] if grouped else rows["group" if config.form.shared_noise else "sample"]).tolist()
    shape = rows["x0"].shape[2:] if grouped else rows["x0"].shape[1:]
    streams = RandomStreams(seed, (("", 0),))
    levels = [_drawn_levels(streams, name, low, high, count) for name in names]
    level = torch.cat([torch.zeros(0, dtype=torch.int64), *levels])
    eps = streams.normals([0] * len(level), tuple(shape), [(name, n) for name in names for n in range(count)])
    found = {name: t.repeat_interleave(count, 0) for name, t in rows.items()}
    if grouped:
        size = rows["x0"].shape[1]
        eps, level = eps[:, None].expand(-1, size, *shape), level[:, None].expand(-1, size)
    return _at(found, level, eps.to(found["x0"]), schedule)


def _at(rows: Rows, level: Tensor, eps: Tensor, schedule: NoiseSchedule) -> Rows:
    x0 = rows["x0"]
    alpha, sigma = (table[level].to(x0.device, torch.float32) for table in (schedule.alpha, schedule.sigma))
    shape = (*level.shape, *[1] * (x0.ndim - level.ndim))
    x = alpha.view(shape) * x0.float() + sigma.view(shape) * eps.float()
    return rows | {"x": x.to(x0.dtype), "eps": eps, "level": level, "alpha": alpha, "sigma": sigma}


def _drawn_levels(streams: RandomStreams, name: int, low: int, high: int, count: int) -> Tensor:
    """`count` levels of low..high - 1, no level more than once oftener than another."""
    turns = range(math.ceil(count / (high - low)))
    return torch.cat([streams.uniforms(0, high - low, name, "levels", turn).argsort() + low for turn in turns])[:count]

"""The loss that a configuration describes, from the pieces: what a trainer calls.

An update has three stages.  Rewards become credits [R, S] (`estimators`) and advantages of whole groups (`advantages`).
`coefficients` turns them, over the whole epoch, into one number a sample, so that micro-batches cannot change it.  Then, for
rows of a micro-batch and under gradient, one of

- `reverse_loss`: rows are recorded steps, of one level,
- `forward_loss`: rows are samples noised again, at any levels,
- `implicit_loss`: groups of samples noised again with one noise and level,
- `path_loss`, `step_pair_loss`: log-ratios of whole paths (prdp), of children of one state (lpo).

A loss is one number a row (or group); the trainer divides their sum by the rows of the whole update, not of the micro-batch.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import Gaussian, GaussianTransition
from rsm_guidance.training.alignment import trust_regions as trust
from rsm_guidance.training.alignment.advantages import optimality
from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.forms import forward, implicit
from rsm_guidance.training.alignment.forms.reverse import step_log_ratio
from rsm_guidance.training.alignment.levels import StepGeometry, geometry
from rsm_guidance.training.alignment.time_weights import (
    cost_of,
    forward_cost,
    forward_strength,
    reverse_strength,
    step_scale,
)


@dataclass(frozen=True)
class Terms:
    """Loss of each row [R], and parts of it by name [R] for logging, without gradient."""

    loss: Tensor
    log: dict[str, Tensor] = field(default_factory=dict)


def coefficients(config: AlignConfig, rewards: Tensor, advantage: Tensor, groups: Tensor) -> Tensor:
    """One number [R] a sample, of all samples of an epoch: what its form makes of rewards [R] or advantages [R]."""
    form = config.form
    if form.name == "rwr":
        return forward.rwr(rewards, groups, form.temperature or 1.0).coefficient
    if form.name == "raft":
        return forward.raft(rewards, groups, form.keep or 1).coefficient
    if form.name == "orw":
        return forward.orw(rewards, form.reward_strength or 1.0, 0.0).coefficient
    if form.name == "ram":
        return forward.ram(rewards, groups, form.temperature or 1.0).coefficient
    if form.name in ("nft", "crd"):
        return optimality(advantage, config.advantage.clip or 1.0)
    return advantage


@dataclass(frozen=True)
class Holds:
    """Velocities [R, ...] that the policy's is held to, where the configuration asks for it.

    Attributes:
        reference: the base model's.
        proximal: those of what `trust.proximal` names.
        rows: which rows [R] are held to the reference; all by default (GARDO, `trust_regions.uncertain`).
    """

    reference: Tensor | None = None
    proximal: Tensor | None = None
    rows: Tensor | None = None


FREE = Holds()


def reverse_loss(
    config: AlignConfig,
    step: StepGeometry,
    new: Gaussian,
    old: Gaussian,
    reached: Tensor,
    advantage: Tensor,
    reference: Gaussian | None = None,
    velocity: Tensor | None = None,
    holds: Holds = FREE,
) -> Terms:
    """Loss of recorded steps of one level.

    Args:
        config: with the form "reverse".
        step: the level's geometry.
        new, old, reference: laws of the next latents under the policy, the one that sampled, and the base model.
        reached: next latents [R, ...] as they were stored.
        advantage: [R].
        velocity: the policy's [R, ...], with gradient; needed where velocities are held.
        holds: to what.
    """
    t, scale = config.trust, step_scale(config.weight, step, config.trust.region)  # type: ignore[arg-type]
    change = step_log_ratio(new, old, reached, scale)
    a = advantage.to(change)
    divergence = ((new.mean - old.mean) / old.std).detach().square().flatten(1).mean(1) / 2
    if t.region == "hinge":
        loss = trust.hinge(change, a, t.clip or 0.0)
    elif t.region == "kl-mask":
        loss = trust.kl_mask(change, a, divergence, t.clip or 0.0)
    elif t.region == "ratio":
        loss = trust.ratio_clip(change, a, t.clip or 0.0)
    else:
        loss = -a * change.exp()
    log = {"log_ratio": change.detach(), "divergence": divergence}
    if t.region in ("ratio", "hinge"):
        log["clipped"] = trust.clipped(change.detach(), a, t.clip or 0.0).to(change)
    loss = scale.outer * loss
    if t.reference == "mean" and t.denominator is not None:
        if reference is None:
            raise ValueError("this configuration holds means to those of the base model: give its law as `reference`")
        hold = trust.mean_penalty(new.mean, reference.mean, step, t.denominator)
        loss, log["reference"] = _held(loss, hold, t.reference_weight, holds.rows)
    return Terms(_velocities_held(config, loss, velocity, holds, log), log)


@dataclass(frozen=True)
class Matched:
    """Samples noised again, and what models say there; all velocities [R, ...].

    Attributes:
        velocity: the policy's, with gradient.
        target: u = eps - x0.
        alpha, sigma: of each row's level [R].
        coefficient: of each row's sample [R]; see `coefficients`.
        groups: dense group numbers [R].
        old: the velocity of the policy that sampled; needed by awm, nft and crd, where the policy has moved.
        holds: what else it is held to; dgpo reads the reference, too.
    """

    velocity: Tensor
    target: Tensor
    alpha: Tensor
    sigma: Tensor
    coefficient: Tensor
    groups: Tensor
    old: Tensor | None = None
    holds: Holds = FREE


def forward_loss(config: AlignConfig, rows: Matched) -> Terms:
    """Loss of samples noised again.  Without `old` the policy is taken to be the one that sampled."""
    v = rows.velocity
    old = v.detach() if rows.old is None else rows.old
    loss, cost = _matched(config, rows, old)
    log = {"cost": cost.detach(), "distance": forward.squared_distance(v.detach(), old)}
    good = rows.coefficient if config.form.name in ("nft", "crd") else optimality(rows.coefficient)
    return Terms(_velocities_held(config, loss, v, rows.holds, log, good), log)


def _velocities_held(
    config: AlignConfig,
    loss: Tensor,
    velocity: Tensor | None,
    holds: Holds,
    log: dict[str, Tensor],
    good: Tensor | None = None,
) -> Tensor:
    """The loss with all holds of velocities that the configuration names, which are logged."""
    t = config.trust
    if t.proximal != "none":
        v, to = _needed(velocity, "policy's"), _needed(holds.proximal, "proximal")
        loss, log["proximal"] = _held(loss, trust.velocity_penalty(v, to), t.proximal_weight)
    if t.reference == "velocity":
        v, to = _needed(velocity, "policy's"), _needed(holds.reference, "reference")
        hold = trust.velocity_penalty(v, to)
        if t.reference_least < 1 and good is not None:
            hold = trust.adaptive_reference(hold, good, t.reference_least)
        loss, log["reference"] = _held(loss, hold, t.reference_weight, holds.rows)
    if t.norm_weight:
        v, to = _needed(velocity, "policy's"), _needed(holds.reference, "reference")
        loss, log["norm"] = _held(loss, trust.norm_hinge(v, to, t.norm_margin), t.norm_weight)
    return loss


def _matched(config: AlignConfig, rows: Matched, old: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and cost [R] of the form alone."""
    form, v, c = config.form, rows.velocity, rows.coefficient

    def cost_at(velocity: Tensor, weight: str = config.weight) -> Tensor:
        p, cap = config.time.p or 0.25, config.time.cap or 5.0
        return forward_cost(weight, velocity, rows.target, rows.alpha, rows.sigma, p, cap)  # type: ignore[arg-type]

    if form.name == "nft":
        own, b, largest = config.weight == "adaptive", form.nft_strength or 1.0, config.advantage.clip or 1.0
        cost, before = (cost_at(x, "t2" if own else config.weight) for x in (v, old))
        weights = forward.nft_weights(v, old, rows.target, rows.sigma, b) if own else None
        distance = forward.squared_distance(v, old) * (rows.sigma.to(cost).square() if own else 1.0)
        return forward.forward_match(cost, before, forward.nft(c.to(cost), b, largest, weights), distance), cost
    cost, before = cost_at(v), cost_at(old).detach()
    strength = form.implicit_strength or 1.0
    if form.name == "awm":
        pull = forward.awm(c.to(cost), cost, before, config.trust.clip)
    elif form.name == "crd":
        pull = forward.crd(c, cost, before, rows.groups, strength, config.advantage.clip or 1.0)
    elif form.name == "dgpo":
        pull = forward.dgpo(c, cost, cost_at(_needed(rows.holds.reference, "reference")), rows.groups, strength)
    else:
        pull = forward.plain(c)
    return forward.forward_match(cost, before, pull), cost


def implicit_loss(config: AlignConfig, errors: Tensor, reference: Tensor, rewards: Tensor) -> Terms:
    """Loss [G] of dpo and gdro, from costs [G, k] of the policy and of the base model and rewards [G, k].

    Pairs are the best and the worst of a group; `margin` is their difference of implicit rewards.
    """
    form = config.form
    implied = implicit.implicit_reward(errors, reference, form.implicit_strength or 1.0)
    best, worst = rewards.argmax(1, keepdim=True), rewards.argmin(1, keepdim=True)
    winner, loser = implied.gather(1, best)[:, 0], implied.gather(1, worst)[:, 0]
    log = {"margin": (winner - loser).detach(), "accuracy": (winner > loser).to(errors).detach()}
    if form.name == "dpo":
        return Terms(implicit.dpo(winner, loser), log)
    loss = implicit.gdro(implied, rewards, form.temperature or 1.0)
    return Terms(loss + (form.top_weight or 0.0) * errors.gather(1, best)[:, 0], log)


def path_loss(config: AlignConfig, steps: Tensor, old: Tensor, rewards: Tensor) -> Terms:
    """Loss [G] of prdp, from log-ratios to the base model [G, k, S] of every step of k paths, under the policy and the one
    that sampled, and rewards [G, k].  Log-ratios are means over dimensions, as everywhere here.
    """
    kept = implicit.clip_path(steps, old.detach(), config.trust.clip or 0.0)
    loss = implicit.prdp(steps.sum(2), rewards, config.form.implicit_strength or 1.0, kept)
    return Terms(loss, {"implied": steps.detach().sum(2).mean(1)})


def step_pair_loss(config: AlignConfig, log_ratios: Tensor, scores: Tensor, sigma: float) -> Terms:
    """Loss [G] of lpo, from log-ratios to the base model and scores [G, K] of the children of G states at one level; 0 where
    their scores differ too little.
    """
    form = config.form
    best, worst = scores.argmax(1, keepdim=True), scores.argmin(1, keepdim=True)
    winner, loser = log_ratios.gather(1, best)[:, 0], log_ratios.gather(1, worst)[:, 0]
    loss = implicit.lpo(winner, loser, form.implicit_strength or 1.0, config.trust.clip or 0.0)
    kept = torch.ones_like(loss, dtype=torch.bool)
    if form.gate is not None:
        kept = implicit.lpo_gate(scores, sigma, *form.gate)
    return Terms(torch.where(kept, loss, 0.0), {"kept": kept.to(loss), "margin": (winner - loser).detach()})


def strengths(
    config: AlignConfig, schedule: NoiseSchedule, transition: GaussianTransition, errors: Tensor | None = None
) -> list[float]:
    """The realised strength h of every level [N]: RSM's diagnostic of a time weight.  0 where nothing is trained.

    `errors` [N] are mean squared errors of the model by level, for costs that are not linear in them; 1 by default.
    """
    found = []
    for level in range(schedule.steps):
        alpha, sigma = schedule.coefficients(level)
        if config.form.family != "reverse":
            error = torch.tensor([1.0 if errors is None else float(errors[level])], requires_grad=True)
            found.append(forward_strength(_slope(config, error, alpha, sigma), alpha, sigma))
            continue
        try:
            step = geometry(transition, schedule, level, level + 1)
        except ValueError:
            found.append(0.0)
            continue
        found.append(reverse_strength(step, step_scale(config.weight, step, config.trust.region)))  # type: ignore[arg-type]
    return found


def _slope(config: AlignConfig, error: Tensor, alpha: float, sigma: float) -> float:
    """d cost / d error of a level; of "adaptive", a mean absolute error is taken to be the root of the mean square."""
    if config.weight == "adaptive":
        weight = 1 / float(error.detach()) ** 0.5
        return sigma * weight if config.form.name == "nft" else weight
    numbers = torch.tensor([alpha]), torch.tensor([sigma])
    cost = cost_of(config.weight, error, *numbers, config.time.p or 0.25, config.time.cap or 5.0)  # type: ignore[arg-type]
    return float(torch.autograd.grad(cost.sum(), error)[0])


def _held(loss: Tensor, penalty: Tensor, weight: float | None, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The loss with a weighted penalty of some rows, and the penalty itself for the log."""
    kept = penalty if rows is None else torch.where(rows, penalty, 0.0)
    return loss + (weight or 0.0) * kept, penalty.detach()


def _needed(velocity: Tensor | None, name: str) -> Tensor:
    if velocity is None:
        raise ValueError(f"this configuration needs the {name} velocity of every row")
    return velocity

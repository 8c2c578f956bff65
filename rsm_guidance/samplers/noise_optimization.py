"""Gradient ascent on the noises a sample grows from: ReNO (arXiv 2406.04312) and DNO (arXiv 2405.18881).

The reward of the finished image is a function of the start x_T and of the noises z_t of its steps.  Its gradient goes back
through the whole run, and the noises climb it by SGD with Nesterov momentum; the best image met on the way is returned.

- `what="initial"` (ReNO): x_T alone, held to the lengths that noise has by the chi prior.
- `what="all"` (DNO): x_T and every z_t, held to being noise by DNO's concentration tests, averaged over permutations (their
  number is ours).  `core/noise_prior.py` has both priors, which are subtracted from the reward.

`gradient="zeroth-order"` serves rewards without one: dr/dx0 is estimated from pairs of perturbed clean latents,
(r(x0 + h u) - r(x0 - h u)) / 2h u, and goes back through the denoiser's exact Jacobian (DNO's hybrid gradient; pairs are ours).

Memory is that of one denoiser call with `checkpoint`: the run keeps the latents of each level, and the way back repeats
one level after the other.  It needs no hooks in autograd, whose threads could not resume a paused pipeline.

Units are ours, so that no number depends on the reward's scale: the reward's gradient counts in units of the largest one
that the row has met, the prior's in units of sqrt(d), the sum is clipped to length 1, and a step moves the noise by
`learning_rate` times sqrt(d), that is by that share of its own length.  (ReNO clips at 0.1 with a rate of 5: 0.4% at d = 2^14.)
"""

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.ledger import BACKWARD
from rsm_guidance.core.noise_prior import chi_gradient, improbability_gradient
from rsm_guidance.core.rows import rows_where, scaled
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.rewards import judged, name_of
from rsm_guidance.samplers.base import (
    Interrupted,
    Problem,
    SamplerOutput,
    check_deadline,
    finished,
    interruptible,
    new_trace,
)

_PERMUTATIONS = 8


@dataclass(frozen=True)
class NoiseOptimization:
    """Climb the reward's gradient in the space of noises.

    Attributes:
        iterations: gradient steps, >= 0; 0 is the unguided run.
        learning_rate: share of its length by which one full step moves the noise, > 0; momentum adds up to ten times that.
        what: "initial" optimises the start, "all" the noises of the steps, too.
        prior: weight of the prior on the noises, >= 0.
        momentum: in [0, 1).
        gradient: "exact" for differentiable rewards, "zeroth-order" for any.
        perturbations: pairs of perturbed latents of a zeroth-order gradient, >= 1.
        smoothing: size of these perturbations, as a share of the latents' root mean square, > 0.
        transition: how to step.
        checkpoint: repeat each level on the way back instead of keeping all of them in memory.
    """

    name: ClassVar[str] = "noise-optimization"
    scales: ClassVar[str | None] = "iterations"
    iterations: int = 4
    learning_rate: float = 0.1
    what: Literal["initial", "all"] = "initial"
    prior: float = 1.0
    momentum: float = 0.9
    gradient: Literal["exact", "zeroth-order"] = "exact"
    perturbations: int = 16
    smoothing: float = 0.1
    transition: Transition = Transition("ode")
    checkpoint: bool = True

    def __post_init__(self) -> None:
        if self.iterations < 0 or self.perturbations < 1:
            raise ValueError(
                f"iterations must be at least 0 and perturbations at least 1; got {self.iterations}, {self.perturbations}"
            )
        for name in ("learning_rate", "smoothing"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be positive and finite; got {getattr(self, name)}")
        if not 0 <= self.prior < math.inf or not 0 <= self.momentum < 1:
            raise ValueError(f"prior must be at least 0 and momentum in [0, 1); got {self.prior}, {self.momentum}")
        for name, known in (("what", ("initial", "all")), ("gradient", ("exact", "zeroth-order"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; got {getattr(self, name)!r}")
        if self.transition.kind in ("scheduler", "glass"):
            raise ValueError(
                f"no gradient goes back through the transition {self.transition.kind!r}; choose ode, ddim, cps or flow_sde"
            )

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image: an unguided sample and its score, and as much again for every iteration, plus the way back: twice
        the run and the score, and with `checkpoint` all levels but the last once more.  A zeroth-order gradient takes
        2 `perturbations` rewards instead of the way back through the reward.

        The budget, the deadline and Ctrl-C end the climb; the best image so far is returned.
        """
        if self.iterations:
            problem.require_judge(self.name)
        problem.require_budget()
        trace = new_trace(self, problem) | {"iterations": []}
        climb = _Climb(self, problem)
        try:
            with interruptible(problem):
                for iteration in range(self.iterations + 1):
                    further = iteration < self.iterations and climb.affordable()
                    climb.evaluate(further)
                    if not further:
                        break
                    trace["iterations"].append(climb.ascend(iteration))
        except Interrupted:
            if climb.best is None:
                if climb.estimate is None:
                    raise
                return finished(problem, climb.estimate, trace)
        assert climb.best is not None
        if climb.history:
            table = torch.stack(climb.history, 1)
            trace["candidates"] = {"rewards": table.tolist(), "chosen": climb.chosen.tolist()}
        return finished(problem, climb.best, trace, climb.rewards)


class _Climb:
    """The noises of all rows, the run they lead to, and the best image so far."""

    def __init__(self, config: NoiseOptimization, problem: Problem) -> None:
        self.config, self.problem = config, problem
        schedule = problem.denoiser.schedule
        self.schedule, self.last = schedule, schedule.steps - 1
        start = problem.initial(0).detach()
        names = [("step", 0, level, 0) for level in range(self.last if config.transition.stochastic else 0)]
        drawn = [[problem.streams.normal(r, start.shape[1:], *name) for r in range(problem.count)] for name in names]
        self.noises = [start, *(torch.stack(rows).to(start) for rows in drawn)]
        self.free = len(self.noises) if config.what == "all" else 1
        # A start is noise of this size, with what little of an image it may hold.
        self.scales = [math.hypot(*schedule.coefficients(0))] + [1.0] * (self.free - 1)
        self.velocity = [torch.zeros_like(z) for z in self.noises[: self.free]]
        self.dimension = sum(z[0].numel() for z in self.velocity)
        self.rate = torch.full((problem.count,), config.learning_rate, dtype=torch.float64)
        self.largest = torch.zeros(problem.count, dtype=torch.float64)
        self.estimate: Tensor | None = None
        self.best: Tensor | None = None
        self.rewards: Tensor | None = None
        self.chosen = torch.zeros(problem.count, dtype=torch.int64)
        self.history: list[Tensor] = []
        self.settled = [z.clone() for z in self.noises[: self.free]]  # where the last finite gradient was taken

    def affordable(self) -> bool:
        """Whether the budget reaches for the pending run, the way back and another run."""
        problem, config = self.problem, self.config
        run = problem.denoiser.steps * problem.denoiser.evaluations_per_row
        again = run - problem.denoiser.evaluations_per_row if config.checkpoint else 0.0
        cost, calls = 2 * (run + problem.final_cost) + again + BACKWARD * run, 2 * problem.final_calls
        if config.gradient == "exact":
            cost += BACKWARD * problem.final_cost
        else:
            cost += 2 * config.perturbations * problem.final_cost
            calls += 2 * config.perturbations * problem.final_calls
        return problem.affords(cost * problem.count, calls * problem.count)

    # --- the run and its reward ---

    def evaluate(self, further: bool) -> None:
        """Run from the noises and judge the result; `further` prepares the way back."""
        self.tape: list[tuple[list[Tensor], Tensor | None]] = []
        x = self.noises[0]
        for level in range(self.last + 1):
            check_deadline(self.problem)
            kept = further and (level == self.last or not self.config.checkpoint)
            with torch.set_grad_enabled(kept):
                leaves = self._leaves(x, level, kept)
                prediction, out = self._step(leaves, level)
            self.estimate = prediction.x0.detach()
            self.problem.report(level, self.estimate)
            self.tape.append((leaves, out if kept else None))
            x = out.detach()
        finite = x.flatten(1).isfinite().all(1)
        self.broken = ~finite
        if self.best is not None:
            x = rows_where(finite, x, self.best)
        exact = further and self.config.gradient == "exact"
        with torch.set_grad_enabled(exact):
            self.x0 = x.requires_grad_(exact)
            rewards = self._judge(self.x0, exact)
        x = x.detach()
        self._keep_best(x, rewards)

    def _leaves(self, x: Tensor, level: int, kept: bool) -> list[Tensor]:
        """What a step depends on: its latents and, where it draws one, its noise."""
        leaves = [x.detach(), *self.noises[level + 1 : level + 2]]
        free = [True, level + 1 < self.free]
        return [leaf.detach().requires_grad_() if kept and f else leaf for leaf, f in zip(leaves, free, strict=False)]

    def _step(self, leaves: list[Tensor], level: int) -> tuple[Prediction, Tensor]:
        prediction = self.problem.denoiser.predict(leaves[0], level, self.problem.rows)
        gaussian = self.config.transition(prediction, self.schedule, level, level + 1)
        return prediction, gaussian.mean if gaussian.std == 0 else gaussian.sample(leaves[1])

    def _judge(self, x0: Tensor, exact: bool) -> Tensor | None:
        """Rewards [B] of clean latents; with `exact` their graph is kept in `total`."""
        problem = self.problem
        if not exact:
            return problem.final_rewards(x0, problem.rows)
        graph: list[Tensor] = []
        images: Tensor | None = None

        def judge() -> Tensor:
            nonlocal images
            if problem.reward is not None:
                problem.ledger.reward_calls += len(x0)
                images = problem.denoiser.decode(x0, problem.rows)
                graph.append(problem.reward(images, problem.denoiser.prompts))
            else:
                assert problem.value is not None
                graph.append(problem.value(x0, problem.denoiser.steps, problem.rows))
            return graph[0]

        name = name_of(problem.reward or problem.value)
        checked = judged(judge, len(x0), name)
        self.total = torch.as_tensor(graph[0]).sum()
        if not self.total.requires_grad:
            raise ValueError(
                f"{name} is not differentiable: its scores carry no gradient; use gradient='zeroth-order', or a sampler "
                "without gradients (noise-search, best-of-n)"
            )
        problem.show(x0.detach(), problem.rows, checked.detach(), images)
        return checked

    def _keep_best(self, x: Tensor, rewards: Tensor | None) -> None:
        if rewards is None or self.best is None or self.rewards is None:
            self.best, self.rewards = x, rewards
        else:
            better = (rewards > self.rewards) & ~self.broken.cpu()
            self.best = rows_where(better, x, self.best)
            self.rewards = torch.where(better, rewards, self.rewards)
            self.chosen = torch.where(better, len(self.history), self.chosen)
        if rewards is not None:
            self.history.append(rewards)

    # --- the way back ---

    def ascend(self, iteration: int) -> dict[str, Any]:
        """Move the noises up the gradient; returns what the trace says of it."""
        gradients = self._gradients(iteration)
        norms = _norm(gradients)
        good = norms.isfinite() & ~self.broken.cpu()
        self.largest = torch.maximum(self.largest, torch.where(good, norms, 0.0))
        unit = 1 / self.largest.clamp(min=1e-300)
        priors = self._prior_gradients(iteration) if self.config.prior else [torch.zeros_like(z) for z in self.velocity]
        weight = self.config.prior / math.sqrt(self.dimension)
        total = [scaled(g.double(), unit) - weight * p for g, p in zip(gradients, priors, strict=True)]
        factor = 1 / _norm(total).clamp(min=1.0)
        good &= factor.isfinite()
        # A row whose gradient is not finite goes back to where the last one was, and on in smaller steps.
        self.rate = torch.where(good, self.rate, self.rate / 2)
        for i, t in enumerate(total):
            momentum = self.config.momentum * self.velocity[i].double() + scaled(t, factor)
            step = self.config.momentum * momentum + scaled(t, factor)
            moved = self.noises[i] + self.scales[i] * math.sqrt(self.dimension) * scaled(step, self.rate)
            noise = self.noises[i]
            self.noises[i] = rows_where(good, moved.to(noise), self.settled[i])
            self.settled[i] = rows_where(good, noise, self.settled[i])
            self.velocity[i] = rows_where(good, momentum.to(noise), torch.zeros_like(noise))
        return {"gradient_norm": [n if math.isfinite(n) else None for n in norms.tolist()], "rate": self.rate.tolist()}

    def _gradients(self, iteration: int) -> list[Tensor]:
        """Gradients of the reward with respect to the noises, per unit of noise."""
        if self.config.gradient == "exact":
            (upper,) = torch.autograd.grad(self.total, self.x0)
            self.problem.ledger.charge_backward(len(self.x0), self.problem.final_cost)
        else:
            upper = self._estimated(iteration)
        cost = self.problem.denoiser.evaluations_per_row
        gradients = [torch.zeros_like(z) for z in self.velocity]
        for level in range(self.last, -1, -1):
            check_deadline(self.problem)
            leaves, out = self.tape.pop()
            if out is None:
                with torch.enable_grad():
                    leaves = self._leaves(leaves[0], level, True)
                    out = self._step(leaves, level)[1]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            below = torch.autograd.grad(out, wanted, upper.to(out), allow_unused=True)
            self.problem.ledger.charge_backward(len(upper), cost)
            if len(wanted) > 1 and below[1] is not None:
                gradients[level + 1] = below[1]
            upper = below[0]
        gradients[0] = self.scales[0] * upper
        return gradients

    def _estimated(self, iteration: int) -> Tensor:
        """The gradient at the clean latents [B, ...] from pairs of rewards around them."""
        problem, x0 = self.problem, self.x0
        pairs = range(self.config.perturbations)
        names = [("perturb", iteration, j) for j in pairs]
        drawn = [problem.streams.normal(r, x0.shape[1:], *name) for name in names for r in range(problem.count)]
        u = torch.stack(drawn).to(x0).view(len(pairs), *x0.shape)
        size = self.config.smoothing * x0.flatten(1).double().square().mean(1).sqrt().clamp(min=1e-6)
        shift = scaled(u.transpose(0, 1), size).transpose(0, 1).to(x0)
        points = torch.cat([(x0 + shift).flatten(0, 1), (x0 - shift).flatten(0, 1)])
        unwatched = replace(problem, watch=None)  # these points are no results
        rewards = unwatched.final_rewards(points, problem.rows.repeat(2 * len(pairs)))
        assert rewards is not None
        up, down = rewards.view(2, len(pairs), len(x0))
        slope = ((up - down).to(size) / (2 * size)).to(x0)
        return scaled(u.flatten(0, 1), slope.flatten()).view_as(u).mean(0)

    def _prior_gradients(self, iteration: int) -> list[Tensor]:
        """Gradients of K with respect to the noises, float64."""
        units = [z.double() / s for z, s in zip(self.noises[: self.free], self.scales, strict=True)]
        flat = torch.cat([z.flatten(1) for z in units], 1)
        if self.config.what == "initial":
            return [chi_gradient(flat).view_as(units[0])]
        streams = [self.problem.streams.generator(r, "permute", iteration) for r in range(self.problem.count)]
        orders = [[torch.randperm(self.dimension, generator=g) for g in streams] for _ in range(_PERMUTATIONS)]
        gradient = improbability_gradient(flat, torch.stack([torch.stack(o) for o in orders]).to(flat.device))
        sizes = [z[0].numel() for z in units]
        return [g.view_as(z) for g, z in zip(torch.split(gradient, sizes, 1), units, strict=True)]


def _norm(parts: list[Tensor]) -> Tensor:
    """Euclidean length [B] of rows over all parts [B, ...], float64 on the CPU."""
    return torch.stack([p.double().flatten(1).square().sum(1).cpu() for p in parts]).sum(0).sqrt()

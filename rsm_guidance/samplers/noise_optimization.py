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
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.noise_prior import chi_gradient, improbability_gradient
from rsm_guidance.core.random import Purpose
from rsm_guidance.core.rows import rows_where, scaled
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import ODE, GaussianTransition, require_gaussian
from rsm_guidance.samplers import kernel
from rsm_guidance.samplers.kernel import Info, Result, Sampler, Solution
from rsm_guidance.samplers.task import Task

_PERMUTATIONS = 8


@dataclass(frozen=True)
class NoiseOptimization(Sampler):
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
    budget_field: ClassVar[str | None] = "iterations"
    least: ClassVar[int] = 0
    iterations: int = 4
    learning_rate: float = 0.1
    what: Literal["initial", "all"] = "initial"
    prior: float = 1.0
    momentum: float = 0.9
    gradient: Literal["exact", "zeroth-order"] = "exact"
    perturbations: int = 16
    smoothing: float = 0.1
    transition: GaussianTransition = ODE()
    checkpoint: bool = True

    def __post_init__(self) -> None:
        kernel.at_least(self, 0, "iterations")
        kernel.at_least(self, 1, "perturbations")
        kernel.finite(self, "learning_rate", "smoothing", positive=True)
        kernel.finite(self, "prior")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1); got {self.momentum}")
        kernel.one_of(self, what=("initial", "all"), gradient=("exact", "zeroth-order"))
        require_gaussian(self.transition, "the gradient goes back through single steps")

    def check(self, task: Task) -> None:
        if self.iterations:
            kernel.require(self, task)

    def solve(self, task: Task) -> Solution:
        """Cost per image: an unguided sample and its score, and as much again for every iteration, plus the way back: twice
        the run and the score, and with `checkpoint` all levels but the last once more.  A zeroth-order gradient takes
        2 `perturbations` rewards instead of the way back through the reward.
        """
        climb = Climb(self, task)
        for iteration in range(self.iterations + 1):
            further = iteration < self.iterations
            yield from climb.evaluate(further)
            if further:
                record = yield from climb.ascend(iteration)
                assert climb.best is not None
                yield Info(
                    task.steps, climb.best, record=record, section="iterations", so_far=climb.result, silent=True
                )
        return climb.result()


class Climb:
    """The noises of all rows, the run they lead to, and the best image so far."""

    def __init__(self, config: NoiseOptimization, task: Task) -> None:
        self.config, self.task = config, task
        schedule = task.schedule
        self.schedule, self.last = schedule, schedule.steps - 1
        start = task.initial(0).detach()
        levels = range(self.last if config.transition.stochastic else 0)
        drawn = [task.noise(task.rows, start.shape[1:], level, [0] * task.count) for level in levels]
        self.noises = [start, *(noise.to(start) for noise in drawn)]
        self.free = len(self.noises) if config.what == "all" else 1
        # A start is noise of this size, with what little of an image it may hold.
        self.scales = [math.hypot(*schedule.coefficients(0))] + [1.0] * (self.free - 1)
        self.velocity = [torch.zeros_like(z) for z in self.noises[: self.free]]
        self.dimension = sum(z[0].numel() for z in self.velocity)
        self.rate = torch.full((task.count,), config.learning_rate, dtype=torch.float64)
        self.largest = torch.zeros(task.count, dtype=torch.float64)
        self.best: Tensor | None = None
        self.rewards: Tensor | None = None
        self.chosen = torch.zeros(task.count, dtype=torch.int64)
        self.history: list[Tensor] = []
        self.settled = [z.clone() for z in self.noises[: self.free]]  # where the last finite gradient was taken

    def result(self) -> Result:
        """The best so far."""
        assert self.best is not None
        if not self.history:
            return Result(self.best, self.rewards)
        candidates = {"rewards": torch.stack(self.history, 1).tolist(), "chosen": self.chosen.tolist()}
        return Result(self.best, self.rewards, sections={"candidates": candidates})

    # --- the run and its reward ---

    def evaluate(self, further: bool) -> Generator[Info, None, None]:
        """Run from the noises and score the result; `further` prepares the way back."""
        self.tape: list[tuple[list[Tensor], Tensor | None]] = []
        x = self.noises[0]
        for level in range(self.last + 1):
            kept = further and (level == self.last or not self.config.checkpoint)
            with torch.set_grad_enabled(kept):
                leaves = self._leaves(x, level, kept)
                prediction, out = self._step(leaves, level)
            yield Info(level, prediction.x0.detach(), so_far=None if self.best is None else self.result)
            self.tape.append((leaves, out if kept else None))
            x = out.detach()
        finite = x.flatten(1).isfinite().all(1)
        self.broken = ~finite
        if self.best is not None:
            x = rows_where(finite, x, self.best)
        exact = further and self.config.gradient == "exact"
        with torch.set_grad_enabled(exact):
            self.x0 = x.requires_grad_(exact)
            rewards = self._score(self.x0, exact)
        x = x.detach()
        self._keep_best(x, rewards)

    def _leaves(self, x: Tensor, level: int, kept: bool) -> list[Tensor]:
        """What a step depends on: its latents and, where it draws one, its noise."""
        leaves = [x.detach(), *self.noises[level + 1 : level + 2]]
        free = [True, level + 1 < self.free]
        return [leaf.detach().requires_grad_() if kept and f else leaf for leaf, f in zip(leaves, free, strict=False)]

    def _step(self, leaves: list[Tensor], level: int) -> tuple[Prediction, Tensor]:
        prediction = self.task.predict(leaves[0], level)
        gaussian = self.config.transition(prediction, self.schedule, level, level + 1)
        return prediction, gaussian.center if gaussian.std == 0 else gaussian.sample(leaves[1])

    def _score(self, x0: Tensor, exact: bool) -> Tensor | None:
        """Rewards [B] of clean latents; with `exact` their graph is kept in `total`."""
        task = self.task
        if not exact:
            return task.final_scores(x0, task.rows)
        graph: list[Tensor] = []
        images = None if task.reward is None else task.denoiser.decode(x0, task.rows)

        def call() -> Tensor:
            by_reward = images is not None
            graph.append(task.reward(images, task.rows) if by_reward else task.value(x0, task.steps, task.rows))
            return graph[0]

        name = task.name_of_score()
        checked = task.checked(call, task.rows, name, final=True)
        self.total = torch.as_tensor(graph[0]).sum()
        if not self.total.requires_grad:
            raise ValueError(
                f"{name} is not differentiable: its scores carry no gradient; use gradient='zeroth-order', or a sampler "
                "without gradients (noise-search, best-of-n)"
            )
        task.show(x0.detach(), task.rows, checked.detach(), None if images is None else images.detach())
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

    def ascend(self, iteration: int) -> Generator[Info, None, dict[str, Any]]:
        """Move the noises up the gradient; returns what the trace says of it."""
        gradients = yield from self.gradients(iteration)
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

    def gradients(self, iteration: int) -> Generator[Info, None, list[Tensor]]:
        """Gradients of the reward with respect to the noises, per unit of noise."""
        if self.config.gradient == "exact":
            (upper,) = torch.autograd.grad(self.total, self.x0)
            self.task.ledger.charge_backward(len(self.x0), self.task.final_cost)
        else:
            upper = self._estimated(iteration)
        cost = self.task.denoiser.evaluations_per_row
        gradients = [torch.zeros_like(z) for z in self.velocity]
        for level in range(self.last, -1, -1):
            assert self.best is not None
            yield Info(self.task.steps, self.best, so_far=self.result, silent=True)
            leaves, out = self.tape.pop()
            if out is None:
                with torch.enable_grad():
                    leaves = self._leaves(leaves[0], level, True)
                    out = self._step(leaves, level)[1]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            below = torch.autograd.grad(out, wanted, upper.to(out), allow_unused=True)
            self.task.ledger.charge_backward(len(upper), cost)
            if len(wanted) > 1 and below[1] is not None:
                gradients[level + 1] = below[1]
            upper = below[0]
        gradients[0] = self.scales[0] * upper
        return gradients

    def _estimated(self, iteration: int) -> Tensor:
        """The gradient at the clean latents [B, ...] from pairs of rewards around them."""
        task, x0 = self.task, self.x0
        pairs = range(self.config.perturbations)
        names = [(Purpose.PERTURB, iteration, j) for j in pairs]
        drawn = [task.named_noise(task.rows, x0.shape[1:], [name] * task.count) for name in names]
        u = torch.stack(drawn).to(x0)
        size = self.config.smoothing * x0.flatten(1).double().square().mean(1).sqrt().clamp(min=1e-6)
        shift = scaled(u.transpose(0, 1), size).transpose(0, 1).to(x0)
        points = torch.cat([(x0 + shift).flatten(0, 1), (x0 - shift).flatten(0, 1)])
        rewards = task.unwatched.final_scores(points, task.rows.repeat(2 * len(pairs)))  # these points are no results
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
        streams = [self.task.streams.generator(r, Purpose.PERMUTE, iteration) for r in range(self.task.count)]
        orders = [[torch.randperm(self.dimension, generator=g) for g in streams] for _ in range(_PERMUTATIONS)]
        gradient = improbability_gradient(flat, torch.stack([torch.stack(o) for o in orders]).to(flat.device))
        sizes = [z[0].numel() for z in units]
        return [g.view_as(z) for g, z in zip(torch.split(gradient, sizes, 1), units, strict=True)]


def _norm(parts: list[Tensor]) -> Tensor:
    """Euclidean length [B] of rows over all parts [B, ...], float64 on the CPU."""
    return torch.stack([p.double().flatten(1).square().sum(1).cpu() for p in parts]).sum(0).sqrt()

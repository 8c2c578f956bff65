"""Psi-Sampler (arXiv 2506.01320): particles that start where the value is high already, by Markov chains on x_T.

Sequential Monte Carlo whose particles start as noise has to find the reward while it denoises.  Here they are drawn from

    q(x_T) ~ N(0, I) exp(V(x_T) / lambda),

by preconditioned Crank-Nicolson steps, whose acceptance does not fall with the dimension (Cotter et al. 2013,
arXiv 1202.0709).  With g = grad V / lambda and h = 4 (1 - rho) / (1 + rho),

    x' = rho x + sqrt(1 - rho^2) (z + sqrt(h) / 2 g(x))       (pCNL; without g it is pCN),

accepted with probability min(1, pi(x') q(x | x') / pi(x) q(x' | x)), for pCN min(1, exp((V(x') - V(x)) / lambda)).
Particles then go on as in twisted SMC: the value's potential at x_T is paid for by the chain, so their weights begin with
exp(-V(x_T) / lambda) and the product still targets p(x0) exp(r(x0) / lambda).  There is no estimate of its normaliser, since
that of q(x_T) is unknown.

The value of pure noise is that of a model which judges it, or of the denoiser's first estimate; it says most on distilled
models.  Fresh noise comes from the pipeline in pairs, as in `noise_search`, so that pCN also holds for starts around an
input image (ours); pCNL takes starts to be centred.
"""

import math
from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.random import Purpose
from rsm_guidance.core.resampling import Scheme
from rsm_guidance.core.rows import rows_where
from rsm_guidance.core.transitions import DDIM, GaussianTransition, require_gaussian
from rsm_guidance.rollouts.collect import interleave
from rsm_guidance.samplers import kernel, population
from rsm_guidance.samplers.gradients import value_and_gradient
from rsm_guidance.samplers.kernel import Info, Sampler, Solution, first_of, grouped, table
from rsm_guidance.samplers.neighbours import neighbours
from rsm_guidance.samplers.smc import TwistedSMC
from rsm_guidance.samplers.task import Task


@dataclass(frozen=True)
class CrankNicolson:
    """Markov chains on initial noises, with stationary law q(x_T).

    Attributes:
        chains: parallel chains per prompt, >= 1; chain 0 begins where the unguided run starts.
        burn_in: first moves, whose states are dropped, >= 0.
        thin: moves between two states that are kept, >= 1.
        rho: share of the noise that a move keeps, in (-1, 1).
        gradient: follow the value's gradient (pCNL) or not (pCN).
        jacobian: differentiate through the denoiser, where the value reads its estimate.
    """

    chains: int = 2
    burn_in: int = 4
    thin: int = 2
    rho: float = 0.8
    gradient: bool = False
    jacobian: bool = True

    def __post_init__(self) -> None:
        if self.chains < 1 or self.thin < 1 or self.burn_in < 0:
            raise ValueError(
                "chains and thin must be at least 1 and burn_in at least 0; "
                f"got {self.chains}, {self.thin} and {self.burn_in}"
            )
        if not -1 < self.rho < 1:
            raise ValueError(f"rho must be in (-1, 1); got {self.rho}")

    def moves(self, count: int) -> int:
        """Moves that each chain makes for `count` particles."""
        return self.burn_in + self.thin * math.ceil(count / self.chains)

    def draw(self, task: Task, count: int, temperature: float) -> Generator[Info, None, tuple[Tensor, Tensor, Tensor]]:
        """Initial latents [B * count, ...], their values [B, count] and the share of moves taken [B].

        Cost per image: a value for every state of every chain, with `gradient` a backward pass, too.
        """
        c, scale = self.chains, math.hypot(*task.schedule.coefficients(0))
        x = task.initial(*range(c))
        values, slope, x0 = self._value(task, x, temperature)
        kept: list[tuple[Tensor, Tensor]] = []
        taken = torch.zeros(len(x), dtype=torch.float64)
        for move in range(self.moves(count)):
            yield Info(0, None if x0 is None else first_of(x0, c), silent=True)
            chains = grouped(x, c)
            fresh = [neighbours(task, chains[:, i], self.rho, Purpose.MOVE, i, move) for i in range(c)]
            proposal = interleave(fresh) + (self._push(scale) * slope).to(x)
            there, slope_there, _ = self._value(task, proposal, temperature)
            log_ratio = (there - values) / temperature
            if self.gradient:
                log_ratio = log_ratio + self.correction(x, proposal, slope, slope_there, scale)
            uniform = [task.streams.uniform(r, Purpose.ACCEPT, i, move) for r in range(task.count) for i in range(c)]
            accept = torch.tensor(uniform, dtype=torch.float64).log() < log_ratio
            taken += accept
            x, slope = rows_where(accept, proposal, x), rows_where(accept, slope_there, slope)
            values = torch.where(accept, there, values)
            if move >= self.burn_in and (move + 1 - self.burn_in) % self.thin == 0:
                kept.append((grouped(x, c), table(values, c)))
        latents = torch.cat([states for states, _ in kept], 1)[:, :count]
        share = table(taken, c).mean(1) / self.moves(count)
        return latents.flatten(0, 1), torch.cat([v for _, v in kept], 1)[:, :count], share

    def _value(self, task: Task, x: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values [R] of initial latents, the gradient of V / lambda, float64 [R, ...] (zeros without), and x0 if known."""
        rows = task.rows_of(self.chains)
        if not self.gradient:
            values, known = task.score(x, 0, rows)
            return values, torch.zeros_like(x, dtype=torch.float64), None if known is None else known.x0
        prediction, values, gradient = value_and_gradient(task, x, 0, rows, self.jacobian)
        return values, gradient.nan_to_num(0.0, 0.0, 0.0).double() / temperature, prediction.x0

    def _push(self, scale: float) -> float:
        """Factor on the gradient in a move, for initial latents of standard deviation `scale`."""
        h = 4 * (1 - self.rho) / (1 + self.rho)
        return math.sqrt(1 - self.rho**2) * math.sqrt(h) / 2 * scale**2

    def correction(self, x: Tensor, there: Tensor, slope: Tensor, slope_there: Tensor, scale: float) -> Tensor:
        """log q(x | x') - log q(x' | x) beyond what the prior's own moves are reversible for, [R]."""
        push = self._push(scale)

        def pulled(start: Tensor, end: Tensor, g: Tensor) -> Tensor:
            residual = (end.double() - self.rho * start.double()).flatten(1)
            shift = push * g.flatten(1)
            return (2 * residual * shift - shift.square()).sum(1)

        gain = pulled(there, x, slope_there) - pulled(x, there, slope)
        return (gain / (2 * (1 - self.rho**2) * scale**2)).cpu()


@dataclass(frozen=True)
class PsiSampler(Sampler):
    """Sequential Monte Carlo from initial noises that a Markov chain has drawn.

    Attributes:
        particles: K >= 1 per prompt.
        temperature: lambda > 0 of the target p(x0) exp(r(x0) / lambda).
        initial: the chain; None starts from plain noise, which is twisted SMC.
        gradient: whether proposals follow the value's gradient (twisted SMC) or the base model (Feynman-Kac steering).
        threshold: resample below this share of K of effective particles, in (0, 1].
        resampling: scheme.
        transition: how to step; a stochastic one.
        largest_shift: bound on a proposal's move, in standard deviations per dimension.
        jacobian: differentiate through the denoiser, where the value reads its estimate.
        returned: "sample" draws a particle by weight, a sample of the target; "best" takes the one of highest reward, which
            maximises.
    """

    name: ClassVar[str] = "psi"
    budget_field: ClassVar[str | None] = "particles"
    particles: int = 4
    temperature: float = 1.0
    initial: CrankNicolson | None = CrankNicolson()
    gradient: bool = False
    threshold: float = 0.5
    resampling: Scheme = "systematic"
    transition: GaussianTransition = DDIM(1.0)
    largest_shift: float = TwistedSMC.largest_shift
    jacobian: bool = True
    returned: Literal["sample", "best"] = "sample"

    def __post_init__(self) -> None:
        require_gaussian(self.transition, "copies of a particle have to part", noisy=True)
        self._smc()  # checks the rest

    @property
    def target(self) -> str | None:
        return population.target_of(self.transition, self.returned)

    def _smc(self) -> TwistedSMC:
        return TwistedSMC(
            self.particles,
            self.temperature,
            threshold=self.threshold,
            resampling=self.resampling,
            transition=self.transition,
            largest_shift=self.largest_shift,
            gradient=self.gradient,
            jacobian=self.jacobian,
            returned=self.returned,
        )

    def check(self, task: Task) -> None:
        kernel.require(self, task, value=True)

    def solve(self, task: Task) -> Solution:
        """Cost per image: the chain's, then K unguided samples with K value evaluations at each level; with `gradient` a
        backward pass for each of these."""
        smc, sections = self._smc(), {}
        state = smc.init(task)
        if self.initial is not None:
            latents, values, share = yield from self.initial.draw(task, self.particles, self.temperature)
            sections["chain"] = {"values": values.tolist(), "accepted": share.tolist()}
            state = population.particles(task, latents, self.particles, twist=values / self.temperature)
        for jump in self.transition.jumps(task.schedule):
            state, info = smc.step(task, state, jump)
            yield info
        result = smc.finish(task, state)
        if self.initial is not None:  # the normaliser of q(x_T) is unknown
            result = replace(result, log_normalizer=None)
        return replace(result, sections=result.sections | sections)

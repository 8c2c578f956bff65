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
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.resampling import SCHEMES, Scheme
from rsm_guidance.core.rows import rows_where
from rsm_guidance.core.transitions import Transition
from rsm_guidance.samplers.base import (
    Problem,
    SamplerOutput,
    check_deadline,
    new_trace,
)
from rsm_guidance.samplers.gradients import gradient_cost, value_and_gradient
from rsm_guidance.samplers.noise_search import neighbours
from rsm_guidance.samplers.particles import Particles
from rsm_guidance.samplers.smc import TwistedSMC


@dataclass(frozen=True)
class CrankNicolson:
    """Markov chains on starting noises, with stationary law q(x_T).

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

    def cost(self, problem: Problem, count: int) -> tuple[float, int]:
        """Denoiser evaluations and reward calls per image."""
        value = problem.value
        assert value is not None
        each = value.evaluations_per_row
        if self.gradient:
            each = problem.denoiser.evaluations_per_row + gradient_cost(problem, self.jacobian)
        states = self.chains * (1 + self.moves(count))
        return states * each, states * value.reward_calls_per_row

    def draw(
        self, problem: Problem, count: int, temperature: float, note: Callable[[Tensor], None] = lambda x0: None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Starting latents [count * B, ...], particle-major, their values [B, count] and the share of moves taken [B].

        `note` is told of the clean latents that values are made of, where they are.
        """
        chains = list(range(self.chains))
        starts = [problem.initial(c) for c in chains]
        x = starts[0] if len(starts) == 1 else torch.cat(starts)
        scale = math.hypot(*problem.denoiser.schedule.coefficients(0))
        values, slope = self._value(problem, x, temperature, note)
        kept: list[tuple[Tensor, Tensor]] = []
        taken = torch.zeros(len(x), dtype=torch.float64)
        for move in range(self.moves(count)):
            check_deadline(problem)
            per_chain = x.view(self.chains, problem.count, *x.shape[1:])
            fresh = [neighbours(problem, per_chain[c], self.rho, "move", c, move) for c in chains]
            push = self._push(scale)
            proposal = torch.cat(fresh) + (push * slope).to(x)
            there, slope_there = self._value(problem, proposal, temperature, note)
            log_ratio = (there - values) / temperature
            if self.gradient:
                log_ratio = log_ratio + self._correction(x, proposal, slope, slope_there, scale)
            uniform = [problem.streams.uniform(r, "accept", c, move) for c in chains for r in range(problem.count)]
            accept = torch.tensor(uniform, dtype=torch.float64).log() < log_ratio
            taken += accept
            x, slope = rows_where(accept, proposal, x), rows_where(accept, slope_there, slope)
            values = torch.where(accept, there, values)
            if move >= self.burn_in and (move + 1 - self.burn_in) % self.thin == 0:
                kept.append((x, values))
        latents = torch.cat([states for states, _ in kept])[: count * problem.count]
        table = torch.cat([v for _, v in kept]).view(-1, problem.count).T[:, :count]
        share = taken.view(self.chains, problem.count).mean(0) / self.moves(count)
        return latents, table, share

    def _value(
        self, problem: Problem, x: Tensor, temperature: float, note: Callable[[Tensor], None]
    ) -> tuple[Tensor, Tensor]:
        """Values [R] of starts and the gradient of V / lambda, float64 [R, ...] (zeros without)."""
        rows = problem.rows.repeat(len(x) // problem.count)
        if not self.gradient:
            values, known = problem.scored(x, 0, rows)
            if known is not None:
                note(known.x0)
            return values, torch.zeros_like(x, dtype=torch.float64)
        prediction, values, gradient = value_and_gradient(problem, x, 0, rows, self.jacobian)
        note(prediction.x0)
        return values, gradient.nan_to_num(0.0, 0.0, 0.0).double() / temperature

    def _push(self, scale: float) -> float:
        """Factor on the gradient in a move, for starts of standard deviation `scale`."""
        h = 4 * (1 - self.rho) / (1 + self.rho)
        return math.sqrt(1 - self.rho**2) * math.sqrt(h) / 2 * scale**2

    def _correction(self, x: Tensor, there: Tensor, slope: Tensor, slope_there: Tensor, scale: float) -> Tensor:
        """log q(x | x') - log q(x' | x) beyond what the prior's own moves are reversible for, [R]."""
        push = self._push(scale)

        def pulled(start: Tensor, end: Tensor, g: Tensor) -> Tensor:
            residual = (end.double() - self.rho * start.double()).flatten(1)
            shift = push * g.flatten(1)
            return (2 * residual * shift - shift.square()).sum(1)

        gain = pulled(there, x, slope_there) - pulled(x, there, slope)
        return (gain / (2 * (1 - self.rho**2) * scale**2)).cpu()


@dataclass(frozen=True)
class PsiSampler:
    """Sequential Monte Carlo from starts that a Markov chain has drawn.

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
        returned: "best" returns the particle of highest reward, "sample" draws one by weight, a sample of the target.
    """

    name: ClassVar[str] = "psi"
    scales: ClassVar[str | None] = "particles"
    particles: int = 4
    temperature: float = 1.0
    initial: CrankNicolson | None = CrankNicolson()
    gradient: bool = False
    threshold: float = 0.5
    resampling: Scheme = "systematic"
    transition: Transition = Transition("cps", 0.9)
    largest_shift: float = TwistedSMC.largest_shift
    jacobian: bool = True
    returned: Literal["best", "sample"] = "best"

    def __post_init__(self) -> None:
        if self.resampling not in SCHEMES or self.transition.kind not in ("ddim", "cps", "flow_sde"):
            raise ValueError(
                f"resampling is one of {', '.join(SCHEMES)} and the transition ddim, cps or flow_sde, since copies of a "
                f"particle have to part; got {self.resampling!r} and {self.transition.kind!r}"
            )
        self._smc()  # checks the rest

    def _smc(self) -> TwistedSMC:
        return TwistedSMC(
            self.particles,
            self.temperature,
            threshold=self.threshold,
            resampling=self.resampling,
            transition=self.transition,
            largest_shift=self.largest_shift,
            jacobian=self.jacobian,
            returned=self.returned,
        )

    def sample(self, problem: Problem) -> SamplerOutput:
        """Cost per image: a value evaluation for every state of every chain, then K times an unguided sample with K value
        evaluations at each level; with `gradient` a backward pass for each of these.

        A budget lowers K, and without means for a chain the run is unguided.  At the deadline or on Ctrl-C the estimate of
        the heaviest particle is returned, during the chain its first state's, if there is one (none with a DRM alone).
        """
        if problem.value is None:
            raise ValueError("the sampler 'psi' scores noisy latents: pass a diffusion reward model, or a reward")
        problem.require_budget()
        trace = new_trace(self, problem)
        smc = self._smc()
        k = problem.most(self.particles, lambda k: self._cost(problem, smc, k), least=0)
        if k == 0:
            return smc.unguided(problem, trace)
        output = smc.steer(problem, lambda note: self._start(problem, k, trace, note), trace, self.gradient)
        if self.initial is not None:
            output.log_normalizer = None
        return output

    def _start(self, problem: Problem, k: int, trace: dict[str, object], note: Callable[[Tensor], None]) -> Particles:
        if self.initial is None:
            starts = [problem.initial(c) for c in range(k)]
            latents, values = torch.cat(starts), torch.zeros(problem.count, k, dtype=torch.float64)
        else:
            latents, values, share = self.initial.draw(problem, k, self.temperature, note)
            trace["chain"] = {"values": values.tolist(), "accepted": share.tolist()}
        group = Particles(problem, k, latents)
        group.carried = {"twist": values / self.temperature}
        return group

    def _cost(self, problem: Problem, smc: TwistedSMC, k: int) -> tuple[float, int]:
        """Denoiser evaluations and reward calls of one image with k particles."""
        evaluations, calls = smc.cost(problem, k, self.gradient)
        if self.initial is not None:
            own = self.initial.cost(problem, k)
            evaluations, calls = evaluations + own[0], calls + own[1]
        return evaluations, calls

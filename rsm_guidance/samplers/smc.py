"""Twisted sequential Monte Carlo: particles whose proposals follow the gradient of the value.

TDS (arXiv 2306.17775) and DAS (arXiv 2501.05803).  With the base transition p(x' | x) = N(mu, s^2), the twist
phi_t(x) = gamma_t V(x_t) / lambda and q(x' | x) = N(mu + s^2 grad phi_t(x), s^2), a particle's weight is multiplied by

    p(x' | x) / q(x' | x)  exp(phi_{t+1}(x') - phi_t(x)),

and in the end by exp(r(x0) / lambda - phi).  The product targets p(x0) exp(r(x0) / lambda) / Z exactly as K grows, for any
twist; a good one keeps the weights even.  gamma_t = progress ^ `power` tempers early values: where these are crude (Tweedie's
estimate) power 1 keeps the normaliser honest at few particles, power 0 follows them from the start.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rsm_guidance.core.resampling import SCHEMES, Scheme
from rsm_guidance.core.rows import scaled
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import DDIM, Gaussian, GaussianTransition, exact, require_gaussian
from rsm_guidance.samplers import kernel, population
from rsm_guidance.samplers.gradients import value_and_gradient
from rsm_guidance.samplers.kernel import Info, Kernel, Result, State, table
from rsm_guidance.samplers.task import Task


@dataclass(frozen=True)
class TwistedSMC(Kernel):
    """Sequential Monte Carlo with gradient proposals.

    Attributes:
        particles: K >= 1 per prompt; particle 0 starts where the unguided run starts.
        temperature: lambda > 0 of the target p(x0) exp(r(x0) / lambda).
        power: gamma_t = progress ^ power; 0 leaves values as they are.
        threshold: resample below this share of K of effective particles, in (0, 1].
        resampling: scheme.
        transition: how to step; a stochastic one.
        largest_shift: proposals move by at most so many standard deviations per dimension (root mean square); weights
            take the clipped proposal into account.
        gradient: whether proposals follow the value's gradient, or step as the base model does.
        jacobian: differentiate through the denoiser, where the value reads its estimate.
        checkpoint: recompute activations on the way back instead of keeping them: less memory, a forward pass more.
        returned: "sample" draws a particle by weight, a sample of the target; "best" takes the one of highest reward, which
            maximises.
    """

    name: ClassVar[str] = "smc"
    budget_field: ClassVar[str | None] = "particles"
    particles: int = 4
    temperature: float = 1.0
    power: float = 0.0
    threshold: float = 0.5
    resampling: Scheme = "systematic"
    transition: GaussianTransition = DDIM(1.0)
    largest_shift: float = 0.5
    gradient: bool = True
    jacobian: bool = True
    checkpoint: bool = False
    returned: Literal["sample", "best"] = "sample"

    def __post_init__(self) -> None:
        kernel.at_least(self, 1, "particles")
        kernel.finite(self, "temperature", "largest_shift", positive=True)
        kernel.finite(self, "power")
        kernel.share(self, "threshold")
        kernel.one_of(self, resampling=tuple(SCHEMES), returned=("best", "sample"))
        require_gaussian(self.transition, "copies of a particle have to part", noisy=True)

    @property
    def target(self) -> str | None:
        return population.target_of(self.transition, self.returned)

    def check(self, task: Task) -> None:
        if task.value is None:
            raise ValueError(
                f"the sampler {self.name!r} follows the gradient of a value: pass a differentiable reward or value model"
            )

    def init(self, task: Task) -> State:
        """Cost per image: K unguided samples, and at each level K value evaluations with a backward pass."""
        task.denoiser.checkpointing = self.checkpoint
        twist = torch.zeros(task.count, self.particles, dtype=torch.float64)
        return population.particles(task, task.initial(*range(self.particles)), self.particles, twist=twist)

    def step(self, task: Task, state: State, jump: tuple[int, int]) -> tuple[State, Info]:
        level = jump[0]
        prediction, values, slope = self._scored(task, state, level)
        scores = table(values, state.k)
        scale = (level / task.steps) ** self.power / self.temperature
        state = retwisted(replace(state, prediction=prediction), scale * scores)
        state, record = population.resampled(task, state, level, self.resampling, self.threshold)
        slope = slope[kernel.places(record["ancestors"], state.k)]
        assert state.prediction is not None
        estimate = state.prediction.x0
        state = replace(self._proposed(task, state, scale * slope, jump), x0=estimate, prediction=None)
        return state, Info(level, population.heaviest(state), scores, level, record)

    def finish(self, task: Task, state: State) -> Result:
        rewards = population.final_table(task, state)
        assert rewards is not None
        return population.concluded(task, retwisted(state, rewards / self.temperature), rewards, self.returned)

    def _scored(self, task: Task, state: State, level: int) -> tuple[Prediction, Tensor, Tensor]:
        """Prediction, values [B * K] and their gradients at the particles; zero without `gradient`."""
        x, rows = state.x, task.rows_of(state.k)
        if self.gradient:
            prediction, values, slope = value_and_gradient(task, x, level, rows, self.jacobian)
            return prediction, values, slope.nan_to_num(0.0)  # such a particle proposes as the base model does
        values, known = task.score(x, level, rows)
        return known or task.predict(x, level, rows), values, torch.zeros_like(x)

    def _proposed(self, task: Task, state: State, gradient: Tensor, jump: tuple[int, int]) -> State:
        """Step by the shifted proposal, and weigh by the ratio of the base transition to it."""
        assert state.prediction is not None
        base = self.transition(state.prediction, task.schedule, *jump)
        if base.std == 0:
            return replace(state, x=base.center)
        shift = base.std**2 * exact(gradient)
        size = shift.flatten(1).double().square().mean(1).sqrt() / base.std
        factor = (self.largest_shift / size.clamp(min=1e-30)).clamp(max=1.0)
        proposal = Gaussian(base.mean + scaled(shift, factor), base.std, base.dtype)
        noise = task.noise(task.rows_of(state.k), state.x.shape[1:], jump[0], [*range(state.k)] * task.count)
        x = proposal.sample(noise)
        ratio = base.log_prob(x.double()) - proposal.log_prob(x.double())
        return population.reweighted(replace(state, x=x), table(ratio.double().cpu(), state.k))


def retwisted(state: State, phi: Tensor) -> State:
    """Exchange the twist [B, K] of the level before, which the weights contain, for this one's."""
    state = population.reweighted(state, phi - state.carried["twist"])
    return replace(state, carried=state.carried | {"twist": phi})

"""Feynman-Kac steering: particles weighted by what becomes of them (arXiv 2501.06848).

K particles follow the base model's transition p(x' | x).  At some levels each gets the log-potential log G_t, made of
its values V_t = V(x_t), and prompts whose effective sample size has fallen are resampled.  With phi_t = gamma_t V_t / lambda,
and n levels at which particles are weighed:

- `difference`: log G_t = phi_t - phi_{t-1};
- `max`: log G_t = max over s <= t of phi_s, divided by n;
- `sum`: log G_t = sum over s <= t of phi_s, divided by n (n + 1) / 2.

The divisors are ours: all potentials together then weigh as one value.  As published, at the temperature of the target, the
particles are drawn to p exp(n V / lambda) and beyond before the last potential calls them back, which at 16,384 particles still
is 30 standard errors off (`tests/samplers/test_particles.py`): not an error, but a variance that no number of particles pays for.

The last potential is r(x0) / lambda minus all earlier ones, so that the product is exp(r(x0) / lambda) for every choice, and the
weighted particles target p(x0) exp(r(x0) / lambda) / Z exactly as K grows; good values only lower the variance.  gamma_t in
[0, 1] tempers the early values (`tempering`).  Resampling at every level (threshold 1) is VASR (arXiv 2604.06779).  Unlike the
published code, weights are carried when no resampling is due, are never clamped, and count at the last step.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from rsm_guidance.core.resampling import SCHEMES, Scheme
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import DDIM, Transition
from rsm_guidance.samplers import kernel, population, tempering
from rsm_guidance.samplers.kernel import Info, Kernel, Result, State
from rsm_guidance.samplers.task import Task
from rsm_guidance.samplers.tempering import POTENTIALS, TEMPERINGS


@dataclass(frozen=True)
class FKSteering(Kernel):
    """Weigh particles at some levels, and resample them.

    Attributes:
        particles: K >= 1 per prompt; particle 0 starts where the unguided run starts.
        temperature: lambda > 0 of the target p(x0) exp(r(x0) / lambda).
        potential: how values become weights.
        tempering, power: "none" (gamma = 1), "polynomial" (gamma = progress ^ `power`, which is > 0) or "adaptive".
        threshold: resample below this share of K of effective particles, in (0, 1]; 1 resamples whenever weights differ.
        resampling: scheme.
        interval, window: weigh every so many levels, at noise levels (low, high) as fractions of the noisiest sigma.
        transition: how to step; a stochastic one, or duplicates stay duplicates.
        returned: "sample" draws a particle by weight, a sample of the target; "best" takes the one of highest reward, which
            maximises.
    """

    name: ClassVar[str] = "fk-steering"
    budget_field: ClassVar[str | None] = "particles"
    particles: int = 4
    temperature: float = 1.0
    potential: Literal["difference", "max", "sum"] = "difference"
    tempering: Literal["none", "polynomial", "adaptive"] = "polynomial"
    power: float = 1.0
    threshold: float = 0.5
    resampling: Scheme = "systematic"
    interval: int = 2
    window: tuple[float, float] = (0.0, 1.0)
    transition: Transition = DDIM(1.0)
    returned: Literal["sample", "best"] = "sample"

    def __post_init__(self) -> None:
        kernel.at_least(self, 1, "particles", "interval")
        kernel.finite(self, "temperature", "power", positive=True)
        kernel.share(self, "threshold")
        kernel.check_window(self.window)
        kernel.one_of(self, potential=POTENTIALS, tempering=TEMPERINGS)
        kernel.one_of(self, resampling=tuple(SCHEMES), returned=("best", "sample"))
        population.require_stochastic(self.transition, self.particles)

    @property
    def target(self) -> str | None:
        return population.target_of(self.transition, self.returned)

    def check(self, task: Task) -> None:
        if self.particles > 1:
            kernel.require(self, task)

    def init(self, task: Task) -> State:
        """Cost per image: K unguided samples, and K values at each weighed level, free where they read predictions."""
        carried = tempering.start(self, task.count, self.particles)
        return population.particles(task, task.initial(*range(self.particles)), self.particles, **carried)

    def step(self, task: Task, state: State, jump: tuple[int, int]) -> tuple[State, Info]:
        level, target = jump
        state, info = self.unguided(task, state, jump)
        if state.k == 1 or target not in self.weighed(task.schedule):
            return state, info
        values, known = task.score(state.x, target, task.rows_of(state.k))
        scores = kernel.table(values, state.k)
        levels = len(self.weighed(task.schedule))
        gamma = tempering.gamma(self, state, scores / self.temperature, target / task.steps, levels)
        running, increment = tempering.potential(self, state, gamma * scores / self.temperature, levels)
        carried = {"potentials": state.carried["potentials"] + increment, "running": running, "gamma": gamma}
        state = replace(population.reweighted(state, increment), prediction=known, carried=carried)
        state, record = population.resampled(task, state, target, self.resampling, self.threshold)
        return state, Info(level, population.heaviest(state), scores, target, record)

    def finish(self, task: Task, state: State) -> Result:
        rewards = population.final_table(task, state)
        if rewards is None:
            return Result(state.x)
        state = population.reweighted(state, rewards / self.temperature - state.carried["potentials"])
        return population.concluded(task, state, rewards, self.returned)

    def weighed(self, schedule: NoiseSchedule) -> list[int]:
        """The levels at which particles are weighed: every `interval`-th stop before the end, inside the window."""
        stops = [level for level, _ in self.transition.jumps(schedule)[:0:-1]][self.interval - 1 :: self.interval]
        return [level for level in stops if kernel.in_window(self.window, schedule, level)]

"""One-step transitions from level i to a cleaner level j, as classes over a `Prediction` and two levels.

With (alpha, sigma) at level i and (alpha', sigma') at level j:

- `ODE`: the deterministic probability-flow step alpha' x0 + sigma' eps (for flow models x + (sigma' - sigma) v).
- `DDIM`: alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z with s = eta times the posterior standard deviation of the forward
  process (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16; written for any alpha, sigma).  eta = 1 is ancestral sampling.
- `CPS`: the same with s = sigma' sin(eta pi / 2), coefficients-preserving sampling (arXiv 2509.05952).
- `FlowSDE`: the Euler-Maruyama step of the flow SDE with diffusion a sqrt(sigma / (1 - sigma)) (Flow-GRPO,
  arXiv 2505.05470).  At sigma = 1 its denominator uses the next sigma, as published.
- `GLASS`: an exact draw from ancestral sampling's p(x_j | x_i) by an inner ODE over the levels between i and j, GLASS Flows
  (arXiv 2509.25170).  With X0 ~ p(x0 | x_i) as its data and pi = (alpha / sigma)^2 the precision with which a level
  shows X0, the inner flow adds an observation w of precision q = pi_l - pi_i; x_i and w together are one observation at
  level l, so the same denoiser answers.  With no level between it is `DDIM` at eta = 1.
- `SchedulerSteps`: the pipeline's own solver, which can only be followed from start to end.

What a chain of them keeps is told by `keeps_marginals`: whether, under the posterior means of an exact denoiser, the laws of
its states converge to those of the forward process as levels grow.

- `ODE`, `DDIM`, `FlowSDE`, `GLASS` do, with an error of the order of a step.  `DDIM` ends narrower than the data, `FlowSDE` wider.
- `CPS` does not: its noise does not shrink with the step, so that every step trades the spread of p(x0 | x_i) for fresh noise
  around its mean.  At eta = 0.9 modes end with about half of their variance, however many levels there are.

One step from the true x0 and eps is another matter: all but `FlowSDE` (an Euler step) then give x_j its exact law.
`benchmarks/transitions.py` has the figures.

Means are computed and kept in float32 (float64 for float64 latents), whatever the latents' dtype: a mean rounded to bfloat16
moves log-probabilities by as much as published clip ranges.  Only samples are cast.
"""

import math
from abc import ABCMeta, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from rsm_guidance.core.schedule import NoiseSchedule, Prediction

Predict = Callable[[Tensor, int], Prediction]


def exact(x: Tensor) -> Tensor:
    """x in float32, or in float64 if it is that already."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2 I) over latents.

    Attributes:
        mean: [B, ...], float32 or float64.
        std: one number >= 0 for all.
        dtype: of the samples; None for the mean's.
    """

    mean: Tensor
    std: float
    dtype: torch.dtype | None = None

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, in `dtype`; `noise` is standard normal and broadcasts to the mean."""
        if self.std == 0:
            mean = self.mean if noise.numel() <= self.mean.numel() else self.mean.expand_as(noise)
            return mean.to(self.dtype or mean.dtype)
        return (self.mean + self.std * noise.to(self.mean)).to(self.dtype or self.mean.dtype)

    @property
    def center(self) -> Tensor:
        """The mean in the samples' dtype."""
        return self.mean.to(self.dtype or self.mean.dtype)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of x [B, ...], summed over all dimensions but the first; [B].

        Raises:
            ValueError: for a deterministic transition, which has no density.
        """
        if self.std == 0:
            raise ValueError("a deterministic transition has no density; use a stochastic one (ddim, cps, flow_sde)")
        z = (x - self.mean) / self.std
        return (-0.5 * z.square() - math.log(self.std) - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


class _ByName(ABCMeta):
    """Lets the base class make the others: `Transition("cps", 0.9)` is `CPS(0.9)`."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if cls is Transition:
            return _named(*args, **kwargs)
        return super().__call__(*args, **kwargs)


class Transition(metaclass=_ByName):
    """How a run moves to a cleaner level.  `Transition(name, noise)` makes one by name, such as `Transition("cps", 0.9)`.

    Attributes:
        name: of the class.
        stochastic: whether two draws from one state differ; the pipeline's own solver does not count.
        whole_runs: whether it can only be followed from start to end.
        keeps_marginals: whether the laws of its states converge to those of the forward process as levels grow.
    """

    name: ClassVar[str]
    stochastic: ClassVar[bool]
    whole_runs: ClassVar[bool] = False

    @property
    def keeps_marginals(self) -> bool:
        return True

    def __str__(self) -> str:
        numbers = [f"{getattr(self, f.name):g}" for f in fields(self)]  # type: ignore[arg-type]
        return " ".join([self.name, *numbers])

    def jumps(self, schedule: NoiseSchedule) -> list[tuple[int, int]]:
        """The levels (from, to) of one run."""
        return [(level, level + 1) for level in range(schedule.steps)]

    @abstractmethod
    def step(
        self, predict: Predict, prediction: Prediction, schedule: NoiseSchedule, level: int, target: int, noise: Tensor
    ) -> Tensor:
        """The next latents [B, ...] in the latents' dtype.

        Args:
            predict: the denoiser at latents [B, ...] and a level, for transitions that ask it more than once.
            prediction: that of the latents at `level`.
            schedule: the levels.
            level: where the transition starts.
            target: where it ends, cleaner than `level`.
            noise: standard normal [B, ...].
        """


class GaussianTransition(Transition):
    """A transition whose next latents are one Gaussian: children share their parent's denoiser evaluation."""

    @abstractmethod
    def gaussian(self, prediction: Prediction, schedule: NoiseSchedule, level: int, target: int) -> Gaussian:
        """N(mean, std^2) over the latents at `target`."""

    def __call__(self, prediction: Prediction, schedule: NoiseSchedule, level: int, target: int) -> Gaussian:
        """N(mean, std^2) over the latents at `target`, which must be cleaner than `level`."""
        if target <= level:
            raise ValueError(f"a transition goes to a cleaner level; got {level} -> {target}")
        return self.gaussian(prediction, schedule, level, target)

    def std(self, schedule: NoiseSchedule, level: int, target: int) -> float:
        """Its standard deviation, which does not depend on the state."""
        zero = torch.zeros(1, 1)
        return self(Prediction(zero, zero, zero, zero), schedule, level, target).std

    def step(
        self, predict: Predict, prediction: Prediction, schedule: NoiseSchedule, level: int, target: int, noise: Tensor
    ) -> Tensor:
        return self(prediction, schedule, level, target).sample(noise)


def _interpolate(p: Prediction, alpha_next: float, sigma_next: float, std: float) -> Gaussian:
    kept = math.sqrt(max(sigma_next**2 - std**2, 0.0))
    return Gaussian(alpha_next * exact(p.x0) + kept * exact(p.eps), std, p.x.dtype)


@dataclass(frozen=True)
class ODE(GaussianTransition):
    """The deterministic step; for flow predictions bitwise the Euler step of diffusers' flow-matching scheduler."""

    name: ClassVar[str] = "ode"
    stochastic: ClassVar[bool] = False

    def gaussian(self, prediction: Prediction, schedule: NoiseSchedule, level: int, target: int) -> Gaussian:
        p = prediction
        _, sigma = schedule.coefficients(level)
        alpha_next, sigma_next = schedule.coefficients(target)
        if p.velocity is None or not schedule.is_flow:
            return _interpolate(p, alpha_next, sigma_next, 0.0)
        x = exact(p.x)
        # a tensor, as in diffusers: a Python number times half-precision velocities rounds differently
        step = torch.tensor(sigma_next - sigma, dtype=x.dtype, device=x.device)
        return Gaussian(x + step * p.velocity, 0.0, p.x.dtype)


def _check_eta(eta: float, name: str) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"{name} takes a noise level eta in [0, 1]; got {eta}")


@dataclass(frozen=True)
class DDIM(GaussianTransition):
    """DDIM with `eta` in [0, 1] times the posterior standard deviation; 0 is the deterministic step, 1 ancestral sampling."""

    name: ClassVar[str] = "ddim"
    stochastic: ClassVar[bool] = True
    eta: float = 1.0

    def __post_init__(self) -> None:
        _check_eta(self.eta, self.name)

    def gaussian(self, prediction: Prediction, schedule: NoiseSchedule, level: int, target: int) -> Gaussian:
        alpha, sigma = schedule.coefficients(level)
        alpha_next, sigma_next = schedule.coefficients(target)
        posterior = sigma_next**2 * max(1 - (alpha * sigma_next / (alpha_next * sigma)) ** 2, 0.0)
        return _interpolate(prediction, alpha_next, sigma_next, self.eta * math.sqrt(posterior))


@dataclass(frozen=True)
class CPS(GaussianTransition):
    """Coefficients-preserving sampling: a share sin(eta pi / 2) of the next level's noise is fresh; eta in [0, 1].

    It sharpens: samples crowd around the modes of the data.  That suits methods that maximise, and no claim about a law.
    """

    name: ClassVar[str] = "cps"
    stochastic: ClassVar[bool] = True
    eta: float = 1.0

    def __post_init__(self) -> None:
        _check_eta(self.eta, self.name)

    @property
    def keeps_marginals(self) -> bool:
        """Only without noise, where it is the deterministic step."""
        return self.eta == 0

    def gaussian(self, prediction: Prediction, schedule: NoiseSchedule, level: int, target: int) -> Gaussian:
        alpha_next, sigma_next = schedule.coefficients(target)
        return _interpolate(prediction, alpha_next, sigma_next, sigma_next * math.sin(self.eta * math.pi / 2))


@dataclass(frozen=True)
class FlowSDE(GaussianTransition):
    """Flow-GRPO's SDE step with noise level `a` >= 0; flow schedules only.  Its last step adds no noise."""

    name: ClassVar[str] = "flow_sde"
    stochastic: ClassVar[bool] = True
    a: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.a < math.inf:
            raise ValueError(f"{self.name} takes a finite noise level a >= 0; got {self.a}")

    def gaussian(self, prediction: Prediction, schedule: NoiseSchedule, level: int, target: int) -> Gaussian:
        if not schedule.is_flow:
            raise ValueError("flow_sde needs a flow schedule (alpha = 1 - sigma); use ddim or cps for this model")
        p = prediction
        _, t = schedule.coefficients(level)
        _, t_next = schedule.coefficients(target)
        velocity, x = exact(p.velocity if p.velocity is not None else p.eps - p.x0), exact(p.x)
        if t_next == 0:
            return Gaussian(x - t * velocity, 0.0, p.x.dtype)
        diffusion = self.a * math.sqrt(t / (1 - (t_next if t >= 1 else t)))
        drift = velocity + diffusion**2 / (2 * t) * (x + (1 - t) * velocity)
        return Gaussian(x - (t - t_next) * drift, diffusion * math.sqrt(t - t_next), p.x.dtype)


@dataclass(frozen=True)
class GLASS(Transition):
    """An exact draw from p(x_target | x_level) by an inner ODE; see the module's docstring.

    It is no single Gaussian, so children cannot share their parent's evaluation.

    Attributes:
        inner: levels that one transition takes, each a step of its inner ODE.
    """

    name: ClassVar[str] = "glass"
    stochastic: ClassVar[bool] = True
    inner: int = 1

    def __post_init__(self) -> None:
        if self.inner < 1:
            raise ValueError(f"inner is a number of levels, at least 1; got {self.inner}")

    def jumps(self, schedule: NoiseSchedule) -> list[tuple[int, int]]:
        stops = [*range(0, schedule.steps, self.inner), schedule.steps]
        return list(zip(stops[:-1], stops[1:], strict=True))

    def step(
        self, predict: Predict, prediction: Prediction, schedule: NoiseSchedule, level: int, target: int, noise: Tensor
    ) -> Tensor:
        def precision(at: int) -> float:
            alpha, sigma = schedule.coefficients(at)
            return math.inf if sigma == 0 else (alpha / sigma) ** 2

        alpha, sigma = schedule.coefficients(level)
        known = alpha / sigma**2 * exact(prediction.x)  # pi_i times the observation of X0 that x_i is
        eps, p, x = noise.to(known), prediction, prediction.x
        for at in range(level + 1, target + 1):
            end = precision(at)
            if math.isinf(end):
                return p.x0
            gained = end - precision(level)
            shown = exact(p.x0) + eps / math.sqrt(gained)
            x = (schedule.coefficients(at)[0] * (known + gained * shown) / end).to(prediction.x)
            if at < target:
                p = predict(x, at)
                eps = (shown - exact(p.x0)) * math.sqrt(gained)
        return x


@dataclass(frozen=True)
class SchedulerSteps(Transition):
    """The pipeline's own solver, which may be any, and is followed from start to end (`Denoiser.follow`)."""

    name: ClassVar[str] = "scheduler"
    stochastic: ClassVar[bool] = False
    whole_runs: ClassVar[bool] = True

    def step(
        self, predict: Predict, prediction: Prediction, schedule: NoiseSchedule, level: int, target: int, noise: Tensor
    ) -> Tensor:
        raise ValueError(
            "the transition 'scheduler' cannot step between single levels, only whole runs of 'none', 'best-of-n' and "
            "'noise-search' can follow it; choose ode, ddim, cps or flow_sde"
        )


TRANSITIONS: dict[str, type[Transition]] = {cls.name: cls for cls in (SchedulerSteps, ODE, DDIM, CPS, FlowSDE, GLASS)}


def _named(name: str = "ode", noise: float | None = None, inner: int | None = None) -> Transition:
    """The transition of a name, with its noise level (eta of ddim and cps, a of flow_sde) or inner levels (glass)."""
    cls = TRANSITIONS.get(name)
    if cls is None:
        raise ValueError(f"unknown transition {name!r}; choose one of {', '.join(TRANSITIONS)}")
    own = fields(cls)  # type: ignore[arg-type]
    if inner not in (None, 1) and cls is not GLASS:
        raise ValueError(f"inner is a number of levels for glass, 1 for all other kinds; got {inner}")
    number = inner if cls is GLASS else noise
    return cls(number) if own and number is not None else cls()  # type: ignore[call-arg]


def parse_transition(text: str) -> Transition:
    """A transition from its name and, after a space, its number: "ode", "cps 0.9", "flow_sde 0.7", "glass 4".

    Raises:
        ValueError: for an unknown name, or a number that it does not take.
    """
    name, _, number = text.strip().partition(" ")
    try:
        value = None if not number.strip() else float(number)
        if value is not None and name in TRANSITIONS and not fields(TRANSITIONS[name]):  # type: ignore[arg-type]
            raise ValueError(f"{name} takes no number")
        if name == GLASS.name and value is not None:
            return GLASS(int(number))
        return _named(name, value)
    except ValueError as error:
        raise ValueError(f"cannot read the transition {text!r}: {error}") from error


def require_gaussian(transition: Transition, why: str, noisy: bool = False) -> None:
    """Raise a ValueError unless a transition steps by single Gaussians, and, if asked for, by `noisy` ones."""
    if not isinstance(transition, GaussianTransition) or (noisy and not transition.stochastic):
        choices = "ddim, cps or flow_sde" if noisy else "ode, ddim, cps or flow_sde"
        raise ValueError(f"the transition {transition.name!r} does not serve: {why}; choose {choices}")


def require_levels(transition: Transition, why: str) -> None:
    """Raise a ValueError if a transition can only be followed from start to end."""
    if transition.whole_runs:
        raise ValueError(f"the transition {transition.name!r} does not serve: {why}; choose ode, ddim, cps or flow_sde")

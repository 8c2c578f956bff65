"""One-step transitions from level i to a cleaner level j, as Gaussians; pure functions of a `Prediction`.

With (alpha, sigma) at level i and (alpha', sigma') at level j:

- `ode`: the deterministic probability-flow step alpha' x0 + sigma' eps (for flow models x + (sigma' - sigma) v).
- `ddim`: alpha' x0 + sqrt(sigma'^2 - s^2) eps + s z with s = eta times the posterior standard deviation of the forward
  process (Song et al. 2021, arXiv 2010.02502, eq. 12 and 16; written for any alpha, sigma).  eta = 1 is ancestral sampling.
- `cps`: the same with s = sigma' sin(eta pi / 2), coefficients-preserving sampling (arXiv 2509.05952).
- `flow_sde`: the Euler-Maruyama step of the flow SDE with diffusion a sqrt(sigma / (1 - sigma)) (Flow-GRPO,
  arXiv 2505.05470).  At sigma = 1 its denominator uses the next sigma, as published.

- `glass`: an exact draw from ancestral sampling's p(x_j | x_i) by an inner ODE over the levels between i and j, GLASS Flows
  (arXiv 2509.25170).  With X0 ~ p(x0 | x_i) as its data and pi = (alpha / sigma)^2 the precision with which a level
  shows X0, the inner flow adds an observation w of precision q = pi_l - pi_i; x_i and w together are one observation at
  level l, so the same denoiser answers.  With no level between it is `ddim` at eta = 1.

`ode`, `ddim` and `cps` keep the marginals of the forward process for the true x0 and eps.  With a denoiser's posterior
means `ode`, `ddim`, `glass` and `flow_sde` converge to them as steps grow (`glass` as fast as `ode`); `cps`, whose noise does not shrink with the step, keeps
a bias (variance error 0.05 of 0.3 at eta = 0.5 with 512 steps of an exact denoiser).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from rsm_guidance.core.schedule import NoiseSchedule, Prediction


@dataclass(frozen=True)
class Gaussian:
    """N(mean, std^2 I) over latents: mean [B, ...], one `std` >= 0 for all."""

    mean: Tensor
    std: float

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise; `noise` is standard normal and broadcasts to the mean.  With std = 0 exactly the mean."""
        if self.std == 0:
            shape = torch.broadcast_shapes(self.mean.shape, noise.shape)  # type: ignore[no-untyped-call]
            return self.mean.expand(shape)
        return self.mean + self.std * noise.to(self.mean)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of x [B, ...], summed over all dimensions but the first; [B].

        Raises:
            ValueError: for a deterministic transition, which has no density.
        """
        if self.std == 0:
            raise ValueError("a deterministic transition has no density; use a stochastic one (ddim, cps, flow_sde)")
        z = (x - self.mean) / self.std
        return (-0.5 * z.square() - math.log(self.std) - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)


def _cast(mean: Tensor, like: Tensor, std: float) -> Gaussian:
    return Gaussian(mean.to(like.dtype), std)


def ode(prediction: Prediction, schedule: NoiseSchedule, level: int, target: int) -> Gaussian:
    """The deterministic step; for flow predictions bitwise the Euler step of diffusers' flow-matching scheduler."""
    p = prediction
    _, sigma = schedule.coefficients(level)
    alpha_next, sigma_next = schedule.coefficients(target)
    if p.velocity is not None and schedule.is_flow:
        # a tensor, as in diffusers: a Python number times half-precision velocities rounds differently
        step = torch.tensor(sigma_next - sigma, dtype=torch.float32, device=p.x.device)
        return _cast(p.x.float() + step * p.velocity, p.x, 0.0)
    return _cast(alpha_next * p.x0.float() + sigma_next * p.eps.float(), p.x, 0.0)


def _interpolate(p: Prediction, alpha_next: float, sigma_next: float, std: float) -> Gaussian:
    kept = math.sqrt(max(sigma_next**2 - std**2, 0.0))
    return _cast(alpha_next * p.x0.float() + kept * p.eps.float(), p.x, std)


def ddim(prediction: Prediction, schedule: NoiseSchedule, level: int, target: int, eta: float) -> Gaussian:
    """DDIM with `eta` in [0, 1] times the posterior standard deviation; eta = 0 is the deterministic step."""
    alpha, sigma = schedule.coefficients(level)
    alpha_next, sigma_next = schedule.coefficients(target)
    posterior = sigma_next**2 * max(1 - (alpha * sigma_next / (alpha_next * sigma)) ** 2, 0.0)
    return _interpolate(prediction, alpha_next, sigma_next, eta * math.sqrt(posterior))


def cps(prediction: Prediction, schedule: NoiseSchedule, level: int, target: int, eta: float) -> Gaussian:
    """Coefficients-preserving sampling: a share sin(eta pi / 2) of the next level's noise is fresh; eta in [0, 1]."""
    alpha_next, sigma_next = schedule.coefficients(target)
    return _interpolate(prediction, alpha_next, sigma_next, sigma_next * math.sin(eta * math.pi / 2))


def flow_sde(prediction: Prediction, schedule: NoiseSchedule, level: int, target: int, a: float) -> Gaussian:
    """Flow-GRPO's SDE step with noise level `a` >= 0; flow schedules only."""
    if not schedule.is_flow:
        raise ValueError("flow_sde needs a flow schedule (alpha = 1 - sigma); use ddim or cps for this model")
    p = prediction
    _, t = schedule.coefficients(level)
    _, t_next = schedule.coefficients(target)
    dt = t - t_next
    diffusion = a * math.sqrt(t / (1 - (t_next if t >= 1 else t)))
    velocity = (p.velocity if p.velocity is not None else p.eps - p.x0).float()
    drift = velocity + diffusion**2 / (2 * t) * (p.x.float() + (1 - t) * velocity)
    std = diffusion * math.sqrt(dt) if t_next > 0 else 0.0  # the last step adds no noise
    if t_next == 0:
        drift = velocity
    return _cast(p.x.float() - dt * drift, p.x, std)


def glass(
    predict: Callable[[Tensor, int], Prediction],
    prediction: Prediction,
    schedule: NoiseSchedule,
    level: int,
    target: int,
    noise: Tensor,
) -> Tensor:
    """A draw from p(x_target | x_level) by an inner ODE; see the module's docstring.

    Args:
        predict: the denoiser at latents [B, ...] and a level between `level` and `target`.
        prediction: that of the latents at `level`.
        schedule: the levels.
        level: where the transition starts.
        target: where it ends, target - level denoiser evaluations later.
        noise: standard normal [B, ...].
    """

    def precision(at: int) -> float:
        alpha, sigma = schedule.coefficients(at)
        return math.inf if sigma == 0 else (alpha / sigma) ** 2

    alpha, sigma = schedule.coefficients(level)
    known = alpha / sigma**2 * prediction.x.float()  # pi_i times the observation of X0 that x_i is
    eps, p, x = noise.to(known), prediction, prediction.x
    for at in range(level + 1, target + 1):
        end = precision(at)
        if math.isinf(end):
            return p.x0
        gained = end - precision(level)
        shown = p.x0.float() + eps / math.sqrt(gained)
        x = (schedule.coefficients(at)[0] * (known + gained * shown) / end).to(prediction.x)
        if at < target:
            p = predict(x, at)
            eps = (shown - p.x0.float()) * math.sqrt(gained)
    return x


TransitionKind = Literal["scheduler", "ode", "ddim", "cps", "flow_sde", "glass"]


@dataclass(frozen=True)
class Transition:
    """A transition and its noise level, as a sampler is configured with it.

    Attributes:
        kind: "ode", "ddim", "cps", "flow_sde"; "glass" for samplers that move whole trajectories; or "scheduler" for the
            pipeline's own solver, which may be any, but can only be followed from start to end (samplers `none` and
            `best-of-n`, and `noise-search`).
        noise: eta in [0, 1] for ddim and cps, a >= 0 for flow_sde; ignored by the others.
        inner: levels that one transition of "glass" takes, each a step of its inner ODE; 1 for all other kinds.
    """

    kind: TransitionKind = "ode"
    noise: float = 1.0
    inner: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(TransitionKind):
            raise ValueError(f"unknown transition {self.kind!r}; choose one of {', '.join(get_args(TransitionKind))}")
        if self.inner < 1 or (self.inner > 1 and self.kind != "glass"):
            raise ValueError(f"inner is a number of levels for glass, 1 for all other kinds; got {self.inner}")
        top = 1.0 if self.kind in ("ddim", "cps") else math.inf
        if not 0 <= self.noise <= top:
            raise ValueError(f"{self.kind} takes a noise level in [0, {top}]; got {self.noise}")

    @property
    def stochastic(self) -> bool:
        """Whether two draws from one state differ; the pipeline's own solver does not count."""
        return self.kind not in ("scheduler", "ode")

    def jumps(self, schedule: NoiseSchedule) -> list[tuple[int, int]]:
        """The levels (from, to) of one run: every level, or every `inner`-th."""
        stops = [*range(0, schedule.steps, self.inner), schedule.steps]
        return list(zip(stops[:-1], stops[1:], strict=True))

    def __call__(self, prediction: Prediction, schedule: NoiseSchedule, level: int, target: int) -> Gaussian:
        """N(mean, std^2) over the latents at `target`, which must be cleaner than `level`."""
        if target <= level:
            raise ValueError(f"a transition goes to a cleaner level; got {level} -> {target}")
        if self.kind == "scheduler":
            raise ValueError(
                "the transition 'scheduler' cannot step between single levels, only whole runs of 'none', 'best-of-n' and "
                "'noise-search' "
                "can follow it; choose ode, ddim, cps or flow_sde"
            )
        if self.kind == "glass":
            raise ValueError(
                "the transition 'glass' is no single Gaussian, so children cannot share their parent's evaluation; use it "
                "with none, best-of-n, fk-steering or funnel, or choose ddim, cps or flow_sde"
            )
        if self.kind == "ode":
            return ode(prediction, schedule, level, target)
        if self.kind == "ddim":
            return ddim(prediction, schedule, level, target, self.noise)
        if self.kind == "cps":
            return cps(prediction, schedule, level, target, self.noise)
        return flow_sde(prediction, schedule, level, target, self.noise)

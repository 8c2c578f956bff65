"""An exact test world: Gaussian mixtures as data, quadratic rewards, and every quantity of guidance in closed form.

Notation: p(x0) = sum_k w_k N(m_k, diag v_k), r(x) = c + b.x - 1/2 sum_d a_d x_d^2 and temperature lambda.  Completing
the square in each component and dimension (with b and a divided by lambda),

    N(x; m, v) exp(b x - a x^2 / 2) = z N(x; (m + v b) / (1 + a v), v / (1 + a v)),
    log z = -1/2 log(1 + a v) + (b m + v b^2 / 2 - a m^2 / 2) / (1 + a v),

so the tilted law p*(x) = p(x) exp(r(x) / lambda) / Z is again a mixture.  Observing x_t = alpha x0 + sigma eps is a
tilt, too, so the posterior p(x0 | x_t) is a mixture, its mean is the perfect denoiser, and the value
V(x_t) = log E[exp(r(x0) / lambda) | x_t] is the log-normaliser of the tilted posterior.  Everything is float64 and in
the log-domain.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import ODE
from rsm_guidance.core.weights import normalize

Values = Tensor | Sequence[float] | Sequence[Sequence[float]] | float


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A mixture of K Gaussians with diagonal covariance in D dimensions, or a batch [...] of them.

    Attributes:
        log_weights: [..., K], any scale, -inf allowed; stored normalised.
        means: [..., K, D].
        variances: whatever broadcasts to the means (a number, [D], [K, 1], [K, D], ...), >= 0; stored as [..., K, D].
            Zero is a point mass, which has no density but can be sampled, tilted and averaged over.

    Raises:
        ValueError: for shapes that do not match, non-finite means, negative variances, or no positive weight.
    """

    log_weights: Tensor
    means: Tensor
    variances: Tensor

    def __post_init__(self) -> None:
        means = torch.as_tensor(self.means, dtype=torch.float64)
        log_weights = torch.as_tensor(self.log_weights, dtype=torch.float64, device=means.device)
        variances = torch.as_tensor(self.variances, dtype=torch.float64, device=means.device)
        if means.ndim < 2 or log_weights.shape != means.shape[:-1]:
            raise ValueError(
                f"a mixture of K Gaussians in D dimensions takes log_weights [..., K] and means [..., K, D]; "
                f"got {list(log_weights.shape)} and {list(means.shape)}"
            )
        try:
            variances = variances.expand(means.shape)
        except RuntimeError as error:
            raise ValueError(
                f"variances {list(variances.shape)} do not broadcast to the means {list(means.shape)}; "
                f"give a number, one per dimension [D], one per component [K, 1], or all [K, D]"
            ) from error
        if not bool(means.isfinite().all()):
            raise ValueError(f"means must be finite; got {means.tolist()}")
        if not bool((variances.isfinite() & (variances >= 0)).all()):
            raise ValueError(f"variances must be finite and not negative; got {variances.tolist()}")
        stored = {"log_weights": normalize(log_weights), "means": means, "variances": variances}
        for name, tensor in stored.items():
            object.__setattr__(self, name, tensor)

    @staticmethod
    def from_weights(weights: Values, means: Values, variances: Values) -> "GaussianMixture":
        """The mixture with linear weights [..., K] >= 0 of any scale; the rest as in the class."""
        linear = torch.as_tensor(weights, dtype=torch.float64)
        if not bool((linear >= 0).all()):
            raise ValueError(f"mixture weights cannot be negative or NaN; got {linear.tolist()}")
        means, variances = (torch.as_tensor(v, dtype=torch.float64) for v in (means, variances))
        return GaussianMixture(linear.log(), means, variances)

    @property
    def dimension(self) -> int:
        """The number of dimensions D."""
        return self.means.shape[-1]

    @property
    def weights(self) -> Tensor:
        """Normalised weights [..., K]."""
        return self.log_weights.exp()

    @property
    def mean(self) -> Tensor:
        """E[x], [..., D]."""
        return (self.weights.unsqueeze(-1) * self.means).sum(-2)

    @property
    def variance(self) -> Tensor:
        """Var[x_d] of each dimension, [..., D]."""
        spread = self.variances + (self.means - self.mean.unsqueeze(-2)).square()
        return (self.weights.unsqueeze(-1) * spread).sum(-2)

    def component_log_prob(self, x: Tensor) -> Tensor:
        """log w_k + log N(x; m_k, v_k), [..., K], for points x [..., D] that broadcast against the batch.

        Raises:
            ValueError: for a point mass, which has no density.
        """
        if x.ndim < 1 or x.shape[-1] != self.dimension:
            raise ValueError(f"this mixture lives in {self.dimension} dimensions; got points of shape {list(x.shape)}")
        if bool((self.variances == 0).any()):
            raise ValueError("a point mass (variance 0) has no density; give every component a variance above 0")
        square = (x.double().unsqueeze(-2) - self.means).square() / self.variances
        return self.log_weights - 0.5 * (square + self.variances.log() + math.log(2 * math.pi)).sum(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density [...] at points x [..., D]; see `component_log_prob`."""
        return self.component_log_prob(x).logsumexp(-1)

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` independent points of every mixture of the batch, float64 [..., count, D]."""
        device, batch = self.means.device, self.log_weights.shape[:-1]
        probabilities = self.weights.detach().reshape(-1, self.log_weights.shape[-1])
        index = torch.multinomial(probabilities, count, replacement=True, generator=generator)
        index = index.reshape(*batch, count, 1)
        noise = torch.randn(*batch, count, self.dimension, generator=generator, dtype=torch.float64, device=device)
        means, variances = (torch.take_along_dim(v, index, dim=-2) for v in (self.means, self.variances))
        return means + variances.sqrt() * noise

    def noised(self, alpha: float, sigma: float) -> "GaussianMixture":
        """The law of alpha x0 + sigma eps."""
        return GaussianMixture(self.log_weights, alpha * self.means, alpha**2 * self.variances + sigma**2)


@dataclass(frozen=True, eq=False)
class QuadraticReward:
    """r(x) = constant + linear . x - 1/2 sum_d curvature_d x_d^2; a `Reward` on toy points.

    linear [D], curvature [D] (positive for a reward with a maximum, negative to reward distance), constant a number.
    """

    linear: Tensor
    curvature: Tensor
    constant: float = 0.0

    def __post_init__(self) -> None:
        for name in ("linear", "curvature"):
            value = torch.as_tensor(getattr(self, name), dtype=torch.float64)
            if not bool(value.isfinite().all()):
                raise ValueError(f"{name} must be finite; got {value.tolist()}")
            object.__setattr__(self, name, value)
        if self.linear.ndim != 1 or self.linear.shape != self.curvature.shape:
            raise ValueError(
                f"linear and curvature must be vectors [D] of one length; got {list(self.linear.shape)} and "
                f"{list(self.curvature.shape)}"
            )

    @classmethod
    def around(cls, center: Values, scale: Values) -> "QuadraticReward":
        """r(x) = -sum_d scale_d (x_d - center_d)^2 for center [D] and scale [D] or a number."""
        m = torch.as_tensor(center, dtype=torch.float64)
        a = torch.as_tensor(scale, dtype=torch.float64).expand(m.shape)
        return cls(2 * a * m, 2 * a, float(-(a * m.square()).sum()))

    def __call__(self, images: Tensor, prompts: list[str] | None = None) -> Tensor:
        """Rewards [...], float64, of points [..., D]; prompts are accepted and ignored."""
        if images.ndim < 1 or images.shape[-1] != len(self.linear):
            raise ValueError(f"this reward takes points [..., {len(self.linear)}]; got {list(images.shape)}")
        x = images.double()
        return self.constant + (self.linear * x - 0.5 * self.curvature * x.square()).sum(-1)


def tilt(mixture: GaussianMixture, reward: QuadraticReward, temperature: float = 1.0) -> tuple[GaussianMixture, Tensor]:
    """p*(x) = p(x) exp(r(x) / temperature) / Z.

    Returns the tilted mixture and log Z = log E_p[exp(r / temperature)], shaped as its batch ([] for one).

    Raises:
        ValueError: for a temperature that is not positive, dimensions that differ, or a reward that grows faster than
            the tails of the mixture fall (1 + curvature * variance / temperature <= 0), where Z is infinite.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"the temperature must be positive and finite; got {temperature}")
    if len(reward.linear) != mixture.dimension:
        raise ValueError(f"the reward takes {len(reward.linear)} dimensions, the mixture has {mixture.dimension}")
    m, v = mixture.means, mixture.variances
    a, b = reward.curvature.to(m.device) / temperature, reward.linear.to(m.device) / temperature
    narrowing = 1 + a * v
    if bool((narrowing <= 0).any()):
        raise ValueError(
            f"the tilted law cannot be normalised: 1 + curvature * variance / temperature is {float(narrowing.min()):.6g} "
            f"and must be positive, as E[exp(r / temperature)] is infinite otherwise. Raise the temperature (now "
            f"{temperature}), or use a curvature above {float(-temperature / v.max()):.6g}."
        )
    log_z = -0.5 * torch.log1p(a * v) + (b * m + 0.5 * v * b.square() - 0.5 * a * m.square()) / narrowing
    log_weights = mixture.log_weights + log_z.sum(-1)
    tilted = GaussianMixture(log_weights, (m + v * b) / narrowing, v / narrowing)
    return tilted, log_weights.logsumexp(-1) + reward.constant / temperature


def expected_reward(mixture: GaussianMixture, reward: QuadraticReward) -> Tensor:
    """E[r(x)] under the mixture, shaped as its batch ([] for one)."""
    m, v = mixture.means, mixture.variances
    a, b = reward.curvature.to(m.device), reward.linear.to(m.device)
    component = (b * m - 0.5 * a * (m.square() + v)).sum(-1)
    return (mixture.weights * component).sum(-1) + reward.constant


def tilt_divergence(mixture: GaussianMixture, reward: QuadraticReward, temperature: float = 1.0) -> Tensor:
    """KL(p* || p) = E*[r] / temperature - log Z in nats, shaped as the batch ([] for one); errors as in `tilt`."""
    tilted, log_z = tilt(mixture, reward, temperature)
    return expected_reward(tilted, reward) / temperature - log_z


def posterior(mixture: GaussianMixture, x_t: Tensor, alpha: float, sigma: float) -> GaussianMixture:
    """p(x0 | x_t) for each noisy point x_t = alpha x0 + sigma eps.

    Takes one mixture (no batch) and x_t [R, D]; returns a batch [R] of mixtures.  alpha = 0 gives back the mixture
    itself, sigma = 0 point masses.

    Raises:
        ValueError: for a wrong shape, or where neither noise nor the mixture gives x_t a density.
    """
    if x_t.ndim != 2 or x_t.shape[-1] != mixture.dimension or mixture.log_weights.ndim != 1:
        raise ValueError(
            f"posterior takes one mixture and points [R, {mixture.dimension}]; got points {list(x_t.shape)} and "
            f"log_weights {list(mixture.log_weights.shape)}"
        )
    noised = mixture.noised(alpha, sigma)
    gain = alpha * mixture.variances / noised.variances
    residual = x_t.double().unsqueeze(-2) - noised.means
    variances = mixture.variances * (sigma**2 / noised.variances)
    return GaussianMixture(noised.component_log_prob(x_t), mixture.means + gain * residual, variances)


def value(
    mixture: GaussianMixture,
    reward: QuadraticReward,
    x_t: Tensor,
    alpha: float,
    sigma: float,
    temperature: float = 1.0,
) -> Tensor:
    """V(x_t) = log E[exp(r(x0) / temperature) | x_t], float64 [R], for x_t [R, D]; r / temperature at sigma = 0."""
    return tilt(posterior(mixture, x_t, alpha, sigma), reward, temperature)[1]


@dataclass(eq=False)
class GaussianMixtureDenoiser:
    """The perfect `Denoiser` of a mixture, whatever the prompt.  A latent is a point [D].

    Attributes:
        mixture: the law of clean data (no batch).
        schedule: any schedule.
        prompts: one per row; they name the random streams and nothing else.
        seed: of the initial latents.
        checkpointing: ignored, there is nothing to keep.
        evaluations: latents denoised so far.
    """

    mixture: GaussianMixture
    schedule: NoiseSchedule
    prompts: list[str]
    seed: int = 0
    checkpointing: bool = False
    evaluations: float = field(default=0.0, init=False)

    @property
    def evaluations_per_row(self) -> float:
        """One evaluation per latent."""
        return 1.0

    @property
    def steps(self) -> int:
        """Number of levels."""
        return self.schedule.steps

    def initial(self, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Latents [B, D] at level 0, float64, each from the stream "initial" of its row or from its generator.

        Drawn from the exact law of level 0 (alpha x0 + sigma eps; pure noise where alpha = 0), so that a run has no error
        from its start.  This choice is ours: pipelines take pure noise at every schedule.
        """
        alpha, sigma = self.schedule.coefficients(0)
        if generators is None:
            streams = RandomStreams.for_prompts(self.seed, self.prompts)
            generators = [streams.generator(row, "initial") for row in range(len(self.prompts))]
        rows = []
        for generator in generators:
            eps = torch.randn(self.mixture.dimension, generator=generator).to(self.mixture.means)
            x0 = self.mixture.sample(1, generator)[0] if alpha > 0 else 0.0
            rows.append(alpha * x0 + sigma * eps)
        return torch.stack(rows) if rows else self.mixture.means.new_empty(0, self.mixture.dimension)

    def predict(self, x: Tensor, level: int, rows: Tensor | None = None) -> Prediction:
        """The posterior mean and its noise for x [R, D], computed in float64 and returned in x's dtype.

        `rows` does not matter here.  Flow schedules also get the velocity eps - x0.

        Raises:
            ValueError: at the clean level, or for a wrong shape.
        """
        alpha, sigma = self.schedule.coefficients(level)
        if level == self.schedule.steps:
            raise ValueError(f"level {level} is clean and needs no prediction; denoise levels 0 to {level - 1}")
        self.evaluations += len(x) * self.evaluations_per_row
        x0 = posterior(self.mixture, x, alpha, sigma).mean
        eps = (x.double() - alpha * x0) / sigma
        velocity = (eps - x0).to(x) if self.schedule.is_flow else None
        return Prediction(x, x0.to(x), eps.to(x), velocity)

    def follow(
        self,
        rows: Tensor | None = None,
        generators: Sequence[torch.Generator] | None = None,
        start: Tensor | None = None,
    ) -> Iterator[tuple[Prediction | None, Tensor]]:
        """The probability-flow ODE, by Euler steps."""
        x = self.initial(generators) if start is None else start
        for level in range(self.steps):
            prediction = self.predict(x, level)
            x = ODE()(prediction, self.schedule, level, level + 1).center
            yield prediction, x

    def decode(self, x0: Tensor, rows: Tensor | None = None) -> Tensor:
        """The identity: a toy point [R, D] is its own "image" (no range [0, 1] here), and rewards judge it directly."""
        return x0

"""Values made of a reward of clean images: what an estimate of the clean latents would score.

V(x_t) = lambda log E[exp(r(x0) / lambda) | x_t] is what guidance needs; each estimator replaces p(x0 | x_t):

- `Tweedie`: by its mean.  Free where the denoiser's prediction is at hand, biased at noisy levels, where the mean is a blur.
- `Smoothed`: by a Gaussian around its mean, of the spread sigma / sqrt(alpha^2 + sigma^2) that standard normal data would
  have (loss-guided diffusion, LGD, ICML 2023), scaled by `spread`.
- `Lookahead`: by the end of a probability-flow ODE with `steps` steps from x_t: the last level is a clean sample, the price
  is a denoiser evaluation per step.  The steps may be taken by another pipeline over the same latents, or with an adapter
  (an LCM or turbo LoRA) of the denoiser's own switched on.

`EstimatedValue` is a `core.denoiser.Value` of any of them.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rsm_guidance.core.denoiser import Denoiser, Reward
from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import ode
from rsm_guidance.engine.families import denoisers_of
from rsm_guidance.rewards import Composite, name_of
from rsm_guidance.values.drm import DiffusionRewardModel


@dataclass(frozen=True)
class DRMValue:
    """A diffusion reward model at the noise level of the latents; costs its share of the denoiser's depth.

    `grid` has the rows and columns of packed latents, where they are packed.
    """

    drm: DiffusionRewardModel
    denoiser: Denoiser
    ledger: Ledger
    grid: tuple[int, int] | None = None
    reward_calls_per_row = 0
    reads_prediction = False

    @property
    def evaluations_per_row(self) -> float:
        return self.drm.depth_share

    @property
    def name(self) -> str:
        return self.drm.name

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        self.ledger.charge_value(len(x), self.drm.depth_share)
        prompts = [self.denoiser.prompts[r] for r in rows.tolist()]
        if level == self.denoiser.steps:  # clean, whatever the scheduler
            return self.drm.score(x, 0.0, prompts, grid=self.grid)
        return self.drm.score(x, level, prompts, self.denoiser.schedule, self.grid)


@dataclass(frozen=True)
class Tweedie:
    """The posterior mean: one denoiser evaluation and one decode per latent."""


@dataclass(frozen=True)
class Smoothed:
    """The posterior mean and `samples` - 1 Gaussian neighbours: one denoiser evaluation and `samples` decodes per latent.

    Attributes:
        samples: points in all, >= 2; candidates of one image share their offsets.
        spread: factor on the standard deviation, > 0.
        temperature: lambda > 0 of the mean of exp(r / lambda); infinity takes the plain mean.
    """

    samples: int = 4
    spread: float = 1.0
    temperature: float = math.inf

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise ValueError(f"samples must be at least 2 (one is the mean itself: Tweedie); got {self.samples}")
        for name in ("spread", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive; got {getattr(self, name)}")


@dataclass(frozen=True)
class Lookahead:
    """The end of an ODE of `steps` >= 1 steps: as many denoiser evaluations and one decode per latent.

    Attributes:
        steps: of the ODE; 1 is Tweedie.
        pipe: a diffusers pipeline over the same latents that takes the steps; None is the one that is guided.
        adapter: name of a LoRA adapter, loaded into the guided pipeline, that is switched on for the steps.
    """

    steps: int = 2
    pipe: Any = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1; got {self.steps}")
        if self.pipe is not None and self.adapter is not None:
            raise ValueError("pass a pipe or an adapter to look ahead with, not both")


Estimator = Tweedie | Smoothed | Lookahead
ESTIMATORS: dict[str, type[Estimator]] = {"tweedie": Tweedie, "smoothed": Smoothed, "lookahead": Lookahead}


@dataclass(frozen=True)
class EstimatedValue:
    """A reward of estimated clean latents.

    Attributes:
        denoiser: the model that is guided.
        reward: judge of images.
        ledger: where reward calls are booked.
        estimator: how clean latents are estimated.
        streams: random numbers of `Smoothed`.
        scout: the denoiser that looks ahead, on the same levels; None is `denoiser`.
        adapter: makes the context in which the scout's adapter is on.
    """

    denoiser: Denoiser
    reward: Reward
    ledger: Ledger
    estimator: Estimator = Tweedie()
    streams: RandomStreams | None = None
    scout: Denoiser | None = None
    adapter: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def reads_prediction(self) -> bool:
        """Whether the guided denoiser's prediction is the first step of the estimate."""
        return self.scout is None

    @property
    def evaluations_per_row(self) -> float:
        steps = self.estimator.steps if isinstance(self.estimator, Lookahead) else 1
        return steps * (self.scout or self.denoiser).evaluations_per_row

    @property
    def reward_calls_per_row(self) -> int:
        return self.estimator.samples if isinstance(self.estimator, Smoothed) else 1

    @property
    def name(self) -> str:
        return name_of(self.reward)

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        if level == self.denoiser.steps:
            return self._judge(x, level, rows)
        if isinstance(self.estimator, Lookahead):
            return self._judge(self._ahead(self.estimator.steps, x, level, rows, prediction), level, rows)
        mean = (prediction or self.denoiser.predict(x, level, rows)).x0
        if isinstance(self.estimator, Tweedie):
            return self._judge(mean, level, rows)
        return self._smooth(self.estimator, mean, level, rows)

    def _judge(self, x0: Tensor, level: int, rows: Tensor) -> Tensor:
        reward = self.reward
        if isinstance(reward, Composite):
            reward = reward.at(level / self.denoiser.steps)
        self.ledger.reward_calls += len(x0)
        images = self.denoiser.decode(x0, rows)
        prompts = [self.denoiser.prompts[r] for r in rows.tolist()]
        if self.denoiser.checkpointing and images.requires_grad:
            kept: Tensor = checkpoint(reward, images, prompts, use_reentrant=False)
            return kept
        return reward(images, prompts)

    def _ahead(self, steps: int, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None) -> Tensor:
        scout, schedule = self.scout or self.denoiser, self.denoiser.schedule
        stops = torch.linspace(level, schedule.steps, min(steps, schedule.steps - level) + 1).round().long().tolist()
        if not self.reads_prediction:
            prediction = None
        with self.adapter():
            for at, target in zip(stops[:-1], stops[1:], strict=True):
                prediction = prediction or scout.predict(x, at, rows)
                x = prediction.x0 if target == schedule.steps else ode(prediction, schedule, at, target).mean
                prediction = None
        return x

    def _smooth(self, config: Smoothed, mean: Tensor, level: int, rows: Tensor) -> Tensor:
        assert self.streams is not None
        alpha, sigma = self.denoiser.schedule.coefficients(level)
        width = config.spread * sigma / math.hypot(alpha, sigma)
        points = [mean]
        for i in range(1, config.samples):
            offsets = {r: self.streams.normal(r, mean.shape[1:], "smooth", level, i) for r in rows.unique().tolist()}
            points.append(mean + width * torch.stack([offsets[r] for r in rows.tolist()]).to(mean))
        scores = self._judge(torch.cat(points), level, rows.repeat(config.samples)).view(config.samples, len(mean))
        if math.isinf(config.temperature):
            return scores.mean(0)
        tilted = (scores.double() / config.temperature).logsumexp(0) - math.log(config.samples)
        return config.temperature * tilted


@contextmanager
def adapter_on(pipe: DiffusionPipeline, name: str) -> Iterator[None]:
    """Switch one LoRA adapter of a pipeline's denoiser on, and back to what was active.

    Raises:
        ValueError: if the denoiser has no such adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import, and rarely needed

    modules = [m for denoiser in denoisers_of(pipe).values() for m in denoiser.modules()]
    layers = [m for m in modules if isinstance(m, BaseTunerLayer) and name in m._get_available_adapters()]
    if not layers:
        raise ValueError(f"the pipeline has no adapter {name!r}; load_lora_weights(..., adapter_name={name!r}) first")
    before = [(m, list(m.active_adapters), m.disable_adapters) for m in layers]
    try:
        for layer in layers:
            layer.enable_adapters(True)
            layer.set_adapter([name], inference_mode=True)
        yield
    finally:
        for layer, active, disabled in before:
            layer.set_adapter(active, inference_mode=True)
            layer.enable_adapters(not disabled)

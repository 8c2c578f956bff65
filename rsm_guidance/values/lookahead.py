"""The reward at the end of a probability-flow ODE from the noisy latents: a clean sample, at an evaluation per step.

The steps may be taken by another pipeline over the same latents, or with an adapter (an LCM or turbo LoRA) of the guided
denoiser switched on.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.contracts import Denoiser, UsageError
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import ODE
from rsm_guidance.rewards import RowReward
from rsm_guidance.values.base import EstimatedValue


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

    def value(self, denoiser: Any, reward: RowReward, streams: RandomStreams) -> "LookaheadValue":
        """The value; a `pipe` or an `adapter` needs the denoiser of a pipeline.

        Raises:
            UsageError: if the other pipeline has other latents or levels.
        """
        if self.pipe is None and self.adapter is None:
            return LookaheadValue(denoiser, reward, self.steps)
        on = nullcontext if self.adapter is None else partial(adapter_on, denoiser.pipe, self.adapter)
        return LookaheadValue(denoiser, reward, self.steps, _scout(denoiser, self.pipe), on)


@dataclass(frozen=True)
class LookaheadValue(EstimatedValue):
    """r of the end of the ODE.

    Attributes:
        steps: of the ODE.
        scout: the denoiser that takes them, on the same levels; None is the guided one.
        adapter: makes the context in which the scout's adapter is on.
    """

    steps: int
    scout: Denoiser | None = None
    adapter: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def reads_prediction(self) -> bool:
        """Whether the guided denoiser's prediction is the first step of the estimate."""
        return self.scout is None

    @property
    def evaluations_per_row(self) -> float:
        return self.steps * (self.scout or self.denoiser).evaluations_per_row

    def _estimate(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None) -> Tensor:
        scout, schedule = self.scout or self.denoiser, self.denoiser.schedule
        steps = min(self.steps, schedule.steps - level)
        stops = torch.linspace(level, schedule.steps, steps + 1).round().long().tolist()
        if not self.reads_prediction:
            prediction = None
        with (
            self.adapter(),
            getattr(scout, "aside", nullcontext)(),
        ):  # no steps of the run: callbacks do not hear of them
            for at, target in zip(stops[:-1], stops[1:], strict=True):
                prediction = prediction or scout.predict(x, at, rows)
                x = prediction.x0 if target == schedule.steps else ODE()(prediction, schedule, at, target).center
                prediction = None
        return self._score(x, level, rows)


def _scout(denoiser: Any, pipe: Any) -> Any:
    """The denoiser that looks ahead, over the same call and levels."""
    scout = denoiser.over(pipe)
    with torch.no_grad():
        ours, theirs = denoiser.schedule, scout.schedule
        shapes = [list(d.initial().shape) for d in (denoiser, scout)]
    if ours.steps != theirs.steps or not torch.allclose(ours.sigma, theirs.sigma, atol=1e-4) or shapes[0] != shapes[1]:
        raise UsageError(
            f"{type(scout.pipe).__name__} cannot look ahead for {type(denoiser.pipe).__name__}: its latents {shapes[1]} or "
            f"noise levels differ from {shapes[0]}; use a pipeline of the same family, and give it the same scheduler"
        )
    return scout


@contextmanager
def adapter_on(pipe: Any, name: str) -> Iterator[None]:
    """Switch one LoRA adapter of a pipeline's denoiser on, and back to what was active.

    Raises:
        UsageError: if the denoiser has no such adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer  # slow to import, and rarely needed

    from rsm_guidance.engine.families import denoisers_of

    modules = [m for denoiser in denoisers_of(pipe).values() for m in denoiser.modules()]
    layers = [m for m in modules if isinstance(m, BaseTunerLayer) and name in m._get_available_adapters()]
    if not layers:
        raise UsageError(f"the pipeline has no adapter {name!r}; load_lora_weights(..., adapter_name={name!r}) first")
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

"""The one meter: wrappers that book every evaluation of a denoiser, a value or a reward in a ledger."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.contracts import Denoiser, Reward, Value
from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.schedule import NoiseSchedule, Prediction


@dataclass(eq=False)
class MeteredDenoiser:
    """A denoiser whose evaluations and decodes are booked."""

    inner: Denoiser
    ledger: Ledger

    @contextmanager
    def _booked(self) -> Iterator[None]:
        before = self.inner.evaluations
        try:
            yield
        finally:
            self.ledger.denoiser_evaluations += self.inner.evaluations - before

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)  # what denoisers of pipelines have besides: pipe, token_grid

    def over(self, pipe: Any) -> "MeteredDenoiser":
        """The denoiser of another pipeline for the same call, on the same meter."""
        other: Any = self.inner
        return MeteredDenoiser(other.over(pipe), self.ledger)

    @property
    def prompts(self) -> list[str]:
        return self.inner.prompts

    @property
    def checkpointing(self) -> bool:
        return self.inner.checkpointing

    @checkpointing.setter
    def checkpointing(self, on: bool) -> None:
        self.inner.checkpointing = on

    @property
    def evaluations(self) -> float:
        return self.inner.evaluations

    @property
    def schedule(self) -> NoiseSchedule:
        return self.inner.schedule

    @property
    def evaluations_per_row(self) -> float:
        return self.inner.evaluations_per_row

    @property
    def steps(self) -> int:
        return self.inner.steps

    def initial(self, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        with self._booked():
            return self.inner.initial(generators)

    def follow(
        self,
        rows: Tensor | None = None,
        generators: Sequence[torch.Generator] | None = None,
        start: Tensor | None = None,
    ) -> Iterator[tuple[Prediction | None, Tensor]]:
        run = self.inner.follow(rows, generators, start)
        while True:
            with self._booked():
                step = next(run, None)
            if step is None:
                return
            yield step

    def predict(self, x: Tensor, level: int, rows: Tensor | None = None) -> Prediction:
        with self._booked():
            return self.inner.predict(x, level, rows)

    def decode(self, x0: Tensor, rows: Tensor | None = None) -> Tensor:
        self.ledger.decodes += len(x0)
        return self.inner.decode(x0, rows)


@dataclass(eq=False)
class MeteredReward:
    """A reward whose calls are booked, and its share of the denoiser."""

    inner: Reward
    ledger: Ledger

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def differentiable(self) -> bool | None:
        return self.inner.differentiable

    @property
    def requires(self) -> tuple[str, ...]:
        return self.inner.requires

    @property
    def share(self) -> float:
        return self.inner.share

    def at(self, progress: float) -> "MeteredReward":
        """What counts at a share of the run, in [0, 1]."""
        narrowed = getattr(self.inner, "at", None)
        return self if narrowed is None else MeteredReward(narrowed(progress), self.ledger)

    def __call__(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        self.ledger.reward_calls += len(images)
        if self.share:
            self.ledger.charge_value(len(images), self.share)
        return self.inner(images, prompts, **columns)


@dataclass(eq=False)
class MeteredValue:
    """A value whose own model's evaluations are booked; what it asks of a metered denoiser or reward, these book."""

    inner: Value
    ledger: Ledger

    @property
    def name(self) -> str:
        return str(getattr(self.inner, "name", type(self.inner).__name__))

    @property
    def share(self) -> float:
        return self.inner.share

    @property
    def evaluations_per_row(self) -> float:
        return self.inner.evaluations_per_row

    @property
    def reads_prediction(self) -> bool:
        return self.inner.reads_prediction

    @property
    def reward_calls_per_row(self) -> int:
        return self.inner.reward_calls_per_row

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        if self.share:
            self.ledger.charge_value(len(x), self.share)
        return self.inner(x, level, rows, prediction)

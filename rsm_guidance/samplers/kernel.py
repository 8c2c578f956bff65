"""The contract between a sampling method and its driver.

A method is a frozen dataclass that is its own configuration.  A *kernel* makes a `State` (`init`) and takes it from level to
level (`step`), saying in an `Info` what it saw.  A method with an outer loop writes `solve` itself, a generator of `Info`
that returns a `Result`.  Everything else (deadline, Ctrl-C, budget, progress, trace, best so far) is the driver's: `run`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.samplers.task import Task


@dataclass(frozen=True)
class State:
    """The population between two levels, K candidates for each of B prompts.

    Attributes:
        x: latents [B * K, ...], prompt-major.
        k: K.
        x0: estimates [B * K, ...] of the clean latents, from the step that led here; None at the start.
        prediction: the denoiser's at x, where a value has read it already.
        log_weights: float64 [B, K] since the last resampling, for weighted methods.
        log_normalizer: float64 [B], log of the product of mean weights so far.
        carried: quantities [B, K] that follow their candidate through resampling.
        opening: what was seen while the population was made, if candidates competed then.
    """

    x: Tensor
    k: int = 1
    x0: Tensor | None = None
    prediction: Prediction | None = None
    log_weights: Tensor = field(default_factory=lambda: torch.empty(0))
    log_normalizer: Tensor = field(default_factory=lambda: torch.empty(0))
    carried: dict[str, Tensor] = field(default_factory=dict)
    opening: "Info | None" = None


@dataclass(frozen=True)
class Particles:
    """All finished particles of one prompt: sum_k exp(log_weights_k) f(latents_k) estimates E*[f] under the tilted law.

    Attributes:
        latents: clean latents [K, ...].
        rewards: float64 [K].
        log_weights: float64 [K], normalised: the weights sum to one.
    """

    latents: Tensor
    rewards: Tensor
    log_weights: Tensor

    @property
    def mean_reward(self) -> float:
        """The weighted mean of the rewards, an estimate of E*[r]."""
        return float((self.log_weights.exp() * self.rewards).sum())


@dataclass(frozen=True)
class Result:
    """What a method returns.

    Attributes:
        latents: clean latents [B, ...].
        rewards: float64 [B], or None where they have not been scored.
        log_normalizer: float64 [B], estimate of log E[exp(r / lambda)], or None without one.
        particles: those of every prompt [B], for weighted methods that have come to their end; else None.
        sections: further sections of the trace.
    """

    latents: Tensor
    rewards: Tensor | None = None
    log_normalizer: Tensor | None = None
    particles: list[Particles] | None = None
    sections: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Info:
    """What one step saw.

    Attributes:
        level: where the step started; N after the images of a round were scored.
        x0: estimate [B, ...] of the clean latents, shown to the caller and returned if the run is cut off here; None where
            there is none yet.
        scores: [B, K] of the candidates that were compared, or None.
        at: the level of these candidates.
        record: further entries of the trace, tensors or JSON.
        section: of the trace, to which all of this is added.
        so_far: what is returned instead of x0 if the run is cut off here.
        silent: nothing is shown.
    """

    level: int
    x0: Tensor | None
    scores: Tensor | None = None
    at: int | None = None
    record: dict[str, Any] = field(default_factory=dict)
    section: str = "levels"
    so_far: Callable[[], Result] | None = None
    silent: bool = False

    def entry(self) -> dict[str, Any]:
        """The entry of the trace, JSON-serialisable; empty where there is nothing to tell."""
        record = {k: v.tolist() if isinstance(v, Tensor) else v for k, v in self.record.items()}
        scores = {} if self.scores is None else {"scores": self.scores.tolist()}
        return {"level": self.level if self.at is None else self.at, **scores, **record} if record or scores else {}


Solution = Generator[Info, None, Result]


@dataclass
class SamplerOutput:
    """The result of one sampling run.

    Attributes:
        latents: clean latents [B, ...].
        rewards: float64 [B] of the final scores, or None without any.
        log_normalizer: float64 [B], estimate of log E[exp(r / lambda)] per prompt, or None where the sampler gives none.
        particles: all finished particles of every prompt [B] with their weights, from weighted methods; else None.  The
            latents themselves carry no weight: a method that samples has drawn them by weight already.
        ledger: what was spent.
        trace: JSON-serialisable record of every candidate, score and choice.
    """

    latents: Tensor
    rewards: Tensor | None
    log_normalizer: Tensor | None
    particles: list[Particles] | None
    ledger: Ledger
    trace: dict[str, Any]


class Sampler(ABC):
    """A sampling method: a frozen dataclass that is its own configuration.

    Attributes:
        name: by which users choose it.
        budget_field: the field that a larger budget raises, or None.
        least: its smallest value.
        adaptive: whether it minds the budget itself, because its cost depends on the values it meets.
        transition: how to step.
    """

    name: ClassVar[str]
    budget_field: ClassVar[str | None] = None
    least: ClassVar[int] = 1
    adaptive: ClassVar[bool] = False
    transition: Transition

    def check(self, task: Task) -> None:  # noqa: B027 - most methods need nothing
        """Raise a ValueError if a task lacks what the method needs."""

    @abstractmethod
    def solve(self, task: Task) -> Solution:
        """Solve a task step by step."""

    @property
    def stepping(self) -> Transition:
        """The transition that is really used."""
        return self.transition

    @property
    def target(self) -> str | None:
        """The law that returned latents follow in the limit of many particles; None for methods that maximise."""
        return None

    def described(self) -> dict[str, Any]:
        """Name and settings, JSON-serialisable."""
        own = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]
        return {"name": self.name, **own, "transition": str(self.stepping)}


def _plain(value: Any) -> Any:
    if isinstance(value, Transition):
        return str(value)
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return list(value) if isinstance(value, tuple) else value


class Kernel(Sampler):
    """A method that goes through the levels once, from noise to clean."""

    @abstractmethod
    def init(self, task: Task) -> State:
        """The population at the noisiest level."""

    @abstractmethod
    def step(self, task: Task, state: State, jump: tuple[int, int]) -> tuple[State, Info]:
        """Take the population over the levels `jump` = (from, to)."""

    def finish(self, task: Task, state: State) -> Result:
        """Choose among the finished population: the best of each prompt by its final score."""
        return best_of(task, state.x, state.k)

    def narrowed(self, task: Task, state: State) -> State:
        """One candidate per prompt that goes on unguided, where the budget ends guidance."""
        known = None if state.k > 1 else state.prediction
        return State(first_of(state.x, state.k), 1, None, known)

    def solve(self, task: Task) -> Solution:
        state, jumps = self.init(task), self.transition.jumps(task.schedule)
        guided = task.steps if task.guided_levels is None else task.guided_levels
        if state.opening is not None:
            yield state.opening
        for jump in jumps:
            if jump[0] < guided:
                state, info = self.step(task, state, jump)
            else:
                state, info = self.unguided(task, self.narrowed(task, state), jump)
            yield info
        return self.finish(task, state) if guided >= task.steps else Result(state.x)

    def unguided(self, task: Task, state: State, jump: tuple[int, int]) -> tuple[State, Info]:
        """One step of every candidate by itself."""
        prediction = state.prediction or task.predict(state.x, jump[0], task.rows_of(state.k))
        step = task.step(self.transition, prediction, jump, state.k)
        state = replace(state, x=step.next, x0=prediction.x0, prediction=None)
        return state, Info(jump[0], first_of(prediction.x0, state.k))


def first_of(x: Tensor, k: int) -> Tensor:
    """The first candidates [B, ...] of a population [B * K, ...]."""
    return x if k == 1 else x[::k]


def table(values: Tensor, k: int) -> Tensor:
    """Values [B * K] of a population as [B, K]."""
    return values.view(-1, k)


def grouped(x: Tensor, k: int) -> Tensor:
    """A population [B * K, ...] as [B, K, ...]."""
    return x.view(-1, k, *x.shape[1:])


def pick(x: Tensor, index: Tensor, k: int) -> Tensor:
    """Candidates index [B, M] (or [B]) of a population [B * K, ...], as [B * M, ...]."""
    return x[places(index, k)]


def places(index: Tensor, k: int) -> Tensor:
    """Places [B * M] in a population [B * K, ...] of its candidates index [B, M] (or [B])."""
    index = index if index.ndim == 2 else index[:, None]
    return (torch.arange(len(index))[:, None] * k + index).flatten()


def best_of(task: Task, x: Tensor, k: int) -> Result:
    """The best of finished latents [B * K, ...] for each prompt by their final scores."""
    if k == 1:
        return Result(x)
    scores = task.final_scores(x, task.rows_of(k))
    if scores is None:
        return Result(first_of(x, k))
    rewards = table(scores, k)
    best, chosen = rewards.max(1)
    return Result(pick(x, chosen, k), best, sections={"candidates": candidates_of(rewards, chosen)})


def tilted_law(transition: Transition) -> str:
    """What a method that is exact for its chain samples under a transition."""
    law = "p(x) exp(r(x) / temperature) / Z"
    if transition.keeps_marginals:
        return law
    return f"{law} with the p of this chain: {transition} does not keep the model's marginals"


def candidates_of(rewards: Tensor, chosen: Tensor, log_weights: Tensor | None = None) -> dict[str, Any]:
    """The trace's account of finished candidates: rewards [B, K], which was returned [B], and weights [B, K] if any."""
    weights = {} if log_weights is None else {"log_weights": log_weights.tolist()}
    return {"rewards": rewards.tolist(), **weights, "chosen": chosen.tolist()}


def require(sampler: Sampler, task: Task, value: bool = False) -> None:
    """Raise a ValueError if a task has nothing to compare candidates with, or, if asked for, no `value` of noisy latents."""
    if value and task.value is None:
        raise ValueError(
            f"the sampler {sampler.name!r} scores noisy latents: pass a diffusion reward model, or a reward, which is then "
            "applied to the decoded estimate"
        )
    if not task.can_score:
        raise ValueError(f"the sampler {sampler.name!r} compares candidates: pass a reward or a value model")


def check_window(window: tuple[float, float]) -> None:
    """Raise a ValueError unless a window of noise levels is (low, high) with 0 <= low < high <= 1."""
    if not 0 <= window[0] < window[1] <= 1:
        raise ValueError(f"window must be (low, high) with 0 <= low < high <= 1; got {window}")


def in_window(window: tuple[float, float], schedule: NoiseSchedule, level: int) -> bool:
    """Whether a level lies in a window of noise levels, as fractions of the noisiest sigma."""
    return window[0] <= float(schedule.sigma[level] / schedule.sigma[0]) <= window[1]


def at_least(sampler: Any, least: int, *names: str) -> None:
    """Raise a ValueError unless fields are at least so large."""
    for name in names:
        if getattr(sampler, name) < least:
            raise ValueError(f"{name} must be at least {least}; got {getattr(sampler, name)}")


def finite(sampler: Any, *names: str, positive: bool = False) -> None:
    """Raise a ValueError unless fields are finite and at least 0, or above it."""
    for name in names:
        value = getattr(sampler, name)
        if not (0 < value if positive else 0 <= value) or value == float("inf"):
            words = "positive and finite" if positive else "finite and at least 0"
            raise ValueError(f"{name} must be {words}; got {value}")


def one_of(sampler: Any, **known: tuple[str, ...]) -> None:
    """Raise a ValueError unless fields have one of their known values."""
    for name, values in known.items():
        if getattr(sampler, name) not in values:
            raise ValueError(f"{name} must be one of {', '.join(values)}; got {getattr(sampler, name)!r}")


def share(sampler: Any, *names: str) -> None:
    """Raise a ValueError unless fields are shares in (0, 1]."""
    for name in names:
        if not 0 < getattr(sampler, name) <= 1:
            raise ValueError(f"{name} is a share in (0, 1]; got {getattr(sampler, name)}")

"""Rewards: objects or plain functions `(images [B, 3, H, W] in [0, 1], prompts, **columns) -> scores [B]`, higher is better."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.contracts import Reward, UsageError


class RewardError(UsageError):
    """A reward or value returned something that cannot be ranked."""


@dataclass(frozen=True)
class ScoreDistribution:
    """What a reward that returns distributions says of B images: mean and variance, [B] each."""

    mean: Tensor
    variance: Tensor


@dataclass(frozen=True)
class FunctionReward:
    """A plain function as a `Reward`; it may carry the attributes of one itself.

    Columns that the function does not name in `requires` are not passed to it.
    """

    function: Callable[..., Any]

    @property
    def name(self) -> str:
        return name_of(self.function)

    @property
    def differentiable(self) -> bool | None:
        return getattr(self.function, "differentiable", None)

    @property
    def requires(self) -> tuple[str, ...]:
        return tuple(getattr(self.function, "requires", ()))

    @property
    def share(self) -> float:
        return float(getattr(self.function, "share", 0.0))

    @property
    def reads_prompt(self) -> bool:
        return bool(getattr(self.function, "reads_prompt", False))

    def __call__(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        scores: Tensor = self.function(images, prompts, **{name: columns[name] for name in self.requires})
        return scores


@dataclass(frozen=True)
class RowReward:
    """A reward that knows the prompt and the columns of every row of a run.

    Attributes:
        reward: of images.
        prompts: of rows [B].
        columns: what the reward requires besides, B entries each.
    """

    reward: Reward
    prompts: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.reward.name

    def at(self, progress: float) -> "RowReward":
        """What counts at a share of the run, in [0, 1]."""
        narrowed = getattr(self.reward, "at", None)
        return self if narrowed is None else replace(self, reward=narrowed(progress))

    def __call__(self, images: Tensor, rows: Tensor) -> Tensor:
        """Scores [R] of images [R, 3, H, W] of rows [R]."""
        index = rows.tolist()
        columns = {name: [self.columns[name][r] for r in index] for name in self.reward.requires}
        return self.reward(images, [self.prompts[r] for r in index], **columns)


def as_reward(reward: Any) -> Reward:
    """A reward object as it is, a plain function as a reward object.

    Raises:
        UsageError: for anything else.
    """
    if all(hasattr(reward, name) for name in ("name", "differentiable", "requires", "share")):
        found: Reward = reward
        return found
    if callable(reward):
        try:
            inspect.signature(reward).bind([], [], **dict.fromkeys(getattr(reward, "requires", ())))
        except TypeError as error:
            raise UsageError(
                f"{name_of(reward)} cannot be called with (images, prompts), as a reward is: {error}"
            ) from error
        except ValueError:  # a builtin that tells nothing of its arguments
            pass
        return FunctionReward(reward)
    raise UsageError(
        f"a reward is a name, a function (images, prompts) -> scores or a model; got {type(reward).__name__}"
    )


def check_rows(reward: Reward, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> None:
    """Raise a UsageError for prompts and columns that a reward cannot score: before anything is drawn for them.

    The columns that it requires must be there with one entry for each prompt; a reward may have a `check(prompts, columns)` of
    its own besides.
    """
    for name in reward.requires:
        if name not in columns:
            raise UsageError(
                f"the reward {reward.name} needs the column {name!r} for every prompt; pass reward_columns={{{name!r}: [...]}}, "
                "or a .jsonl file of prompts that has it"
            )
        if len(columns[name]) != len(prompts):
            raise UsageError(
                f"the column {name!r} has {len(columns[name])} entries for {len(prompts)} images; give one each"
            )
        lacking = next((p for p, v in zip(prompts, columns[name], strict=True) if v is None), None)
        if lacking is not None:
            raise UsageError(f"the reward {reward.name} needs the column {name!r}; the prompt {lacking!r} has none")
    own = getattr(reward, "check", None)
    if own is not None:
        own(list(prompts), {name: list(columns[name]) for name in reward.requires})


def checked_scores(scores: object, count: int, name: str, finite: bool = True) -> Tensor:
    """Scores as a float64 vector [count] on the CPU.

    Raises:
        RewardError: if they are not one number per item or, where asked for, not `finite`, naming the first offender.
    """
    if isinstance(scores, ScoreDistribution):
        scores = scores.mean
    try:
        tensor = torch.as_tensor(scores).detach().double().cpu()  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(f"{name} returned {type(scores).__name__}, not {count} numbers: {error}") from error
    if tensor.shape != (count,):
        raise RewardError(
            f"{name} returned shape {list(tensor.shape)} for {count} images; it must return one score per image, "
            f"shape [{count}]"
        )
    bad = (~tensor.isfinite()).nonzero()
    if finite and len(bad):
        index = int(bad[0])
        raise RewardError(f"{name} returned {float(tensor[index])} for item {index} of {count}; scores must be finite")
    return tensor


def scored(call: Callable[[], object], count: int, name: str, finite: bool = True) -> Tensor:
    """Run a reward and check what it returns; float64 [count].

    What the reward itself raises comes through with its traceback and a note that names the reward.

    Raises:
        RewardError: if it returns anything but one score per item or, where asked for, one that is not `finite`.
    """
    try:
        scores = call()
    except Exception as error:
        if not isinstance(error, UsageError):
            error.add_note(f"{CRASH}{name}")
        raise
    return checked_scores(scores, count, name, finite)


CRASH = "raised while scoring with "


def crashed_in_reward(error: BaseException) -> bool:
    """Whether an error is a programming error inside a reward, whose traceback its author wants to see."""
    return any(note.startswith(CRASH) for note in getattr(error, "__notes__", ()))


def name_of(reward: object) -> str:
    """How error messages and reports call a reward: its function or class name."""
    return getattr(reward, "name", None) or getattr(reward, "__name__", None) or type(reward).__name__

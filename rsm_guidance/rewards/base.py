"""Rewards: plain functions `(images [B, 3, H, W] in [0, 1], prompts) -> scores [B]`, higher is better."""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor


class RewardError(ValueError):
    """A reward or value model returned something that cannot be ranked."""


def checked_scores(scores: object, count: int, name: str) -> Tensor:
    """Scores as a float64 vector [count] on the CPU.

    Raises:
        RewardError: if they are not one finite number per item, naming the first offender.
    """
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
    if len(bad):
        index = int(bad[0])
        raise RewardError(f"{name} returned {float(tensor[index])} for item {index} of {count}; scores must be finite")
    return tensor


def judged(call: Callable[[], object], count: int, name: str) -> Tensor:
    """Run a reward and check what it returns; float64 [count].

    Raises:
        RewardError: if it fails, or returns anything but one finite score per item.
    """
    try:
        scores = call()
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(f"{name} failed: {type(error).__name__}: {error}") from error
    return checked_scores(scores, count, name)


def name_of(judge: object) -> str:
    """How error messages and reports call a reward: its function or class name."""
    return getattr(judge, "name", None) or getattr(judge, "__name__", None) or type(judge).__name__


def import_object(path: str) -> object:
    """The object at "package.module:name".

    Raises:
        ValueError: if the module or the name does not exist.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module), name)
    except Exception as error:  # the module is the user's, and may fail in any way
        raise ValueError(f"cannot import {path!r}: {type(error).__name__}: {error}") from error

"""What was found out about a pipeline by trying, kept with it, so that it is found out once."""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import DiffusionPipeline


@dataclass
class Known:
    """What was found out about calls of one form of a pipeline, so that it is found out once.

    Attributes:
        way: how to ask for other rows; "" where there is none, None before it was tried.
        pictures: how rows of a call with one picture get it: "shared", "each" one of their own, or "mixed", where neither makes
            a row what it is alone; None before it was tried.
        sign: of model outputs, once a step was compared with the scheduler's own; None before.
        distinct: whether `scheduler.step` was seen to be called once per level.
        blends: as in `Surroundings`; None before it was seen.
        moved: whether the call changes the latents between `prepare_latents` and its first step; None before it was seen.
        memory: what the denoiser is given, or makes, at a level that depends on the levels before; "" if there is no such thing,
            None before it was tried.
        together: whether a row is denoised to something else than alone; None before it was tried.
        decoding: how the output is made to images; None before it was tried.
    """

    way: str | None = None
    pictures: str | None = None
    sign: int | None = None
    distinct: bool = False
    blends: bool | None = None
    moved: bool | None = None
    memory: str | None = None
    together: bool | None = None
    decoding: str | None = None


_KNOWN: "weakref.WeakKeyDictionary[DiffusionPipeline, dict[Any, Known]]" = weakref.WeakKeyDictionary()


def known_of(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Known:
    """What is known of calls with the same scheduler and the same kinds of arguments."""
    form = tuple(sorted((name, _kind(value)) for name, value in call.items() if value is not None))
    scheduler = pipe.scheduler
    return _KNOWN.setdefault(pipe, {}).setdefault((type(scheduler), str(dict(scheduler.config)), form), Known())


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}{[_kind(v) for v in value]}"
    return f"{type(value).__name__}{list(value.shape) if hasattr(value, 'shape') else ''}"

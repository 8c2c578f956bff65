"""Short names of packaged models, as strings that are resolved when they are used, and objects by "package.module:name"."""

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rsm_guidance.core.errors import UsageError

MODELS: dict[str, str] = {"shapes": "rsm_guidance.shapes.packaged:MODEL"}
PREFERENCES: dict[str, str] = {"shapes": "rsm_guidance.shapes.preferences:write_preferences"}
"""Data sets that are made when they are asked for, by functions (folder, number of pairs, seed) -> table."""


@dataclass(frozen=True)
class PackagedModel:
    """A pipeline that a package carries.

    Attributes:
        path: its folder.
        call: arguments of the pipeline call with which it was measured.
        prompts: gives a number of prompts to measure it with, or None.
        training_prompts: gives prompts to train on, others than those; or None.
        module: holds component classes of its own, and must be imported before diffusers loads the folder; or None.
    """

    path: str
    call: dict[str, Any] = field(default_factory=dict)
    prompts: Callable[[int], list[str]] | None = None
    training_prompts: Callable[[], list[str]] | None = None
    module: str | None = None

    def location(self) -> str:
        """The folder, ready to be loaded by diffusers."""
        if self.module is not None:
            importlib.import_module(self.module)
        return self.path


def packaged_model(name: str) -> PackagedModel | None:
    """The packaged model of a name, or of the folder in which it lies; None if there is none."""
    if name in MODELS:
        found: PackagedModel = load_object(MODELS[name])
        return found
    return next((m for m in map(load_object, MODELS.values()) if m.path == name), None)


def model_location(name: str) -> str:
    """Where the model of a name lies, ready to be loaded; hub ids and other folders stay what they are."""
    packaged = packaged_model(name)
    return name if packaged is None else packaged.location()


def model_name(location: str) -> str:
    """The short name of a packaged model's folder; other locations stay what they are."""
    return next((name for name, path in MODELS.items() if load_object(path).path == location), location)


def model_prompts(model: str, count: int) -> list[str]:
    """Prompts that a packaged model carries to be measured with.

    Raises:
        UsageError: for other models, which carry none.
    """
    packaged = packaged_model(model)
    if packaged is None or packaged.prompts is None:
        raise UsageError(f"the model {model!r} carries no prompts of its own; give a file of them with --prompts")
    return packaged.prompts(count)


def preference_location(name: str, folder: Path, seed: int) -> str:
    """Where preferences lie: those of "NAME" or "NAME:PAIRS" are made in a folder; other locations stay what they are.

    Raises:
        UsageError: for a number of pairs that is none.
    """
    known, colon, pairs = name.partition(":")
    if known not in PREFERENCES:
        return name
    if colon and not (pairs.isdecimal() and 0 < int(pairs) <= 10**7):
        raise UsageError(f"{name!r} asks for no number of pairs; write {known}:2400")
    count = int(pairs) if colon else 2400
    return str(load_object(PREFERENCES[known])(folder / f"{known}-{count}-{seed}", count, seed))


def load_object(path: str) -> Any:
    """The object at "package.module:name".

    Raises:
        UsageError: if the module or the name does not exist, or the module cannot be imported.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise UsageError(f"{path!r} names no object; write package.module:name")
    try:
        return pkgutil.resolve_name(path)
    except Exception as error:  # the module of a user may raise anything
        raise UsageError(f"cannot import {path!r}: {type(error).__name__}: {error}") from error

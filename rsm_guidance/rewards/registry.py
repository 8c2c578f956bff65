"""Rewards by name: `REWARDS` lists the built-in ones as strings, `resolve_reward` finds any."""

from pathlib import Path
from typing import Any

from rsm_guidance.core.contracts import Reward, UsageError
from rsm_guidance.io.names import load_object
from rsm_guidance.rewards.base import as_reward
from rsm_guidance.rewards.compose import Composite, Term

REWARDS: dict[str, str] = {
    "shapes-drm": "rsm_guidance.shapes.packaged:DRM",
    "shapes-verifier": "rsm_guidance.shapes.reward:shapes_verifier",
    "shapes-correct": "rsm_guidance.shapes.reward:shapes_correct",
}
_LOADER = "rsm_guidance.reward_models.hub:load_reward_model"


def resolve_reward(spec: object, pipe: Any = None) -> Reward:
    """A reward by its specification.

    Args:
        spec: a reward or function, returned as a reward object; a name in `REWARDS`; the folder or hub id of a diffusion
            reward model; "package.module:object"; or several of these with weights, "A + 0.5 * B".
        pipe: a loaded pipeline, whose modules a diffusion reward model on the same backbone shares.

    Raises:
        UsageError: if nothing of that name can be found or loaded.
    """
    if not isinstance(spec, str | Path):
        return as_reward(spec)
    text = str(spec)
    if isinstance(spec, str) and (" + " in text or " * " in text):
        return Composite(tuple(_term(part, pipe) for part in text.split(" + ")))
    found: Any = load_object(REWARDS[text]) if text in REWARDS else spec
    if isinstance(found, Path) or Path(text).is_dir() or (text.count("/") == 1 and ":" not in text):
        try:
            model: Reward = load_object(_LOADER)(str(found), pipe)
        except OSError as error:
            raise UsageError(f"cannot load a diffusion reward model from {text!r}: {error}") from error
        return model
    if not isinstance(found, str):
        return as_reward(found)
    if ":" not in text:
        raise UsageError(
            f"unknown reward {text!r}; choose {', '.join(REWARDS)}, a folder or hub id of a diffusion reward model, or "
            "package.module:object"
        )
    found = load_object(text)
    if not callable(found):
        raise UsageError(f"{text!r} is a {type(found).__name__}, not a function (images, prompts) -> scores")
    return as_reward(found)


def _term(text: str, pipe: Any) -> Term:
    """One weighted reward of "A + 0.5 * B"."""
    weight, times, name = text.rpartition(" * ")
    try:
        factor = float(weight) if times else 1.0
    except ValueError as error:
        raise UsageError(f"{weight!r} in {text!r} is no number; write WEIGHT * REWARD") from error
    return Term(resolve_reward(name.strip(), pipe), factor)

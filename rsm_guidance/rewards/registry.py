"""Rewards by name: `REWARDS` lists the built-in ones as strings, `resolve_reward` finds any."""

from pathlib import Path
from typing import Any

from rsm_guidance.core.contracts import Reward, UsageError
from rsm_guidance.io.config import check_options, read_options, split_outside
from rsm_guidance.io.names import load_object
from rsm_guidance.rewards.base import as_reward
from rsm_guidance.rewards.builtin import BuiltInReward
from rsm_guidance.rewards.compose import Composite, Term

REWARDS: dict[str, str] = {
    "shapes-drm": "rsm_guidance.shapes.packaged:DRM",
    "shapes-verifier": "rsm_guidance.shapes.reward:shapes_verifier",
    "shapes-correct": "rsm_guidance.shapes.reward:shapes_correct",
    "clip-score": "rsm_guidance.rewards.clip_score:ClipScore",
    "pickscore": "rsm_guidance.rewards.pickscore:PickScore",
    "hpsv2": "rsm_guidance.rewards.hpsv2:HPSv2",
    "image-reward": "rsm_guidance.rewards.image_reward:ImageRewardV1",
    "aesthetic": "rsm_guidance.rewards.aesthetic:Aesthetic",
    "vqa": "rsm_guidance.rewards.vqa:VQA",
    "unified": "rsm_guidance.rewards.unified:Unified",
    "remote": "rsm_guidance.rewards.remote:Remote",
    "ocr": "rsm_guidance.rewards.ocr:OCR",
    "compressibility": "rsm_guidance.rewards.compressibility:Compressibility",
    "color": "rsm_guidance.rewards.color:Color",
    "color-histogram": "rsm_guidance.rewards.color_histogram:ColorHistogram",
}
_LOADER = "rsm_guidance.reward_models.hub:load_reward_model"


def resolve_reward(spec: object, pipe: Any = None) -> Reward:
    """A reward by its specification, with its model loaded.

    Args:
        spec: a reward or function, returned as a reward object; a name in `REWARDS`, which may carry options of its own, as
            in "hpsv2:version=v2.0:dtype=bfloat16"; the folder or hub id of a diffusion reward model;
            "package.module:object"; or several of these with weights, "A + 0.5 * B".
        pipe: a loaded pipeline, whose modules a diffusion reward model on the same backbone shares.

    Raises:
        UsageError: if nothing of that name can be found or loaded, or it does not take an option.
    """
    if not isinstance(spec, str | Path):
        return as_reward(spec)
    text = str(spec)
    if isinstance(spec, str) and is_sum(text):
        return Composite(tuple(_term(part, pipe) for part in split_outside(text, " + ")))
    own = built_in(text)
    if own is not None:
        return own.load()
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


def built_in(text: str) -> BuiltInReward | None:
    """The built-in reward of "name:field=value:field=value", with nothing loaded yet; None for any other specification.

    Raises:
        UsageError: if the reward has no such option, or the option no such value.
    """
    name = text.partition(":")[0].strip()
    if name not in REWARDS:
        return None
    cls: Any = load_object(REWARDS[name])
    if not (isinstance(cls, type) and issubclass(cls, BuiltInReward)):
        if ":" in text:
            raise UsageError(f"the reward {name!r} takes no options; got {text!r}")
        return None
    reward: BuiltInReward = cls(**check_options(cls, read_options(text)[1], f"the reward {name!r}"))
    return reward


def is_sum(text: str) -> bool:
    """Whether a specification is of several rewards, or of one with a weight."""
    return any(len(split_outside(text, sign)) > 1 for sign in (" + ", " * "))


def parts_of(text: str) -> list[str]:
    """The specifications in "A + 0.5 * B", without their weights."""
    return [split_outside(part, " * ")[-1].strip() for part in split_outside(text, " + ")]


def _term(text: str, pipe: Any) -> Term:
    """One weighted reward of "A + 0.5 * B"."""
    *weights, name = split_outside(text, " * ")
    weight = " * ".join(weights)
    try:
        factor = float(weight) if weights else 1.0
    except ValueError as error:
        raise UsageError(f"{weight!r} in {text!r} is no number; write WEIGHT * REWARD") from error
    return Term(resolve_reward(name.strip(), pipe), factor)

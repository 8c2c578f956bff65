"""Values: judges of noisy latents; `load_judge` finds a reward or a diffusion reward model by name."""

from functools import lru_cache
from pathlib import Path

from rsm_guidance.core.denoiser import Reward
from rsm_guidance.rewards import REWARDS, Composite, Term, import_object
from rsm_guidance.shapes.model import drm_path
from rsm_guidance.values.drm import DiffusionRewardModel, DRMConfig
from rsm_guidance.values.estimators import (
    ESTIMATORS,
    DRMValue,
    EstimatedValue,
    Estimator,
    Lookahead,
    Smoothed,
    Tweedie,
    adapter_on,
)

Judge = Reward | DiffusionRewardModel
SHAPES_DRM = "shapes-drm"


@lru_cache(maxsize=4)
def _load_drm(name: str) -> DiffusionRewardModel:
    drm: DiffusionRewardModel = DiffusionRewardModel.from_pretrained(drm_path() if name == SHAPES_DRM else name)
    return drm


def load_judge(spec: object) -> Judge:
    """A reward function or diffusion reward model.

    Args:
        spec: a callable or model, returned as it is; a name in `REWARDS`; "shapes-drm"; "package.module:object"; the
            folder or hub id of a diffusion reward model; or several of these with weights, "A + 0.5 * B".

    Raises:
        ValueError: if nothing of that name can be found or loaded.
    """
    if isinstance(spec, DiffusionRewardModel):
        return spec
    if isinstance(spec, str) and (" + " in spec or " * " in spec):
        return Composite(tuple(_term(part) for part in spec.split(" + ")))
    if isinstance(spec, str):
        if spec in REWARDS:
            return REWARDS[spec]
        if spec == SHAPES_DRM or Path(spec).is_dir() or (spec.count("/") == 1 and ":" not in spec):
            try:
                return _load_drm(spec)
            except OSError as error:
                raise ValueError(f"cannot load a diffusion reward model from {spec!r}: {error}") from error
        if ":" in spec:
            found = import_object(spec)
            if callable(found):
                return found
            raise ValueError(f"{spec!r} is a {type(found).__name__}, not a function (images, prompts) -> scores")
        names = ", ".join([SHAPES_DRM, *REWARDS])
        raise ValueError(
            f"unknown reward {spec!r}; choose {names}, a folder or hub id of a diffusion reward model, or "
            "package.module:object"
        )
    if callable(spec):
        return spec
    raise ValueError(
        f"a reward is a name, a function (images, prompts) -> scores or a model; got {type(spec).__name__}"
    )


def _term(text: str) -> Term:
    """One weighted reward of "A + 0.5 * B"."""
    weight, times, name = text.rpartition(" * ")
    try:
        factor = float(weight) if times else 1.0
    except ValueError as error:
        raise ValueError(f"{weight!r} in {text!r} is no number; write WEIGHT * REWARD") from error
    judge = load_judge(name.strip())
    return Term(judge.score_images if isinstance(judge, DiffusionRewardModel) else judge, factor)


def load_value(spec: object) -> Judge | Estimator:
    """A judge of noisy latents: an estimator or its name ("tweedie", "smoothed", "lookahead"), or as in `load_judge`."""
    if isinstance(spec, Estimator):
        return spec
    if isinstance(spec, str) and spec in ESTIMATORS:
        return ESTIMATORS[spec]()
    return load_judge(spec)


__all__ = [
    "ESTIMATORS",
    "SHAPES_DRM",
    "DRMConfig",
    "DRMValue",
    "DiffusionRewardModel",
    "EstimatedValue",
    "Estimator",
    "Judge",
    "Lookahead",
    "Smoothed",
    "Tweedie",
    "adapter_on",
    "load_judge",
    "load_value",
]

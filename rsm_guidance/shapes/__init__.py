"""The embedded shapes world: captions, renderer, verifier, and the packaged tiny model."""

import importlib
from typing import Any

from rsm_guidance.shapes.packaged import drm_path, lora_path, model_path
from rsm_guidance.shapes.render import render, render_spec
from rsm_guidance.shapes.scenes import CATEGORIES, Caption, SceneSpec, caption_set, parse_caption, random_caption
from rsm_guidance.shapes.verify import Verdict, verify


def __getattr__(name: str) -> Any:
    if name == "AbsentTextEncoder":  # diffusers and transformers take their time
        return importlib.import_module("rsm_guidance.shapes.model").AbsentTextEncoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "CATEGORIES",
    "AbsentTextEncoder",
    "Caption",
    "SceneSpec",
    "Verdict",
    "caption_set",
    "drm_path",
    "lora_path",
    "model_path",
    "parse_caption",
    "random_caption",
    "render",
    "render_spec",
    "verify",
]

"""The embedded shapes world: captions, renderer, verifier, and the packaged tiny model."""

from rsm_guidance.shapes.model import AbsentTextEncoder, drm_path, model_path
from rsm_guidance.shapes.render import render, render_spec
from rsm_guidance.shapes.scenes import CATEGORIES, Caption, SceneSpec, caption_set, parse_caption, random_caption
from rsm_guidance.shapes.verify import Verdict, verify

__all__ = [
    "CATEGORIES",
    "AbsentTextEncoder",
    "Caption",
    "SceneSpec",
    "Verdict",
    "caption_set",
    "drm_path",
    "model_path",
    "parse_caption",
    "random_caption",
    "render",
    "render_spec",
    "verify",
]

"""The pipeline that a checkpoint names as its backbone: loading it, and telling whether a loaded pipeline is it."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from rsm_guidance.engine.families import denoisers_of
from rsm_guidance.io.names import model_location, packaged_model
from rsm_guidance.io.reading import refusing, require_plain


def load_backbone(name: str, device: torch.device | str | None = None) -> DiffusionPipeline:
    """The pipeline of a hub id, folder or packaged name, on a device (default: a GPU where there is one).

    Raises:
        UsageError: if there is none that can be read.
    """
    location = model_location(name)
    if packaged_model(name) is not None:
        _import_components(location)
    with refusing(f"cannot load the backbone {name!r}"):
        if Path(location).is_dir():
            require_plain(Path(location))
        pipe = DiffusionPipeline.from_pretrained(location)
    return pipe.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _import_components(folder: str) -> None:
    """Import the modules of this package that a packaged pipeline's components come from, as diffusers asks for."""
    index = json.loads((Path(folder) / "model_index.json").read_text(encoding="utf-8"))
    for entry in index.values():
        if isinstance(entry, list) and str(entry[0]).startswith("rsm_guidance."):
            importlib.import_module(entry[0])


def denoiser_of(pipe: DiffusionPipeline) -> Any:
    """The pipeline's denoiser (a diffusers model), below `torch.compile` if it was compiled."""
    module = next(iter(denoisers_of(pipe).values()))
    return getattr(module, "_orig_mod", module)


def is_backbone(pipe: Any, name: str) -> bool:
    """Whether a loaded pipeline has the denoiser of the backbone `name`: loaded from there, of its class and configuration.

    Weights are not compared: a denoiser that was tuned in place since it was loaded is taken for the named one.
    """
    location = model_location(name)
    if not isinstance(pipe, DiffusionPipeline) or str(pipe.config.get("_name_or_path") or "") != location:
        return False
    part, module = next(iter(denoisers_of(pipe).items()), ("", None))
    denoiser = getattr(module, "_orig_mod", module)
    return isinstance(denoiser, nn.Module) and _same_config(denoiser, location, part)


def _same_config(denoiser: Any, location: str, part: str) -> bool:
    try:
        named = type(denoiser).load_config(location, subfolder=part)
    except (OSError, ValueError):
        return False
    own = json.loads(denoiser.to_json_string())
    return named.get("_class_name") == type(denoiser).__name__ and all(
        own.get(key) == value for key, value in named.items() if not key.startswith("_")
    )

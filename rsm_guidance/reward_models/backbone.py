"""The pipeline that a checkpoint names as its backbone: loading it, and telling whether a loaded pipeline is it."""

import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from rsm_guidance.engine.families import denoisers_of
from rsm_guidance.io.names import model_location, packaged_model


def load_backbone(
    name: str, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> DiffusionPipeline:
    """The pipeline of a hub id, folder or packaged name, on a device (default: a GPU where there is one)."""
    location = model_location(name)
    if packaged_model(name) is not None:
        _import_components(location)
    pipe = DiffusionPipeline.from_pretrained(location, dtype=dtype)
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


def has_adapter(denoiser: nn.Module) -> bool:
    """Whether a denoiser has LoRA layers, whatever their strength is."""
    return any("lora_" in name for name, _ in denoiser.named_parameters())


def with_bare_denoiser(pipe: DiffusionPipeline, name: str) -> DiffusionPipeline:
    """A pipeline of the modules of another, but for the denoiser, which is loaded anew from the backbone `name`."""
    part, denoiser = next(iter(denoisers_of(pipe))), denoiser_of(pipe)
    fresh = type(denoiser).from_pretrained(model_location(name), subfolder=part, torch_dtype=denoiser.dtype)
    cls: Any = next(c for c in type(pipe).__mro__ if c.__module__.startswith("diffusers."))
    taken = inspect.signature(cls.__init__).parameters
    parts = {key: module for key, module in pipe.components.items() if key in taken}
    settings = {key: value for key, value in pipe.config.items() if key in taken and key not in parts}
    return cls(**parts | settings | {part: fresh.to(pipe.device).eval()})


def is_backbone(pipe: Any, name: str) -> bool:
    """Whether a loaded pipeline has the denoiser of the backbone `name`: loaded from there, of its class and configuration.

    Weights are not compared: a denoiser that was tuned in place since it was loaded is taken for the named one.
    """
    location = model_location(name)
    if not isinstance(pipe, DiffusionPipeline) or not _same_place(
        str(pipe.config.get("_name_or_path") or ""), location
    ):
        return False
    part, module = next(iter(denoisers_of(pipe).items()), ("", None))
    denoiser = getattr(module, "_orig_mod", module)
    return isinstance(denoiser, nn.Module) and _same_config(denoiser, location, part)


def _same_place(one: str, other: str) -> bool:
    """Whether two locations are one, folders wherever they are looked at from."""
    return one == other or (Path(one).is_dir() and Path(other).is_dir() and Path(one).samefile(other))


def _same_config(denoiser: Any, location: str, part: str) -> bool:
    try:
        named = type(denoiser).load_config(location, subfolder=part)
    except (OSError, ValueError):
        return False
    own = json.loads(denoiser.to_json_string())
    return named.get("_class_name") == type(denoiser).__name__ and all(
        own.get(key) == value for key, value in named.items() if not key.startswith("_")
    )

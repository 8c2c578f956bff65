"""Loading any pipeline as its reward-guided class."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rsm_guidance.core.errors import UsageError
from rsm_guidance.io.names import model_location
from rsm_guidance.io.reading import refusing, require_plain
from rsm_guidance.pipelines.auto import RewardGuidedPipeline


def load_pipeline(
    model: str,
    dtype: str = "float32",
    device: str | None = None,
    offload: str = "none",
    scheduler: str | None = None,
    loras: Sequence[tuple[str, float]] = (),
) -> DiffusionPipeline:
    """The reward-guided pipeline of a hub id, folder or packaged model's name, on the accelerator if there is one.

    Args:
        model: hub id, folder or name.
        dtype: of the weights.
        device: where it runs; default an accelerator if there is one.
        offload: diffusers' offloading, "none", "model" or "sequential".
        scheduler: class of the scheduler, made from the configuration of the model's own.
        loras: files, folders or hub ids of LoRA adapters, with their scales.

    Raises:
        UsageError: if there is no such model, or its pipeline cannot be guided.
    """
    location = model_location(model)
    with refusing(f"cannot load a pipeline from {model!r}"):
        if Path(location).is_dir():
            require_plain(Path(location))
        pipe = RewardGuidedPipeline.from_pretrained(location, dtype=getattr(torch, dtype))
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = _scheduler(pipe, scheduler)
    _add_loras(pipe, loras)
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if offload == "none":
        return pipe.to(place)
    start = pipe.enable_model_cpu_offload if offload == "model" else pipe.enable_sequential_cpu_offload
    start(device=place)
    return pipe


def require_device(name: str | None, offload: str = "none") -> None:
    """Raise a UsageError if a device is not there, or cannot be offloaded from."""
    try:
        place = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"cannot use the device {name!r}: {reason[:160]}") from error
    if offload != "none" and place.type == "cpu":
        raise UsageError(f"--offload {offload} moves weights to an accelerator, and there is none; leave it out")


def require_loras(texts: Sequence[str]) -> list[tuple[str, float]]:
    """Places of LoRA adapters, each with the scale that stands behind its last colon (default 1).

    Raises:
        UsageError: for what is neither a .safetensors file, a folder nor a hub id, and for a scale that is no number.
    """
    found = []
    for text in texts:
        place, colon, tail = text.rpartition(":")
        try:
            scale = float(tail) if colon else 1.0
        except ValueError:
            place, scale = text, 1.0
        place = place if colon and place != text else text
        if not math.isfinite(scale):
            raise UsageError(f"the scale of a LoRA must be a finite number; got {text!r}")
        path = Path(place)
        if path.is_file() and path.suffix != ".safetensors":
            raise UsageError(f"{place} is no .safetensors file; other formats can run code when they are read")
        if not path.exists() and (place.count("/") != 1 or place.startswith((".", "/", "~")) or path.suffix):
            raise UsageError(
                f"there is no LoRA at {place!r}; name a .safetensors file, a folder or a hub id (org/name)"
            )
        found.append((place, scale))
    return found


def _add_loras(pipe: DiffusionPipeline, loras: Sequence[tuple[str, float]]) -> None:
    if loras and not hasattr(pipe, "load_lora_weights"):
        raise UsageError(f"{type(pipe).__name__} takes no LoRA")
    names = [f"lora-{i}" for i in range(len(loras))]
    for name, (place, _) in zip(names, loras, strict=True):
        path = Path(place)
        where = {"weight_name": path.name} if path.is_file() else {}
        with refusing(f"cannot load the LoRA {place!r}"):
            pipe.load_lora_weights(
                str(path.parent) if where else place, adapter_name=name, use_safetensors=True, **where
            )
        if not any(name in adapters for adapters in pipe.get_list_adapters().values()):
            raise UsageError(f"the LoRA {place!r} fits no layer of {type(pipe).__name__}; it is of another model")
    if loras:
        pipe.set_adapters(names, [scale for _, scale in loras])


def _scheduler(pipe: DiffusionPipeline, name: str) -> Any:
    """A scheduler of another class, with the configuration of the pipeline's own."""
    choice = {cls.__name__: cls for cls in pipe.scheduler.compatibles}
    if name not in choice:
        listed = ", ".join(sorted(choice))
        raise UsageError(f"the scheduler {name!r} does not suit {type(pipe).__name__}; choose one of {listed}")
    return choice[name].from_config(pipe.scheduler.config)

"""Training state on disk: a folder `checkpoint-STEP` for each saved state, which appears whole or not at all.

What is trained and its averages are safetensors, progress is JSON.  Optimiser, schedule and random numbers are what
`Accelerator.save_state` writes: files of `torch.save`, which it reads with `weights_only=True`, so that tensors and plain
containers come out of them and no code runs.  `register_for_checkpointing` is not used, because accelerate unpickles
what it holds without that restriction.

A folder is filled beside its place; its manifest, with the size of every file, is written last, and then it is moved.  The
last state is the one of the highest step whose manifest agrees with its files; folders of other names are passed over.
"""

import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from rsm_guidance.io.files import begin_folder, commit_folder, read_json, read_tensors, write_json, write_tensors
from rsm_guidance.training.sharding import put, whole

_OBJECTIVE, _AVERAGES, _PROGRESS = "objective.safetensors", "averages.safetensors", "progress.json"
_MANIFEST = "manifest.json"
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass
class TrainState:
    """All that a run needs to go on.

    Attributes:
        accelerator: which has prepared the optimiser and the schedule.
        objective: the module that is trained, as it was before it was prepared.
        ema: averages of its trainable parameters, in their order; None without.
        step: updates made.
        history: one entry per evaluation.
    """

    accelerator: Accelerator
    objective: nn.Module
    ema: EMAModel | None
    step: int = 0
    history: list[dict[str, float]] = field(default_factory=list)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name; tied ones once."""
        return {name: p for name, p in self.objective.named_parameters() if p.requires_grad}


def checkpoints(folder: Path) -> list[Path]:
    """The whole states that a folder holds, the last one first; damaged ones are warned about and left out.

    Raises:
        ValueError: if all are damaged.
    """
    found: dict[int, Path] = {}
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found[int(match[1])] = path
    whole = [path for _, path in sorted(found.items(), reverse=True) if _is_whole(path)]
    if found and not whole:
        raise ValueError(
            f"cannot resume from {found[max(found)]}: files of it are damaged or missing; delete that folder to start afresh"
        )
    for path in found.values():
        if path not in whole:
            warnings.warn(f"{path} is not whole and is passed over", stacklevel=2)
    return whole


def latest(folder: Path) -> Path | None:
    """The last whole state of a folder; None if there is none."""
    return next(iter(checkpoints(folder)), None)


def save_state(folder: Path, state: TrainState, keep: int = 1, settings: Mapping[str, Any] | None = None) -> Path:
    """Write `folder`/checkpoint-STEP, and delete all but the `keep` last ones.

    An interruption at any moment leaves the states that were there.  Every process calls it.
    """
    accelerator, place = state.accelerator, folder / f"checkpoint-{state.step:06d}"
    fresh = place.with_name(place.name + ".new")
    if accelerator.is_main_process:
        begin_folder(place)
    accelerator.wait_for_everyone()
    handle = accelerator.register_save_state_pre_hook(lambda models, weights, path: weights.clear())
    try:
        accelerator.save_state(str(fresh))
        _write_own(fresh, state)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    finally:
        handle.remove()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        sizes = {
            path.relative_to(fresh).as_posix(): _on_disk(path) for path in sorted(fresh.rglob("*")) if path.is_file()
        }
        write_json(fresh / _MANIFEST, {"step": state.step, "settings": dict(settings or {}), "files": sizes})
        _on_disk(fresh / _MANIFEST)
        commit_folder(place)
        for old in checkpoints(folder)[keep:]:
            _delete(old)
        for path in folder.iterdir():  # left by a process that was killed
            if _NAME.fullmatch(path.stem) and path.suffix in (".old", ".new"):
                shutil.rmtree(path, ignore_errors=True)
    accelerator.wait_for_everyone()
    return place


def load_state(folder: Path, state: TrainState, settings: Mapping[str, Any] | None = None) -> None:
    """Restore what `save_state` wrote into a folder.  Every process calls it.

    Raises:
        ValueError: when it is no state, or of another objective or other settings, or is damaged.
    """
    if not _is_whole(folder):
        raise ValueError(
            f"cannot resume from {folder}: it holds no whole training state; to start from finished weights use init_from"
        )
    _require_settings(folder, settings or {})
    accelerator = state.accelerator
    handle = accelerator.register_load_state_pre_hook(lambda models, path: models.clear())
    try:
        _read_own(folder, state)
        accelerator.step = -1
        accelerator.load_state(str(folder))
        if accelerator.step == -1:  # accelerate passes over random numbers that it cannot read
            raise ValueError("its random-number state cannot be read")
    except Exception as error:
        refused = isinstance(error, pickle.UnpicklingError)  # torch's sentence tells how to run the code anyway
        why = "a file of it holds more than tensors and plain data" if refused else str(error).strip()
        raise ValueError(f"cannot resume from {folder}: {why}; delete that folder to start afresh") from error
    finally:
        handle.remove()


def _is_whole(folder: Path) -> bool:
    try:
        manifest = read_json(folder / _MANIFEST)
        return all((folder / name).stat().st_size == size for name, size in manifest["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _require_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raise a ValueError that names the first setting which is not as it was."""
    before = read_json(folder / _MANIFEST)["settings"]
    now = json.loads(json.dumps(dict(settings)))
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise ValueError(
                f"cannot resume from {folder}: it was saved with {name}={before.get(name)!r}, and now it is "
                f"{now.get(name)!r}; name another folder, or start from the finished weights with init_from"
            )


def _on_disk(path: Path) -> int:
    """The size of a file, once it is on the disk and not only on its way."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _delete(folder: Path) -> None:
    """Delete a state; its name goes first, so that what is half deleted is not taken for one."""
    gone = folder.with_name(folder.name + ".old")
    shutil.rmtree(gone, ignore_errors=True)
    os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _write_own(folder: Path, state: TrainState) -> None:
    main = state.accelerator.is_main_process
    own = whole(_own_tensors(state.objective))
    if main:
        write_tensors(folder / _OBJECTIVE, own)
    progress: dict[str, Any] = {"step": state.step, "history": state.history}
    if state.ema is not None:
        averages = state.ema.state_dict()
        shadows = whole(dict(zip(state.trained, averages.pop("shadow_params"), strict=True)))
        progress["averages"] = averages
        if main:
            write_tensors(folder / _AVERAGES, shadows)
    if main:
        write_json(folder / _PROGRESS, progress)


def _read_own(folder: Path, state: TrainState) -> None:
    progress = read_json(folder / _PROGRESS)
    _copy(read_tensors(folder / _OBJECTIVE), _own_tensors(state.objective))
    if state.ema is not None:
        averages = dict(zip(state.trained, state.ema.shadow_params, strict=True))
        _copy(read_tensors(folder / _AVERAGES), averages)
        state.ema.load_state_dict(progress["averages"])
    state.step, state.history = int(progress["step"]), list(progress["history"])


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What training changes of a module: trainable parameters and saved buffers."""
    saved = module.state_dict().keys()
    trained = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
    return {name: tensor for name, tensor in chain(trained, module.named_buffers()) if name in saved}


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    strange = sorted(source.keys() ^ target.keys())
    if strange:
        raise ValueError(f"it is the state of another model: {strange[0]!r} is in one of them only")
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            shapes = f"{list(source[name].shape)} and not {list(tensor.shape)}"
            raise ValueError(f"it is the state of another model: {name!r} is {shapes}")
        put(tensor, source[name])

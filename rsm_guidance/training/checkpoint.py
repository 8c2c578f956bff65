"""Training state on disk, which appears whole or not at all.

What is trained and its averages are safetensors, progress is JSON.  Optimiser, schedule and random numbers are what
`Accelerator.save_state` writes: files of `torch.save`, which it reads with `weights_only=True`, so that tensors and plain
containers come out of them and no code runs.  `register_for_checkpointing` is not used, because accelerate unpickles
what it holds without that restriction.
"""

import json
import pickle
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import Tensor, nn

from rsm_guidance.io.files import begin_folder, commit_folder, read_text, recover_folder, write_json, write_tensors
from rsm_guidance.io.reading import reason, require_plain

_OBJECTIVE, _AVERAGES, _PROGRESS = "objective.safetensors", "averages.safetensors", "progress.json"


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


def save_state(folder: Path, state: TrainState) -> None:
    """Write `folder`, so that an interruption at any moment leaves the old state or the new one.

    Every process calls it.
    """
    accelerator = state.accelerator
    if accelerator.is_main_process:
        begin_folder(folder)
    accelerator.wait_for_everyone()
    fresh = folder.with_name(folder.name + ".new")
    handle = accelerator.register_save_state_pre_hook(lambda models, weights, path: weights.clear())
    accelerator.save_state(str(fresh))
    handle.remove()
    if accelerator.is_main_process:
        _write_own(fresh, state)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        commit_folder(folder)
    accelerator.wait_for_everyone()


def load_state(folder: Path, state: TrainState) -> bool:
    """Restore what `save_state` wrote; whether there was anything to resume from.  Every process calls it.

    Raises:
        ValueError: when the state is of another objective or is damaged.
    """
    accelerator = state.accelerator
    with accelerator.main_process_first():
        if not recover_folder(folder):
            return False
    handle = accelerator.register_load_state_pre_hook(lambda models, path: models.clear())
    try:
        require_plain(folder)
        _read_own(folder, state)
        accelerator.step = -1
        accelerator.load_state(str(folder))
        if accelerator.step == -1:  # accelerate passes over random numbers that it cannot read
            raise ValueError("its random-number state cannot be read")
    except Exception as error:
        refused = isinstance(error, pickle.UnpicklingError)  # torch's sentence tells how to run the code anyway
        why = "a file of it holds more than tensors and plain data" if refused else reason(error)
        raise ValueError(f"cannot resume from {folder}: {why}; delete that folder to start afresh") from error
    finally:
        handle.remove()
    return True


def _write_own(folder: Path, state: TrainState) -> None:
    write_tensors(folder / _OBJECTIVE, _own_tensors(state.objective))
    progress: dict[str, Any] = {"step": state.step, "history": state.history}
    if state.ema is not None:
        averages = state.ema.state_dict()
        write_tensors(folder / _AVERAGES, dict(zip(state.trained, averages.pop("shadow_params"), strict=True)))
        progress["averages"] = averages
    write_json(folder / _PROGRESS, progress)


def _read_own(folder: Path, state: TrainState) -> None:
    progress = json.loads(read_text(folder / _PROGRESS))
    _copy(load_file(folder / _OBJECTIVE), _own_tensors(state.objective))
    if state.ema is not None:
        averages = dict(zip(state.trained, state.ema.shadow_params, strict=True))
        _copy(load_file(folder / _AVERAGES), averages)
        state.ema.load_state_dict(progress["averages"])
    state.step, state.history = int(progress["step"]), list(progress["history"])


def _own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What training changes of a module: trainable parameters and saved buffers."""
    saved = module.state_dict().keys()
    trained = ((name, p) for name, p in module.named_parameters() if p.requires_grad)
    return {name: tensor for name, tensor in chain(trained, module.named_buffers()) if name in saved}


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    strange = sorted(source.keys() ^ target.keys())
    if strange:
        raise ValueError(f"it is the state of another model: {strange[0]!r} is in one of them only")
    for name, tensor in target.items():
        if tensor.shape != source[name].shape:
            shapes = f"{list(source[name].shape)} and not {list(tensor.shape)}"
            raise ValueError(f"it is the state of another model: {name!r} is {shapes}")
        tensor.copy_(source[name])

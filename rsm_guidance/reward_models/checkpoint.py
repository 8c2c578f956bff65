"""The files of a diffusion reward model: config.json, model.safetensors, and the card of its hub page."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.io import files
from rsm_guidance.io.config import check_options
from rsm_guidance.io.files import read_json, write_atomically
from rsm_guidance.reward_models import dina
from rsm_guidance.reward_models.config import DRMConfig

CONFIG, WEIGHTS = "config.json", "model.safetensors"
CARD = """---
{{ card_data }}
---

# A diffusion reward model

Scores noisy latents under a prompt: the lower blocks of a diffusion model with a reward head (arXiv 2605.25661).
`config.json` names the backbone; the weights here are the head and what was tuned.

```python
from rsm_guidance import DiffusionRewardModel

drm = DiffusionRewardModel.from_pretrained("path or hub id of this folder")
scores = drm.score(latents, timestep, prompts)
```
"""


def write_checkpoint(folder: Path, config: DRMConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write config.json and model.safetensors; each file appears whole or not at all.

    A tensor that half precision holds exactly is written in it, any other as it is, unless all are to be rounded to it.

    Both are complete before either is moved into place.

    Raises:
        UsageError: if the backbone has no name, so that the checkpoint could not be loaded.
    """
    if not config.backbone:
        raise UsageError("this reward model's backbone has no name; pass from_pipeline(..., backbone='org/model')")
    folder.mkdir(parents=True, exist_ok=True)
    kept = {
        name: _compact(tensor.detach().cpu().contiguous(), config.half_precision) for name, tensor in tensors.items()
    }

    def write(partial_weights: Path) -> None:
        save_file(kept, partial_weights)
        text = json.dumps(asdict(config), indent=2) + "\n"
        write_atomically(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))

    write_atomically(folder / WEIGHTS, write)


def _compact(tensor: Tensor, rounded: bool) -> Tensor:
    half = tensor.half()
    return half if rounded or torch.equal(half.to(tensor.dtype), tensor) else tensor


def read_checkpoint(folder: Path) -> tuple[DRMConfig, dict[str, Tensor]]:
    """What a folder says of a reward model, and its weights: our own layout, or that of DiNa-LRM (`dina`).

    Raises:
        UsageError: if something is missing, damaged or unknown.
    """
    if dina.is_dina(folder / CONFIG):
        return dina.read_dina(folder)
    return read_config(folder), read_tensors(folder)


def files_of(folder: Path) -> list[Path]:
    """The files of a reward model, in a folder that may hold those of its training, too."""
    own = (CONFIG, WEIGHTS, f"{dina.FILES}*/*", dina.FILES)
    return sorted({path for pattern in own for path in folder.glob(pattern) if path.is_file()})


def backbone_of(folder: Path) -> str:
    """The pipeline that a folder names as its model's backbone; raises as `read_checkpoint`."""
    return dina.backbone_of(folder) if dina.is_dina(folder / CONFIG) else read_config(folder).backbone


def require_fit(found: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """Require a checkpoint's tensors to have the names and shapes of a model's own.

    Raises:
        UsageError: if they differ, naming up to three tensors of each kind; `where` says whose they are.
    """
    wrong = [k for k in own if k in found and own[k].shape != found[k].shape]
    faults = {
        "missing": [k for k in own if k not in found],
        "unknown": [k for k in found if k not in own],
        "of another shape": [f"{k} ({_size(found[k])} for {_size(own[k])})" for k in wrong],
    }
    said = [f"{what}: {_some(names)}" for what, names in faults.items() if names]
    if said:
        hint = ""
        if wrong:
            lora = "lora_" in wrong[0]
            hint = ("; the adapter has another rank" if lora else
                    "; the head, or what was tuned, was made for another backbone, other taps or another width")  # fmt: skip
        raise UsageError(f"the weights in {where}: {'; '.join(said)}{hint}")


@torch.no_grad()
def copy_tensors(found: Mapping[str, Tensor], own: Mapping[str, Tensor], where: str) -> None:
    """Copy a checkpoint's tensors to a model's own, all or none; raises as `require_fit`."""
    require_fit(found, own, where)
    for name, tensor in own.items():
        tensor.copy_(found[name])


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a number"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def read_config(folder: Path) -> DRMConfig:
    """What a checkpoint folder says of itself.

    Raises:
        UsageError: if its config.json is missing, damaged or incomplete.
    """
    try:
        settings = read_json(folder / CONFIG)
        missing = sorted({"backbone", "blocks", "adaptation"} - settings.keys())
        if missing:
            raise UsageError(f"it does not say the {missing[0]}")
        return DRMConfig(**check_options(DRMConfig, settings, f"its {CONFIG}"))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"{folder} is not a diffusion reward model: its {CONFIG} cannot be used: {error}") from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint folder, on the CPU.

    Raises:
        UsageError: if they are missing or damaged.
    """
    try:
        return files.read_tensors(folder / WEIGHTS)
    except ValueError as error:
        raise UsageError(f"{folder} is not a diffusion reward model: {error}") from error


def checkpoint_folder(name: str | os.PathLike[str], **download: Any) -> Path:
    """The folder of a checkpoint: itself, or the files of a hub repository (arguments as in `snapshot_download`)."""
    folder = Path(name)
    return (
        folder
        if folder.is_dir()
        else Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS, dina.FILES], **download))
    )

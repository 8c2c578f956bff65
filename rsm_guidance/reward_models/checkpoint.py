"""The files of a diffusion reward model: config.json, model.safetensors, and the card of its hub page."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors.torch import load_file, save_file
from torch import Tensor

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.io.config import check_options
from rsm_guidance.io.files import read_text, require_regular, write_atomically
from rsm_guidance.io.reading import refusing
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
    """Write config.json and model.safetensors (half precision); each file appears whole or not at all.

    Both are complete before either is moved into place.

    Raises:
        UsageError: if the backbone has no name, so that the checkpoint could not be loaded.
    """
    if not config.backbone:
        raise UsageError("this reward model's backbone has no name; pass from_pipeline(..., backbone='org/model')")
    folder.mkdir(parents=True, exist_ok=True)
    halves = {name: tensor.detach().half().cpu().contiguous() for name, tensor in tensors.items()}

    def write(partial_weights: Path) -> None:
        save_file(halves, partial_weights)
        text = json.dumps(asdict(config), indent=2) + "\n"
        write_atomically(folder / CONFIG, lambda path: path.write_text(text, encoding="utf-8"))

    write_atomically(folder / WEIGHTS, write)


def read_config(folder: Path) -> DRMConfig:
    """What a checkpoint folder says of itself.

    Raises:
        UsageError: if its config.json is missing, damaged or incomplete.
    """
    with refusing(f"{folder} is not a diffusion reward model: its {CONFIG} cannot be used"):
        settings = json.loads(read_text(folder / CONFIG))
        if not isinstance(settings, dict):
            raise ValueError(f"it is a {type(settings).__name__}")
        missing = sorted({"backbone", "blocks", "adaptation"} - settings.keys())
        if missing:
            raise ValueError(f"it does not say the {missing[0]}")
        try:
            return DRMConfig(**check_options(DRMConfig, settings, "it"))
        except UsageError as error:
            raise ValueError(str(error)) from error


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint folder, on the CPU.

    Raises:
        UsageError: if they are missing or damaged.
    """
    with refusing(f"{folder} is not a diffusion reward model: its {WEIGHTS} cannot be used"):
        tensors: dict[str, Tensor] = load_file(require_regular(folder / WEIGHTS))
    return tensors


def require_checkpoint(folder: Path) -> None:
    """Raise a UsageError unless a folder holds a checkpoint that can be read."""
    read_config(folder)
    read_tensors(folder)


def checkpoint_folder(name: str | os.PathLike[str], **download: Any) -> Path:
    """The folder of a checkpoint: itself, or the files of a hub repository (arguments as in `snapshot_download`)."""
    folder = Path(name)
    return (
        folder if folder.is_dir() else Path(snapshot_download(str(name), allow_patterns=[CONFIG, WEIGHTS], **download))
    )

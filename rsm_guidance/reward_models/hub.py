"""Diffusion reward models by folder or hub id, over the modules of a loaded pipeline where it is their backbone."""

from pathlib import Path
from typing import Any

from rsm_guidance.reward_models.backbone import denoiser_of, has_adapter, is_backbone, load_backbone, with_bare_denoiser
from rsm_guidance.reward_models.checkpoint import backbone_of, checkpoint_folder, files_of
from rsm_guidance.reward_models.model import DiffusionRewardModel

_LOADED = "_rsm_reward_models"
"""Attribute of a pipeline that keeps the reward models which were loaded for it, so that they are freed with it."""


def load_reward_model(folder_or_id: str, pipe: Any = None) -> DiffusionRewardModel:
    """A reward model from a folder or the hub.

    Where `pipe` is a pipeline of the model's backbone, its modules are shared and no pipeline is loaded.  Otherwise the
    backbone is loaded, to the device of `pipe`; of a `pipe` with a LoRA, whose denoiser is another one by now, the denoiser.  The same name with the same pipe gives the same model, as long as its
    file and the pipe's denoiser stay the same.

    Raises:
        UsageError: if files are missing or damaged, or do not fit the backbone.
        OSError: if the hub has no such model.
    """
    folder = checkpoint_folder(folder_or_id)
    if pipe is None:
        return DiffusionRewardModel.from_pretrained(folder)
    key = *_identity(folder), has_adapter(denoiser_of(pipe))
    loaded: dict[Any, tuple[Any, DiffusionRewardModel]] = vars(pipe).setdefault(_LOADED, {})
    denoiser, model = loaded.get(key, (None, None))
    if model is None or denoiser is not denoiser_of(pipe):
        name = backbone_of(folder)
        if not is_backbone(pipe, name):
            shared = load_backbone(name, pipe.device)
        else:
            shared = with_bare_denoiser(pipe, name) if has_adapter(denoiser_of(pipe)) else pipe
        model = DiffusionRewardModel.from_pretrained(folder, pipe=shared)
        loaded[key] = (denoiser_of(pipe), model)
    return model.to(pipe.device)


def _identity(folder: Path) -> tuple[object, ...]:
    """What tells a checkpoint from others and from its own earlier versions."""
    return str(folder.resolve()), *(path.stat().st_mtime_ns for path in files_of(folder))

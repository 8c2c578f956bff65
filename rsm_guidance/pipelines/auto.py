"""`RewardGuidedPipeline`: the reward-guided class of a saved pipeline, or of one already loaded, found by itself."""

import os
from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from huggingface_hub.constants import HF_HUB_OFFLINE

from rsm_guidance.core.errors import UsageError
from rsm_guidance.engine.families import require_pausable, why_not
from rsm_guidance.io.names import model_location
from rsm_guidance.pipelines.guided import reward_guided

_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


class RewardGuidedPipeline:
    """Picks the reward-guided class, as diffusers' `AutoPipelineFor...` pick stock ones.

    The class is the one that was saved.  For another task with the same modules (image to image, ControlNet) take that
    class by its name: `rsm_guidance.pipelines.RewardGuided<Name>`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(
            f"{name} only picks a class and has no instances; use {name}.from_pretrained(model) or {name}.from_pipe(pipe)"
        )

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str], **kwargs: Any) -> DiffusionPipeline:
        """Load a pipeline as its reward-guided class.

        What was saved without a component (Stable Diffusion 3 without T5) loads without it; stock asks to be told so.

        Args:
            model: folder, hub id (org/name), or the name of a packaged model ("shapes").
            kwargs: those of the stock class's `from_pretrained`, except `custom_pipeline`.

        Raises:
            UsageError: before any weights are read, if there is no such pipeline, or none that can be guided.
        """
        if kwargs.get("custom_pipeline") is not None:
            raise UsageError(f"{cls.__name__} picks the class by itself; leave custom_pipeline out")
        model = model_location(os.fspath(model))
        base: Any
        base, config = stock_class(model, **{name: kwargs[name] for name in _WHERE if name in kwargs})
        reason = why_not(base)
        if reason is not None:
            raise UsageError(f"{os.fspath(model)} is a {base.__name__}, which cannot be guided: {reason}")
        absent = {name: None for name, entry in config.items() if entry in ([None, None], (None, None))}
        pipe: DiffusionPipeline = reward_guided(base).from_pretrained(model, **absent | kwargs)
        return pipe

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
        """Share the modules of a pipeline, stock or already guided, in their own dtype.

        Raises:
            UsageError: if it has no denoising loop. What else speaks against guiding it, a guided call says.
        """
        require_pausable(pipeline)
        stock: Any = type(pipeline)
        guided: Any = next((c for c in stock.__mro__ if "stock_call" in vars(c)), None)
        pipe: DiffusionPipeline = (guided or reward_guided(stock)).from_pipe(pipeline, **kwargs)
        return pipe


def stock_class(model: str | os.PathLike[str], **where: Any) -> tuple[type[DiffusionPipeline], dict[str, Any]]:
    """The stock class of a saved pipeline, and its configuration, which alone is read.

    Args:
        model: folder, or hub id (org/name).
        where: arguments of `DiffusionPipeline.load_config` (revision, token, ...).

    Raises:
        UsageError: if it is no pipeline, or one that diffusers does not export.
    """
    model = os.fspath(model)
    if not Path(model).is_dir() and not (model.count("/") == 1 and model[0] not in "./~"):
        raise UsageError(
            f"cannot load a pipeline from {model!r}: there is no such folder, and it is no hub id (org/name)"
        )
    try:
        config = DiffusionPipeline.load_config(model, **where)
        entry = config["_class_name"]
    except (OSError, KeyError) as error:
        if not Path(model).is_dir() and HF_HUB_OFFLINE:
            raise UsageError(
                f"cannot load a pipeline from {model!r}: it is no folder here and not in the cache, and HF_HUB_OFFLINE forbids "
                "to ask the hub"
            ) from error
        raise UsageError(
            f"cannot load a pipeline from {model!r}, which is none of diffusers: {str(error).strip().splitlines()[0]}"
        ) from error
    name = entry if isinstance(entry, str) else entry[-1]  # a class in a file of the repository is [file, class]
    base = getattr(diffusers, name, None)
    if not (isinstance(base, type) and issubclass(base, DiffusionPipeline)):
        raise UsageError(
            f"{model} is a {name}, which diffusers {diffusers.__version__} does not export; load it in Python and pass it "
            "to RewardGuidedPipeline.from_pipe"
        )
    return base, config

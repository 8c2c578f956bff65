"""Loading any pipeline as its reward-guided class."""

import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError

from rsm_guidance.core.errors import UsageError
from rsm_guidance.io.names import model_location
from rsm_guidance.pipelines.auto import RewardGuidedPipeline


def load_pipeline(model: str, dtype: str = "float32") -> DiffusionPipeline:
    """The reward-guided pipeline of a hub id, folder or packaged model's name, on the accelerator if there is one.

    Raises:
        UsageError: if there is no such model, or its pipeline cannot be guided.
    """
    location = model_location(model)
    try:
        pipe = RewardGuidedPipeline.from_pretrained(location, dtype=getattr(torch, dtype))
    except (OSError, KeyError, RuntimeError, SafetensorError) as error:
        raise UsageError(f"cannot load a pipeline from {model!r}: {str(error).strip().splitlines()[0]}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to("cuda" if torch.cuda.is_available() else "cpu")

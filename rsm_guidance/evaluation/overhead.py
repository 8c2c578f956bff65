"""What the engine costs beside the stock call: `rsm-guidance benchmark engine`.

With `candidates`, also what step-wise sampling costs: K children of every state, scored by a frozen diffusion reward model
(DRM) that reads the middle block.
"""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.ledger import peak_memory
from rsm_guidance.core.transitions import ODE
from rsm_guidance.io.files import write_json
from rsm_guidance.io.names import model_name
from rsm_guidance.pipelines.load import load_pipeline
from rsm_guidance.reward_models import DiffusionRewardModel
from rsm_guidance.reward_models.backbone import denoiser_of
from rsm_guidance.reward_models.blocks import block_names
from rsm_guidance.samplers import Sampler, StepwiseSampling, Unguided

_FEW = 2

PATHS: dict[str, Sampler | None] = {
    "stock": None,
    "none, scheduler's steps": Unguided(),
    "none, our ode": Unguided(ODE()),
    "stepwise, K=1": StepwiseSampling(candidates=1, transition=ODE()),
}


@dataclass(frozen=True)
class Overhead:
    """Seconds per denoising step beyond the first, of guided calls with nothing to choose against the stock call.

    Attributes:
        out: JSON file for the result.
        models: folders, hub ids or packaged names of pipelines.
        steps: denoising steps of the long call; what a call of 2 steps takes is subtracted.
        repeats: measurements, of which the median counts; the paths take turns.
        dtype: of the weights.
        size: height and width of the images in pixels; None leaves the pipeline's own.
        offload: diffusers' offloading of the pipeline, for accelerators; "model" moves one model at a time, "sequential" one
            layer.
        candidates: children per level of a guided path, >= 2; 0 leaves it out.
    """

    out: Path = Path("engine.json")
    models: tuple[str, ...] = ("shapes",)
    steps: int = 22
    repeats: int = 15
    dtype: str = "float32"
    size: int | None = None
    offload: Literal["none", "model", "sequential"] = "none"
    candidates: int = 0


def _seconds(pipe: DiffusionPipeline, guidance: dict[str, Any], steps: int, size: int | None) -> float:
    call: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": steps, "output_type": "latent", "seed": 0}
    if size is not None:
        call |= {"height": size, "width": size}
    start = _now()
    pipe(**call, **guidance)
    return _now() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def measure_overhead(config: Overhead) -> dict[str, Any]:
    """Measure, write and return seconds per step and their ratio to stock, by model and path.

    Raises:
        UsageError: if there is nothing to measure.
    """
    if config.steps <= _FEW or config.repeats < 1 or not config.models:
        raise UsageError(
            f"the engine benchmark needs a model, more than {_FEW} steps and a repeat; got {len(config.models)} models, "
            f"{config.steps} steps, {config.repeats} repeats"
        )
    if config.candidates == 1 or config.candidates < 0:
        raise UsageError(f"candidates must be at least 2, or 0 to leave them out; got {config.candidates}")
    if config.offload != "none" and not torch.cuda.is_available():
        raise UsageError(f"offload={config.offload!r} moves models to an accelerator, and there is none here")
    result: dict[str, Any] = {"steps": config.steps, "repeats": config.repeats, "dtype": config.dtype, "models": []}
    result |= {"size": config.size, "offload": config.offload}
    for model in config.models:
        pipe = load_pipeline(model, config.dtype)
        paths = _paths(pipe, config)
        if config.offload == "model":
            pipe.to("cpu").enable_model_cpu_offload()
        elif config.offload == "sequential":
            pipe.to("cpu").enable_sequential_cpu_offload()
        memory = {name: _memory(pipe, guidance, config.size) for name, guidance in paths.items()}
        times: dict[str, list[float]] = {name: [] for name in paths}
        for _ in tqdm(range(config.repeats), desc=type(pipe).__name__):
            for name, guidance in paths.items():
                whole, start = (_seconds(pipe, guidance, n, config.size) for n in (config.steps, _FEW))
                times[name].append((whole - start) / (config.steps - _FEW))
        medians = {name: statistics.median(t) for name, t in times.items()}
        figures = {
            name: {"seconds_per_step": t, "ratio": t / medians["stock"], "peak_memory_bytes": memory[name]}
            for name, t in medians.items()
        }
        result["models"].append(
            {"model": Path(model_name(model)).name, "pipeline": type(pipe).__name__, "paths": figures}
        )
    write_json(config.out, result)
    return result


def _paths(pipe: DiffusionPipeline, config: Overhead) -> dict[str, dict[str, Any]]:
    """Arguments of the calls that are compared."""
    paths: dict[str, dict[str, Any]] = {name: {"sampler": sampler} for name, sampler in PATHS.items()}
    if config.candidates:
        names = block_names(denoiser_of(pipe))
        middle = "mid_block" if "mid_block" in names else names[len(names) // 2 - 1]
        drm = DiffusionRewardModel.from_pipeline(pipe, taps=(middle,), adaptation="frozen")
        guided = {"sampler": StepwiseSampling(candidates=config.candidates), "reward": drm}
        paths[f"stepwise, K={config.candidates}, DRM to the middle"] = guided
    return paths


def _memory(pipe: DiffusionPipeline, guidance: dict[str, Any], size: int | None) -> int:
    """Peak memory of a short call, which also warms up: of the accelerator, else of the whole process so far."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    _seconds(pipe, guidance, _FEW, size)
    return peak_memory()

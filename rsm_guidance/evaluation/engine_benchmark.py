"""What the engine costs beside the stock call: `rsm-guidance benchmark engine`."""

import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from tqdm.auto import tqdm

from rsm_guidance.core.transitions import Transition
from rsm_guidance.evaluation.files import write_json
from rsm_guidance.evaluation.generate import load_pipeline
from rsm_guidance.samplers import Sampler, StepwiseSampling, Unguided
from rsm_guidance.shapes.model import model_path

_FEW = 2

PATHS: dict[str, Sampler | None] = {
    "stock": None,
    "none, scheduler's steps": Unguided(),
    "none, our ode": Unguided(Transition("ode")),
    "stepwise, K=1": StepwiseSampling(candidates=1, transition=Transition("ode")),
}


@dataclass(frozen=True)
class EngineBenchmark:
    """Seconds per denoising step beyond the first, of guided calls with nothing to choose against the stock call.

    Attributes:
        out: JSON file for the result.
        models: folders or hub ids of pipelines.
        steps: denoising steps of the long call; what a call of 2 steps takes is subtracted.
        repeats: measurements, of which the median counts; the paths take turns.
        dtype: of the weights.
    """

    out: Path = Path("engine.json")
    models: tuple[str, ...] = (model_path(),)
    steps: int = 22
    repeats: int = 15
    dtype: str = "float32"


def _seconds(pipe: DiffusionPipeline, sampler: Sampler | None, steps: int) -> float:
    call: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": steps, "output_type": "latent", "seed": 0}
    start = _now()
    pipe(**call, sampler=sampler)
    return _now() - start


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def run_engine_benchmark(config: EngineBenchmark) -> dict[str, Any]:
    """Measure, write and return seconds per step and their ratio to stock, by model and path.

    Raises:
        ValueError: if there is nothing to measure.
    """
    if config.steps <= _FEW or config.repeats < 1 or not config.models:
        raise ValueError(
            f"the engine benchmark needs a model, more than {_FEW} steps and a repeat; got {len(config.models)} models, "
            f"{config.steps} steps, {config.repeats} repeats"
        )
    result: dict[str, Any] = {"steps": config.steps, "repeats": config.repeats, "models": []}
    for model in config.models:
        pipe = load_pipeline(model, config.dtype)
        for sampler in PATHS.values():
            _seconds(pipe, sampler, _FEW)
        times: dict[str, list[float]] = {name: [] for name in PATHS}
        for _ in tqdm(range(config.repeats), desc=type(pipe).__name__):
            for name, sampler in PATHS.items():
                whole, start = _seconds(pipe, sampler, config.steps), _seconds(pipe, sampler, _FEW)
                times[name].append((whole - start) / (config.steps - _FEW))
        medians = {name: statistics.median(t) for name, t in times.items()}
        paths = {name: {"seconds_per_step": t, "ratio": t / medians["stock"]} for name, t in medians.items()}
        result["models"].append({"model": Path(model).name, "pipeline": type(pipe).__name__, "paths": paths})
    write_json(config.out, result)
    return result


def engine_table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = ["| pipeline | path | ms per step | of stock |", "|---|---|---|---|"]
    for model in result["models"]:
        for name, path in model["paths"].items():
            time_of, ratio = 1000 * path["seconds_per_step"], path["ratio"]
            lines.append(f"| {model['pipeline']} | {name} | {time_of:.2f} | {ratio:.3f} |")
    return "\n".join(lines)

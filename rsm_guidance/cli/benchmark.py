"""The commands `benchmark ...`: what a user measures on a model of his own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rsm_guidance.cli.compare import resumable, samplers_of
from rsm_guidance.cli.options import (
    ModelGroup,
    ModelOptions,
    SamplerGroup,
    SamplerOptions,
    check_reward,
    listed,
    load_reward,
    numbers,
    quiet_libraries,
)

if TYPE_CHECKING:
    from rsm_guidance.data.prompts import PromptSet

_FIRST = 64


@dataclass(frozen=True)
class BenchmarkEngine:
    """Measure what guided calls with nothing to choose cost beside the stock call.

    rsm-guidance benchmark engine --out engine.json

    rsm-guidance benchmark engine --models FOLDER --dtype bfloat16 --size 512 --candidates 4
    """

    out: Path = Path("engine.json")
    """JSON file for the result."""
    models: tuple[str, ...] = ("shapes",)
    """Folders or hub ids of pipelines."""
    steps: int = 22
    """Denoising steps of the long call; what a call of 2 steps takes is subtracted."""
    repeats: int = 15
    """Measurements, of which the median counts; the paths take turns."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the weights."""
    size: int | None = None
    """Height and width of the images in pixels; default: the pipeline's own."""
    offload: Literal["none", "model", "sequential"] = "none"
    """diffusers' offloading, for accelerators: one model at a time, or one layer."""
    candidates: int = 0
    """At least 2 to measure step-wise sampling with so many children per step, too; 0 leaves it out."""

    def run(self) -> None:
        from rsm_guidance.evaluation.overhead import Overhead, measure_overhead
        from rsm_guidance.evaluation.report.tables import engine_table
        from rsm_guidance.io.files import require_writable

        quiet_libraries()
        require_writable(self.out)
        print(engine_table(measure_overhead(Overhead(**vars(self)))))


@dataclass(frozen=True)
class BenchmarkValues:
    """Measure how well values of noisy latents foretell the final reward, per noise level.

    rsm-guidance benchmark values --reward shapes-verifier --values tweedie,lookahead,shapes-drm --out values.json

    rsm-guidance benchmark values --model FOLDER --prompts prompts.txt --reward my_package:reward --out values.json
    """

    out: Path = Path("values.json")
    """JSON file for the result; a plot of the same name lies beside it."""
    prompts: Path | None = None
    """UTF-8 text or .jsonl file, as for compare; default: held-out captions that the embedded model carries."""
    first: int = _FIRST
    """Number of prompts, from the first."""
    values: str = "tweedie,smoothed,lookahead,lookahead:steps=4"
    """Estimators, separated by commas, with options of their own, and diffusion reward models."""
    runs: int = 8
    """Unguided runs per prompt, at least 2."""
    levels: str = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9"
    """Noise levels, as shares of the steps, separated by commas."""
    transition: str = "cps 0.9"
    """How the runs step."""
    seed: int = 0
    """Names all random numbers."""
    batch_size: int = 16
    """Prompts per batch."""
    autocast: bool = False
    """Run in bfloat16 autocast, which is faster on CPUs."""
    model: ModelGroup = field(default_factory=lambda: ModelOptions(reward="shapes-verifier"))

    def run(self) -> None:
        from rsm_guidance.core.transitions import parse_transition
        from rsm_guidance.evaluation.calibration import Calibration, calibrate
        from rsm_guidance.evaluation.report.tables import values_table
        from rsm_guidance.io.files import require_writable

        asked = prompt_set_of(self.prompts, self.first, self.model.model)
        config = Calibration(
            asked.prompts,
            self.out,
            tuple(listed(self.values)),
            self.runs,
            numbers(self.levels, "--levels"),
            parse_transition(self.transition),
            self.seed,
            self.batch_size,
            self.autocast,
            asked.columns,
        )
        require_writable(self.out)
        pipe, reward, generation = self.model.load(asked.prompts, asked.columns)
        print(values_table(calibrate(config, pipe, generation, reward)))


@dataclass(frozen=True)
class BenchmarkSamplers:
    """Compare samplers at multiples of an unguided image's cost: which of them is worth its compute on this model?

    rsm-guidance benchmark samplers --samplers none,best-of-n,stepwise --multiples 2,4 --out benchmark/

    rsm-guidance benchmark samplers --model FOLDER --prompts prompts.txt --reward my_package:proxy --monitor my_package:gold
    """

    out: Path = Path("benchmark")
    """Folder for report.json, report.md, curves.png and comparison.png; a benchmark found in it goes on."""
    prompts: Path | None = None
    """UTF-8 text or .jsonl file, as for compare; default: held-out captions that the embedded model carries."""
    first: int = _FIRST
    """Number of prompts, from the first."""
    samplers: str = "none,best-of-n,stepwise,svdd,fk-steering"
    """Names, separated by commas, each with options of its own; "all" for all."""
    multiples: str = "2,4,8"
    """Budgets, separated by commas, as multiples of the denoiser evaluations (NFE) of one unguided image."""
    monitor: str | None = None
    """Gold (held-out) rewards, separated by commas, which no sampler sees."""
    pairs: int = 32
    """Prompts that are drawn twice, to measure diversity."""
    seed: int = 0
    """Names all random numbers."""
    batch_size: int = 16
    """Prompts per batch; changes no image."""
    autocast: bool = False
    """Run in bfloat16 autocast, which is faster on CPUs."""
    options: SamplerGroup = field(default_factory=SamplerOptions)
    model: ModelGroup = field(default_factory=ModelOptions)

    def run(self) -> None:
        from rsm_guidance.evaluation.compare import Comparison, budgets_at, compare
        from rsm_guidance.evaluation.generate import costs_of
        from rsm_guidance.evaluation.report.tables import comparison_table
        from rsm_guidance.io.files import require_writable

        asked = prompt_set_of(self.prompts, self.first, self.model.model)
        samplers, multiples = samplers_of(self.samplers, self.options), numbers(self.multiples, "--multiples")
        require_writable(self.out / "report.json")
        for name in listed(self.monitor or ""):
            check_reward(name, asked.prompts, asked.columns)
        pipe, reward, generation = self.model.load(asked.prompts, asked.columns)
        monitors = {name: load_reward(name, pipe) for name in listed(self.monitor or "")}
        first = {name: values[0] for name, values in asked.columns.items()}
        budgets = budgets_at(multiples, costs_of(pipe, generation, reward, asked.prompts[0], first))
        config = Comparison(
            asked.prompts,
            samplers,
            budgets,
            self.out,
            self.seed,
            self.pairs,
            batch_size=self.batch_size,
            autocast=self.autocast,
            columns=asked.columns,
        )
        with resumable(self.out):
            print(comparison_table(compare(config, pipe, generation, reward, monitors)))


def prompt_set_of(path: Path | None, first: int, model: str) -> PromptSet:
    """The first prompts of a file, with its columns, or those that a packaged model carries to be measured with."""
    from rsm_guidance.core.errors import UsageError
    from rsm_guidance.data.prompts import PromptSet, read_prompt_set
    from rsm_guidance.io.names import model_prompts

    if first < 1:
        raise UsageError(f"--first must be at least 1; got {first}")
    return PromptSet(model_prompts(model, first)) if path is None else read_prompt_set(path, first)

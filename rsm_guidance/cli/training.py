"""The commands `train ...` and `benchmark ...`: configurations that are run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.samplers import SamplersBenchmark, run_samplers_benchmark, table
from benchmarks.branching import BranchingBenchmark, branching_table, run_branching_benchmark
from rsm_guidance.evaluation.calibration import ValuesBenchmark, run_values_benchmark, values_table
from rsm_guidance.evaluation.overhead import EngineBenchmark, engine_table, run_engine_benchmark
from benchmarks.exactness import ExactnessBenchmark, exactness_table, run_exactness_benchmark
from rsm_guidance.io.files import require_writable
from benchmarks.reward_models import JudgesBenchmark, judges_table, run_judges_benchmark
from rsm_guidance.shapes.training.reward import RewardTrainConfig, train_reward
from rsm_guidance.shapes.training.base import BaseConfig, train_shapes_model
from rsm_guidance.shapes.training.vae import VAEConfig


@dataclass(frozen=True)
class Reward(RewardTrainConfig):
    """Train a diffusion reward model on the shapes world; interrupted runs resume.

    rsm-guidance train reward --config configs/shapes_drm.yaml --out drm --steps 500
    """

    def run(self) -> None:
        require_writable(self.out / "report.json")
        report: Any = train_reward(self)
        print(json.dumps({"model": str(self.out / "model"), **report["validation"]}))


@dataclass(frozen=True)
class Base:
    """Train the embedded shapes model (autoencoder, text encoders, denoiser) from scratch; interrupted runs resume.

    rsm-guidance train base --out shapes-model
    """

    out: Path = Path("shapes-model")
    """Folder for training state and the finished pipeline (OUT/model)."""
    vae: VAEConfig = VAEConfig()
    base: BaseConfig = BaseConfig()

    def run(self) -> None:
        require_writable(self.out / "report.json")
        print(json.dumps({"model": train_shapes_model(self.vae, self.base, self.out)}))


@dataclass(frozen=True)
class Samplers(SamplersBenchmark):
    """Compare samplers at equal cost on held-out captions; interrupted runs resume.

    rsm-guidance benchmark samplers --out benchmarks/samplers.json
    """

    def run(self) -> None:
        require_writable(self.out)
        print(table(run_samplers_benchmark(self)))


@dataclass(frozen=True)
class Judges(JudgesBenchmark):
    """Compare reward models with frozen, LoRA and tuned backbones of several depths; interrupted runs resume.

    rsm-guidance benchmark judges --out judges
    """

    def run(self) -> None:
        require_writable(self.out / "judges.json")
        print(judges_table(run_judges_benchmark(self)))


@dataclass(frozen=True)
class Engine(EngineBenchmark):
    """Measure what the engine costs beside the stock call.

    rsm-guidance benchmark engine --out engine.json
    """

    def run(self) -> None:
        require_writable(self.out)
        print(engine_table(run_engine_benchmark(self)))


@dataclass(frozen=True)
class Values(ValuesBenchmark):
    """Calibration of value estimators: how well each foretells the final reward, per noise level.

    rsm-guidance benchmark values --out values.json
    """

    def run(self) -> None:
        require_writable(self.out)
        print(values_table(run_values_benchmark(self)))


@dataclass(frozen=True)
class Exactness(ExactnessBenchmark):
    """Errors of the samplers that claim the tilted posterior, against the exact answer on Gaussian mixtures.

    rsm-guidance benchmark exactness --out exactness.json
    """

    def run(self) -> None:
        require_writable(self.out)
        print(exactness_table(run_exactness_benchmark(self)))


@dataclass(frozen=True)
class Branching(BranchingBenchmark):
    """Whether branching can pay: how often branches of bad runs come out good, per noise level, beside fresh starts.

    rsm-guidance benchmark branching --out branching.json
    """

    def run(self) -> None:
        require_writable(self.out)
        print(branching_table(run_branching_benchmark(self)))


TRAIN = {"reward": Reward, "base": Base}
BENCHMARK = {
    "samplers": Samplers, "judges": Judges, "engine": Engine, "values": Values, "exactness": Exactness, "branching": Branching,
}  # fmt: skip


def with_config(arguments: list[str]) -> list[str]:
    """Replace `--config FILE.yaml` by the options it holds; options after it override them.

    Raises:
        ValueError: if the file cannot be read or is not a mapping.
    """
    arguments = [part for a in arguments for part in (a.split("=", 1) if a.startswith("--config=") else [a])]
    if "--config" not in arguments:
        return arguments
    at = arguments.index("--config")
    if at + 1 >= len(arguments):
        raise ValueError("--config needs a YAML file")
    path = Path(arguments[at + 1])
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the configuration {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the configuration {path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"the configuration {path} must be a mapping of options; got {type(data).__name__}")
    overridden = {a.split("=", 1)[0] for a in arguments if a.startswith("--")}
    return [*_flatten(data, "", overridden), *arguments[:at], *arguments[at + 2 :]]


def _flatten(data: dict[str, Any], prefix: str, overridden: set[str]) -> list[str]:
    options: list[str] = []
    for key, value in data.items():
        name = f"{prefix}{key}".replace("_", "-")
        if isinstance(value, dict):
            options += _flatten(value, name + ".", overridden)
        elif f"--{name}" in overridden or f"--{name.replace('-', '_')}" in overridden:
            continue
        elif isinstance(value, bool):
            options.append(f"--{name}" if value else f"--{_negated(name)}")
        elif isinstance(value, list):
            options += [f"--{name}", *map(str, value)]
        else:
            options += [f"--{name}", str(value)]
    return options


def _negated(name: str) -> str:
    head, _, tail = name.rpartition(".")
    return f"{head}.no-{tail}" if head else f"no-{tail}"

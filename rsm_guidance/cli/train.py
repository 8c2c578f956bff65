"""The commands `train ...`: configurations, from a file and from options, that are run."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from rsm_guidance.cli.options import quiet_libraries
from rsm_guidance.core.errors import UsageError
from rsm_guidance.shapes.training.config import BaseConfig, RewardTrainConfig, VAEConfig


@dataclass(frozen=True)
class TrainReward:
    """Train a diffusion reward model on the shapes world; interrupted runs resume.

    rsm-guidance train reward --config configs/shapes_drm.yaml --out drm --steps 500
    """

    config: Path | None = None
    """YAML file with any of the options below; options on the command line override it."""
    settings: Annotated[RewardTrainConfig, tyro.conf.arg(name="")] = field(default_factory=RewardTrainConfig)

    @classmethod
    def configured(cls, words: list[str]) -> "TrainReward | None":
        """The command with the settings of the file that --config names, if it names one."""
        path = config_of(words)
        if path is None:
            return None
        from rsm_guidance.io.config import read_config  # loads pydantic

        return cls(path, read_config(path, RewardTrainConfig))

    def run(self) -> None:
        from rsm_guidance.io.files import require_writable
        from rsm_guidance.shapes.training.reward import train_reward

        quiet_libraries()
        require_writable(self.settings.out / "report.json")
        report: Any = train_reward(self.settings)
        print(json.dumps({"model": str(self.settings.out / "model"), **report["validation"]}))


@dataclass(frozen=True)
class BaseSettings:
    """Training of the embedded shapes model.

    Attributes:
        out: folder for training state and the finished pipeline (OUT/model).
        vae: the autoencoder.
        base: text encoders and denoiser.
    """

    out: Path = Path("shapes-model")
    vae: VAEConfig = VAEConfig()
    base: BaseConfig = BaseConfig()


@dataclass(frozen=True)
class TrainBase:
    """Train the embedded shapes model (autoencoder, text encoders, denoiser) from scratch; interrupted runs resume.

    rsm-guidance train base --out shapes-model
    """

    config: Path | None = None
    """YAML file with any of the options below; options on the command line override it."""
    settings: Annotated[BaseSettings, tyro.conf.arg(name="")] = field(default_factory=BaseSettings)

    @classmethod
    def configured(cls, words: list[str]) -> "TrainBase | None":
        """The command with the settings of the file that --config names, if it names one."""
        path = config_of(words)
        if path is None:
            return None
        from rsm_guidance.io.config import read_config  # loads pydantic

        return cls(path, read_config(path, BaseSettings))

    def run(self) -> None:
        from rsm_guidance.io.files import require_writable
        from rsm_guidance.shapes.training.base import train_shapes_model

        quiet_libraries()
        settings = self.settings
        require_writable(settings.out / "report.json")
        print(json.dumps({"model": train_shapes_model(settings.vae, settings.base, settings.out)}))


def config_of(words: list[str]) -> Path | None:
    """The file that --config names last, or None.

    Raises:
        UsageError: if nothing follows it.
    """
    path = None
    for index, word in enumerate(words):
        if word.startswith("--config="):
            path = word.removeprefix("--config=")
        elif word == "--config":
            if index + 1 == len(words):
                raise UsageError("--config needs a YAML file")
            path = words[index + 1]
    return None if path is None else Path(path)

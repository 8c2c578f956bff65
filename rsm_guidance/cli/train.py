"""The commands `train ...`: configurations, from a file and from options, that are run."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from rsm_guidance.cli.options import quiet_libraries
from rsm_guidance.core.errors import UsageError
from rsm_guidance.shapes.training.config import BaseConfig, ShapesRewardConfig, VAEConfig
from rsm_guidance.training.reward_model.config import RewardConfig


@dataclass(frozen=True)
class TrainReward:
    """Train a diffusion reward model on preferences; interrupted runs resume.

    rsm-guidance train reward --data.path choices.csv --pipeline stabilityai/stable-diffusion-3.5-medium --out drm

    rsm-guidance train reward --config configs/sd35m_hpdv3.yaml --data.path HPDv3/train.json

    accelerate launch --num-processes 4 -m rsm_guidance train reward --config FILE.yaml
    """

    config: Path | None = None
    """YAML file with any of the options below; options on the command line override it."""
    dry_run: bool = False
    """Print the settings that would be used, and stop."""
    settings: Annotated[RewardConfig, tyro.conf.arg(name="")] = field(default_factory=RewardConfig)

    @classmethod
    def configured(cls, words: list[str]) -> "TrainReward | None":
        """The command with the settings of the file that --config names, if it names one."""
        path = config_of(words)
        if path is None:
            return None
        from rsm_guidance.io.config import read_config  # loads pydantic

        return cls(path, settings=read_config(path, RewardConfig))

    def run(self) -> None:
        from rsm_guidance.io.files import require_writable
        from rsm_guidance.training.data import leave
        from rsm_guidance.training.reward_model.run import require_run
        from rsm_guidance.training.reward_model.trainer import train_reward
        from rsm_guidance.training.runs import flat

        quiet_libraries()
        require_writable(self.settings.out / "report.json")
        if self.dry_run:
            require_run(self.settings)
            print(json.dumps(flat(asdict(self.settings)), indent=1))
            return
        report = train_reward(self.settings)
        leave()
        levels = {f"{entry['sigma']:g}": entry["accuracy"] for entry in report["levels"]}
        print(json.dumps({"model": str(self.settings.out), report["measured_on"]: levels}))


@dataclass(frozen=True)
class TrainShapesReward:
    """Train the packaged reward model of the shapes world, on samples of its generator; interrupted runs resume.

    rsm-guidance train shapes-reward --config configs/shapes_packaged_drm.yaml --out drm --steps 500
    """

    config: Path | None = None
    """YAML file with any of the options below; options on the command line override it."""
    settings: Annotated[ShapesRewardConfig, tyro.conf.arg(name="")] = field(default_factory=ShapesRewardConfig)

    @classmethod
    def configured(cls, words: list[str]) -> "TrainShapesReward | None":
        """The command with the settings of the file that --config names, if it names one."""
        path = config_of(words)
        if path is None:
            return None
        from rsm_guidance.io.config import read_config  # loads pydantic

        return cls(path, read_config(path, ShapesRewardConfig))

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
    path = option_of(words, "--config", "a YAML file")
    return None if path is None else Path(path)


def option_of(words: list[str], option: str, what: str = "a name") -> str | None:
    """The word that follows an option where it stands last, or None; `what` it is to be.

    Raises:
        UsageError: if nothing follows it.
    """
    found = None
    for index, word in enumerate(words):
        if word.startswith(f"{option}="):
            found = word.partition("=")[2]
        elif word == option:
            if index + 1 == len(words):
                raise UsageError(f"{option} needs {what}")
            found = words[index + 1]
    return found

"""The command `train align`: a configuration from a preset, a file and options, that is run."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from rsm_guidance.cli.options import quiet_libraries
from rsm_guidance.cli.train import config_of, option_of
from rsm_guidance.training.alignment.config import AlignConfig

DEFAULT = "diffusion-nft"


@dataclass(frozen=True)
class TrainAlign:
    """Fine-tune a pipeline by rewards into a LoRA that stock pipelines load; interrupted runs resume.

    rsm-guidance train align --preset diffusion-nft --out aligned

    rsm-guidance train align --preset flow-grpo --pipeline stabilityai/stable-diffusion-3.5-medium --prompts prompts.txt
    --rewards pickscore --gold hpsv2

    accelerate launch --num-processes 4 -m rsm_guidance train align --config FILE.yaml
    """

    preset: str | None = None
    """A published method, whose settings the options below change; --list-presets names them. Default: diffusion-nft, where no
    file is given."""
    config: Path | None = None
    """YAML file with any of the options below; it may name a preset, too. Options on the command line override it."""
    list_presets: bool = False
    """Print the presets and where they come from, and stop."""
    dry_run: bool = False
    """Print the settings that would be used, and stop."""
    settings: Annotated[AlignConfig, tyro.conf.arg(name="")] = field(default_factory=AlignConfig)

    @classmethod
    def configured(cls, words: list[str]) -> "TrainAlign | None":
        """The command with the settings of the preset and the file that are named, if any is.

        Settings that a preset leaves open must be on the command line, which is read for them here: without them the preset
        is no configuration.
        """
        path, name = config_of(words), option_of(words, "--preset")
        if {"--help", "-h", "--list-presets"} & {*words}:
            return None
        name = DEFAULT if path is None and name is None else name
        from rsm_guidance.training.alignment.read import read_align, required_of  # loads pydantic

        given = _nested(words, required_of(path, name))
        return cls(name, path, settings=read_align(path, name, given))

    def run(self) -> None:
        from rsm_guidance.training.alignment.read import presets

        if self.list_presets:
            print(json.dumps({name: _source(text) for name, text in presets().items()}, indent=1))
            return
        from rsm_guidance.io.files import require_writable
        from rsm_guidance.training.alignment.run import require_run
        from rsm_guidance.training.alignment.trainer import train_align
        from rsm_guidance.training.data import leave
        from rsm_guidance.training.runs import flat

        quiet_libraries()
        require_writable(self.settings.out / "report.json")
        if self.dry_run:
            require_run(self.settings)
            print(json.dumps(flat(asdict(self.settings)), indent=1))
            return
        report = train_align(self.settings)
        leave()
        told = {name: report[name] for name in ("base", "best", "stopped")}
        print(json.dumps({"lora": str(self.settings.out), **told}))


def _source(text: str) -> dict[str, Any]:
    from rsm_guidance.io.config import read_yaml

    read: Any = read_yaml(text)
    method: dict[str, Any] = read["method"]
    return method | ({"required": read["required"]} if "required" in read else {})


def _nested(words: list[str], names: Sequence[str]) -> dict[str, Any]:
    """Options of some dotted names, as a file would have them."""
    from rsm_guidance.io.config import read_yaml

    found: dict[str, Any] = {}
    for name in names:
        values = _values(words, name)
        if not values:
            continue
        *parents, leaf = name.split(".")
        place = found
        for parent in parents:
            place = place.setdefault(parent, {})
        read = [read_yaml(value) for value in values]
        place[leaf] = read if name.endswith("gate_rewards") or len(read) > 1 else read[0]
    return found


def _values(words: list[str], name: str) -> list[str]:
    """The words that follow an option, up to the next one."""
    spelled = {f"--{name}", f"--{name.replace('_', '-')}"}
    for index, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in spelled and equals:
            return [value]
        if word in spelled:
            rest = words[index + 1 :]
            end = next((i for i, w in enumerate(rest) if w.startswith("--")), len(rest))
            return rest[:end]
    return []

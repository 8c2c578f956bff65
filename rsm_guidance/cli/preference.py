"""The command `evaluate preference`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rsm_guidance.cli.options import listed, load_reward, numbers, quiet_libraries
from rsm_guidance.core.errors import UsageError

if TYPE_CHECKING:
    from rsm_guidance.evaluation.preference.scoring import Comparison


@dataclass(frozen=True)
class EvaluatePreference:
    """How well rewards agree with preferences: accuracy by noise level, source and category, calibration, agreement.

    rsm-guidance evaluate preference choices.csv --reward ./drm --split test --out evaluation

    rsm-guidance evaluate preference HPDv3 --reward ./drm --others my_package.rewards:aesthetic --levels 0,0.4,0.8
    """

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """Preferences, as `data check` reads them."""
    reward: str = "shapes-drm"
    """A name (see `rsm-guidance rewards`), folder or hub id of a reward model, or package.module:object."""
    others: str = ""
    """Further rewards to compare with, separated by commas."""
    levels: str = "0,0.05,0.2,0.4,0.6,0.75,0.85,0.95"
    """Noise levels (sigma) at which diffusion reward models score."""
    split: str | None = None
    """A published split, or "train" or "test" by prompt."""
    held_out_fraction: float = 0.05
    """Share of the prompts in "test", where the data publish no splits; as in training."""
    seed: int = 0
    """Names that division; as in training."""
    format: str | None = None
    """Name of the format, where it should not be recognised."""
    min_confidence: float | None = None
    """Rows below it are left out, of formats that state a confidence."""
    limit: int | None = None
    """Pairs to score; default all."""
    side: int | None = None
    """Images are scaled to this side for diffusion reward models, as data.side in training; default: the model's own."""
    batch_size: int = 8
    """Pairs at a time."""
    out: Path = Path("preference")
    """Folder for report.json, accuracy.png and calibration.png."""

    def run(self) -> None:
        for name, number in (("batch-size", self.batch_size), ("limit", self.limit), ("side", self.side)):
            if number is not None and number < 1:
                raise UsageError(f"--{name} must be positive; got {number}")
        levels = numbers(self.levels, "--levels")
        if not all(0 <= level <= 1 for level in levels):
            raise UsageError(f"--levels are noise levels between 0 and 1; got {self.levels}")
        from tqdm.auto import tqdm

        from rsm_guidance.data.preferences import read_preferences
        from rsm_guidance.evaluation.preference.scoring import compare_pairs, report_of
        from rsm_guidance.io.files import require_writable, write_json

        quiet_libraries()
        require_writable(self.out / "report.json")
        data = read_preferences(
            self.file,
            self.split,
            self.format,
            seed=self.seed,
            min_confidence=self.min_confidence,
            test_fraction=self.held_out_fraction,
        )
        names = [self.reward, *listed(self.others)]
        rewards = {name: load_reward(name) for name in dict.fromkeys(names)}
        with tqdm(unit="pair", desc="scoring") as bar:
            found = compare_pairs(data, rewards, levels, self.batch_size, self.limit, self.side, bar.update)
        report = {"data": str(data), "reward": self.reward, **report_of(found, self.reward)}
        write_json(self.out / "report.json", report)
        self._draw(found)
        print("\n".join(_table(report)))

    def _draw(self, found: Comparison) -> None:
        from rsm_guidance.evaluation.preference.figures import calibration, figures_of
        from rsm_guidance.evaluation.preference.plots import draw_calibration, draw_levels

        curves = {
            name: {float(what.removeprefix("sigma ")): figures_of(p) for what, p in by.items() if what != "images"}
            for name, by in found.by.items()
        }
        draw_levels({name: curve for name, curve in curves.items() if curve}, self.out / "accuracy.png")
        first = {f"{name}, {what}": calibration(p) for name, by in found.by.items() for what, p in [*by.items()][:3]}
        draw_calibration(first, self.out / "calibration.png")


def _table(report: dict[str, Any]) -> list[str]:
    """Accuracies, by reward and level, and by source and category of the first level."""
    lines = [f"{report['pairs']} pairs of {report['data']}"]
    lines += [f"left out: {count} {reason}" for reason, count in report["skipped"].items()]
    for name, by in report["rewards"].items():
        for what, figures in by.items():
            lines.append(f"{name}, {what}: {_accuracy(figures)}")
            if not figures["scores_vary"]:
                lines.append(f"note: {name} gives all images the same score")
        first = next(iter(by.values()))
        for group in ("by_source", "by_category"):
            if len(first[group]) > 1:
                lines += [f"  {group[3:]} {key or '(none)'}: {_accuracy(own)}" for key, own in first[group].items()]
    for name, figures in report["agreement"].items():
        same = figures["same_choice"]
        lines.append(f"same choice as {name}: {'-' if same is None else f'{same:.3f}'}")
    return lines


def _accuracy(figures: dict[str, Any]) -> str:
    if figures["accuracy"] is None:
        return f"no decided pairs, {figures['ties']} ties"
    ties = f", {figures['ties']} ties apart" if figures["ties"] else ""
    return f"{figures['accuracy']:.3f} +- {figures['standard_error']:.3f} of {figures['pairs']} decided pairs{ties}"

"""The command `compare`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rsm_guidance.cli.options import (
    ModelGroup,
    ModelOptions,
    SamplerGroup,
    SamplerOptions,
    listed,
    load_reward,
    numbers,
    running,
    say,
)
from rsm_guidance.core.errors import UsageError

if TYPE_CHECKING:
    from rsm_guidance.samplers import Sampler


@dataclass(frozen=True)
class Compare:
    """Compare samplers at equal budgets: curves, a picture and a report.

    rsm-guidance compare "a green triangle left of a red star" --samplers none,best-of-n,stepwise --budget 160 --out report/

    rsm-guidance compare --samplers none,best-of-n,stepwise:trajectories=2 --budgets 80,160 --prompts prompts.txt \\
        --guide shapes-drm --monitor shapes-verifier --out report/

    accelerate launch -m rsm_guidance compare --samplers all --budgets 160 --prompts prompts.txt --out report/
    """

    prompt: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[PROMPT]")] = None
    """What to draw, instead of --prompts."""
    prompts: Path | None = None
    """UTF-8 text with one prompt per line, or JSON lines with a "prompt" field in a .jsonl file."""
    samplers: str = "none,best-of-n,stepwise"
    """Names, separated by commas, each with options of its own, as in stepwise:trajectories=2; "all" for all."""
    budget: float = 160.0
    """Denoiser evaluations (NFE) per image; samplers take as many candidates as it pays for."""
    budgets: str | None = None
    """Several budgets, separated by commas, instead of --budget."""
    guide: str | None = None
    """The proxy reward, which samplers maximise; default: --reward."""
    monitor: str | None = None
    """Gold (held-out) rewards, separated by commas, which no sampler sees; the first is in the curves."""
    out: Path = Path("report")
    """Folder for report.json, report.md, curves.png and comparison.png; a comparison found in it goes on."""
    images: int = 4
    """Images of a single prompt."""
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
        prompts = self._prompts()
        samplers = samplers_of(self.samplers, self.options)
        budgets = (self.budget,) if self.budgets is None else numbers(self.budgets, "--budgets")
        from rsm_guidance.evaluation.compare import Comparison, compare
        from rsm_guidance.io.files import require_writable

        require_writable(self.out / "report.json")
        pipe, reward, generation = self.model.load()
        config = Comparison(
            prompts, samplers, budgets, self.out, self.seed, self.pairs if self.prompt is None else 0,
            batch_size=self.batch_size, autocast=self.autocast,
        )  # fmt: skip
        guide = reward if self.guide is None else load_reward(self.guide, pipe)
        monitors = {name: load_reward(name, pipe) for name in listed(self.monitor or "")}
        with resumable(self.out), running(self.model.model):
            report = compare(config, pipe, generation, guide, monitors)
        say_report(report)

    def _prompts(self) -> list[str]:
        from rsm_guidance.io.files import read_prompts

        if self.images < 1 or self.batch_size < 1 or self.pairs < 0:
            raise UsageError(
                f"--images and --batch-size must be at least 1, --pairs at least 0; got {self.images}, {self.batch_size}, "
                f"{self.pairs}"
            )
        if (self.prompt is None) == (self.prompts is None):
            raise UsageError("give one prompt, or --prompts with a file of them")
        if self.prompts is not None:
            return read_prompts(self.prompts)
        if not str(self.prompt).strip():
            raise UsageError("the prompt is empty; say what to draw")
        return [str(self.prompt)] * self.images


def samplers_of(text: str, options: SamplerOptions) -> dict[str, Sampler]:
    """Samplers by their names between commas; `none` takes the transition of the options alone."""
    from rsm_guidance.samplers import SAMPLERS

    names = list(SAMPLERS) if text.strip() == "all" else listed(text)
    if not names:
        raise UsageError("--samplers names no sampler; give at least one, such as none,stepwise")
    plain = SamplerOptions(transition=options.transition, noise=options.noise)
    return {name: (plain if name.partition(":")[0] == "none" else options).build(name) for name in names}


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Say, where Ctrl-C ends a comparison, how to go on."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise KeyboardInterrupt(
            f"with the finished parts in {out / 'runs'}: run the same command again to go on"
        ) from interrupt


def say_report(report: dict[str, Any]) -> None:
    """One JSON object per run of a comparison, and one for each that the budget did not pay for."""
    for key, run in report["runs"].items():
        shown = {k: run[k] for k in ("reward", "monitors", "evaluations", "seconds", "diversity") if k in run}
        say({"run": key, "sampler": run["label"], "images": len(report["prompts"]), **shown})
    for key, reason in report["skipped"].items():
        say({"skipped": key, "reason": reason})

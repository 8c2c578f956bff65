"""The command `sample`."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rsm_guidance.cli.options import ModelGroup, ModelOptions, SamplerGroup, SamplerOptions, budget_of, say
from rsm_guidance.core.errors import UsageError

if TYPE_CHECKING:
    from rsm_guidance.samplers import Progress


@dataclass(frozen=True)
class Sample:
    """Make one image under guidance.

    rsm-guidance sample "two blue squares and a yellow star" --out out.png

    rsm-guidance sample "a red star" --sampler best-of-n --candidates 8 --seed 3 --trace trace.json

    rsm-guidance sample "a photo of a cat" --model stabilityai/stable-diffusion-3.5-medium --reward my_package.rewards:aesthetic
    """

    prompt: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PROMPT")]
    """What to draw."""
    out: Path = Path("out.png")
    """Image file to write."""
    trace: Path | None = None
    """JSON file for the record of every candidate, score and choice."""
    plot: Path | None = None
    """PNG or SVG file for a drawing of that record: candidates, lineages or the tree."""
    seed: int = 0
    """The same seed gives the same image."""
    budget: float | None = None
    """Hard cap on denoiser evaluations (NFE)."""
    seconds: float | None = None
    """Deadline; the best so far is written."""
    sampler: str = "stepwise"
    """Name of a sampler, with options of its own, as in stepwise:trajectories=2:transition=cps 0.8; "none" is unguided."""
    value: str | None = None
    """What scores noisy latents, where it is not the reward: tweedie, smoothed, lookahead, or a diffusion reward model."""
    options: SamplerGroup = field(default_factory=SamplerOptions)
    model: ModelGroup = field(default_factory=ModelOptions)

    def run(self) -> None:
        self._check()
        from tqdm.auto import tqdm

        from rsm_guidance.io.files import write_image, write_json
        from rsm_guidance.values import resolve_value

        sampler, budget = self.options.build(self.sampler), budget_of(self.budget, self.seconds)
        pipe, reward, generation = self.model.load()
        with tqdm(desc=sampler.name, unit="step") as bar:

            def on_step(event: Progress) -> None:
                bar.total = max(bar.total or 0, bar.n + event.levels - event.level + 1)
                bar.update()

            out = pipe(
                prompt=self.prompt,
                sampler=sampler,
                reward=reward,
                value=None if self.value is None else resolve_value(self.value, pipe),
                seed=self.seed,
                budget=budget,
                on_step=on_step,
                **generation.call(),
            )
        write_image(self.out, out.images[0])
        if self.trace is not None:
            write_json(self.trace, out.trace)
        if self.plot is not None:
            from rsm_guidance.evaluation.report.traces import write_trace_picture  # matplotlib takes its time

            write_trace_picture(self.plot, out.trace)
        if out.ledger.stopped in ("interrupted", "deadline"):
            print(f"rsm-guidance: stopped early ({out.ledger.stopped}); {self.out} is the best so far", file=sys.stderr)
        say({"image": str(self.out), "reward": (out.rewards or [None])[0], **out.ledger.to_dict()})

    def _check(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        from rsm_guidance.io.files import require_image_name, require_writable

        if not self.prompt.strip():
            raise UsageError("the prompt is empty; say what to draw")
        require_image_name(self.out)
        files = [path.resolve() for path in (self.out, self.trace, self.plot) if path is not None]
        if len(set(files)) < len(files):
            raise UsageError("--out, --trace and --plot must name different files, or one overwrites another")
        if self.plot is not None and self.plot.suffix.lower() not in (".png", ".svg"):
            raise UsageError(f"cannot draw into {self.plot}: name a .png or .svg file")
        for path in (self.trace, self.plot):
            if path is not None:
                require_writable(path)

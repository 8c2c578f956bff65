"""The command `sample`."""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rsm_guidance.cli.options import ModelGroup, ModelOptions, SamplerGroup, SamplerOptions, budget_of, running, say
from rsm_guidance.core.errors import UsageError

if TYPE_CHECKING:
    from rsm_guidance.samplers import Progress


_OF_VIDEOS = {"num_frames", "video_length"}


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
    """Image file to write, with what made it in a PNG's text; for video models a .gif, .webp or .mp4."""
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

        from rsm_guidance.io.files import write_json
        from rsm_guidance.values import resolve_value

        sampler, budget = self.options.build(self.sampler), budget_of(self.budget, self.seconds)
        pipe, reward, generation = self.model.load()
        call = generation.call() | self._output(pipe)
        with running(self.model.model), tqdm(desc=sampler.name, unit="step") as bar:

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
                **call,
            )
        self._write(out, pipe, call)
        if self.trace is not None:
            write_json(self.trace, out.trace)
        if self.plot is not None:
            from rsm_guidance.evaluation.report.traces import write_trace_picture  # matplotlib takes its time

            write_trace_picture(self.plot, out.trace)
        if out.ledger.stopped in ("interrupted", "deadline"):
            print(f"rsm-guidance: stopped early ({out.ledger.stopped}); {self.out} is the best so far", file=sys.stderr)
        say({"image": str(self.out), "reward": (out.rewards or [None])[0], **out.ledger.to_dict()})

    def _output(self, pipe: Any) -> dict[str, Any]:
        """What the call is asked for; refuses a file that cannot hold it, before the run."""
        import inspect

        from rsm_guidance.evaluation.media import require_video_name
        from rsm_guidance.io.files import require_image_name

        taken = inspect.signature(type(pipe).__call__).parameters
        if any(name.startswith("audio_") for name in taken):
            raise UsageError(
                f"{type(pipe).__name__} makes sound, which this command does not write; call it from Python"
            )
        if taken.keys() & _OF_VIDEOS:
            require_video_name(self.out)
        else:
            require_image_name(self.out)
        return {"output_type": "pil"}

    def _write(self, out: Any, pipe: Any, call: dict[str, Any]) -> None:
        """Write the image, with what made it where the format is PNG, or the video."""
        from PIL import Image

        from rsm_guidance.evaluation.media import png_text, write_video
        from rsm_guidance.io.files import write_image

        first = out.images[0]
        if not isinstance(first, Image.Image):
            write_video(self.out, first)
        elif self.out.suffix.lower() == ".png":
            write_image(self.out, first, pnginfo=png_text(*self._made_by(out, pipe, call, first.size)))
        else:
            write_image(self.out, first)

    def _made_by(
        self, out: Any, pipe: Any, call: dict[str, Any], size: tuple[int, int]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What made an image: by the names that other programs read, and all of it."""
        import rsm_guidance

        sampler = dict(out.trace["sampler"])
        score = (out.rewards or [None])[0]
        common = {
            "Prompt": self.prompt,
            "Negative prompt": call.get("negative_prompt"),
            "Steps": out.trace["steps"],
            "Sampler": sampler["name"],
            "Schedule type": type(pipe.scheduler).__name__,
            "CFG scale": call.get("guidance_scale"),
            "Seed": self.seed,
            "Size": f"{size[0]}x{size[1]}",
            "Model": self.model.model,
            "Reward": self.model.reward,
            "Reward score": score,
            "Version": f"rsm-guidance {rsm_guidance.__version__}",
        }
        ours = {"model": dataclasses.asdict(self.model), "sampler": sampler, "reward_score": score, "seed": self.seed}
        ours |= {"prompt": self.prompt, "call": {n: v for n, v in call.items() if n != "output_type"}}
        return common, ours

    def _check(self) -> None:
        """Refuse what cannot work before anything is loaded."""
        from rsm_guidance.evaluation.media import require_video_name
        from rsm_guidance.io.files import require_image_name, require_writable

        if not self.prompt.strip():
            raise UsageError("the prompt is empty; say what to draw")
        if self.out.suffix.lower() == ".mp4":
            require_video_name(self.out)
        else:
            require_image_name(self.out)
        files = [path.resolve() for path in (self.out, self.trace, self.plot) if path is not None]
        if len(set(files)) < len(files):
            raise UsageError("--out, --trace and --plot must name different files, or one overwrites another")
        if self.plot is not None and self.plot.suffix.lower() not in (".png", ".svg"):
            raise UsageError(f"cannot draw into {self.plot}: name a .png or .svg file")
        for path in (self.trace, self.plot):
            if path is not None:
                require_writable(path)

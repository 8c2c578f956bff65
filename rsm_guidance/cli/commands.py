"""The commands on images: sample, compare, score, evaluate."""

import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm

from rsm_guidance.cli.options import ModelOptions, SamplerOptions, budget_of
from rsm_guidance.evaluation.compare import Comparison, compare
from rsm_guidance.io.files import (
    read_image,
    read_prompts,
    require_image_name,
    require_writable,
    write_image,
    write_json,
)
from rsm_guidance.evaluation.generate import Generation, generate, load_pipeline, scores_of
from rsm_guidance.rewards import shapes_correct, shapes_verifier
from rsm_guidance.samplers import SAMPLERS, Progress, Sampler
from rsm_guidance.shapes.render import IMAGE_SIZE
from rsm_guidance.values import DiffusionRewardModel, load_judge, load_value


def _say(data: dict[str, Any]) -> None:
    print(json.dumps(data), flush=True)


@dataclass(frozen=True)
class Sample:
    """Make one image under guidance.

    rsm-guidance sample "two red circles and a blue square" --out out.png

    rsm-guidance sample "a red star" --sampler best-of-n --candidates 8 --seed 3 --trace trace.json

    rsm-guidance sample "a photo of a cat" --model stabilityai/stable-diffusion-3.5-medium --reward my_package.rewards:aesthetic
    """

    prompt: tyro.conf.Positional[str]
    """What to draw."""
    out: Path = Path("out.png")
    """Image file to write."""
    trace: Path | None = None
    """JSON file for the record of every candidate, score and choice."""
    plot: Path | None = None
    """PNG or SVG file for a drawing of that record: candidates, lineages or the tree."""
    sampler: str = "stepwise"
    """A name of the README's table, with options of its own, as in stepwise:trajectories=2."""
    value: str | None = None
    """Judge of noisy latents, where it is not the reward: a reward model, or tweedie, smoothed or lookahead."""
    seed: int = 0
    """The same seed gives the same image."""
    budget: float | None = None
    """Hard cap on denoiser evaluations."""
    seconds: float | None = None
    """Deadline; the best so far is written."""
    options: tyro.conf.OmitArgPrefixes[SamplerOptions] = field(default_factory=SamplerOptions)
    of: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)

    def run(self) -> None:
        sampler = self.options.build(self.sampler)
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; say what to draw")
        require_image_name(self.out)
        files = [path.resolve() for path in (self.out, self.trace, self.plot) if path is not None]
        if len(set(files)) < len(files):
            raise ValueError("--out, --trace and --plot must name different files, or one overwrites another")
        if self.trace is not None:
            require_writable(self.trace)
        if self.plot is not None and self.plot.suffix.lower() not in (".png", ".svg"):
            raise ValueError(f"cannot draw into {self.plot}: name a .png or .svg file")
        if self.plot is not None:
            require_writable(self.plot)
        pipe, judge = load_pipeline(self.of.model_id, self.of.dtype), self.of.judge()
        generation = Generation.for_model(self.of.model_id, self.of.steps, self.of.guidance_scale)
        with tqdm(desc=sampler.name, unit="step") as bar:

            def on_step(event: Progress) -> None:
                bar.total = max(bar.total or 0, bar.n + event.levels - event.level + 1)
                bar.update()

            out = pipe(
                prompt=self.prompt,
                sampler=sampler,
                reward=judge,
                value=None if self.value is None else load_value(self.value),
                seed=self.seed,
                budget=budget_of(self.budget, self.seconds),
                on_step=on_step,
                **generation.call(),
            )
        write_image(self.out, out.images[0])
        if self.trace is not None:
            write_json(self.trace, out.trace)
        if self.plot is not None:
            from rsm_guidance.evaluation.traces import write_trace_picture  # matplotlib takes its time

            write_trace_picture(self.plot, out.trace)
        if out.ledger.stopped in ("interrupted", "deadline"):
            print(f"rsm-guidance: stopped early ({out.ledger.stopped}); {self.out} is the best so far", file=sys.stderr)
        _say({"image": str(self.out), "reward": (out.rewards or [None])[0], **out.ledger.to_dict()})


@dataclass(frozen=True)
class Compare:
    """Compare samplers at equal budgets: curves, a picture and a report.

    rsm-guidance compare "a green triangle left of a red star" --samplers none,best-of-n,stepwise --budget 160 --out report/

    rsm-guidance compare --samplers none,best-of-n,stepwise:trajectories=2 --budgets 80,160 --prompts prompts.txt \\
        --guide shapes-drm --monitor shapes-verifier --out report/

    accelerate launch -m rsm_guidance compare --samplers all --budgets 160 --prompts prompts.txt --out report/
    """

    prompt: tyro.conf.Positional[str | None] = None
    """What to draw, instead of --prompts."""
    prompts: Path | None = None
    """UTF-8 text with one prompt per line, or JSON lines with a "prompt" field in a .jsonl file."""
    samplers: str = "none,best-of-n,stepwise"
    """Names, separated by commas, each with options of its own, as in stepwise:trajectories=2; "all" for all.  Each steps by
    its own transition unless --transition or its own options say otherwise."""
    budget: float = 160.0
    """Denoiser evaluations per image; samplers take as many candidates as it pays for."""
    budgets: str | None = None
    """Several budgets, separated by commas, instead of --budget."""
    guide: str | None = None
    """What guides; default: --reward."""
    monitor: str | None = None
    """Rewards that no sampler sees, separated by commas, reported beside the guide; the first is in the curves."""
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
    options: tyro.conf.OmitArgPrefixes[SamplerOptions] = field(default_factory=SamplerOptions)
    of: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)

    def run(self) -> None:
        if self.images < 1 or self.batch_size < 1 or self.pairs < 0:
            raise ValueError(
                f"--images and --batch-size must be at least 1, --pairs at least 0; got {self.images}, {self.batch_size}, "
                f"{self.pairs}"
            )
        if (self.prompt is None) == (self.prompts is None):
            raise ValueError("give one prompt, or --prompts with a file of them")
        if self.prompt is not None and not self.prompt.strip():
            raise ValueError("the prompt is empty; say what to draw")
        prompts = [str(self.prompt)] * self.images if self.prompts is None else read_prompts(self.prompts)
        names = list(SAMPLERS) if self.samplers.strip() == "all" else _listed(self.samplers)
        if not names:
            raise ValueError("--samplers names no sampler; give at least one, such as none,stepwise")
        plain = SamplerOptions(transition=self.options.transition, noise=self.options.noise)
        samplers = {n: (plain if n.partition(":")[0] == "none" else self.options).build(n) for n in names}
        try:
            budgets = tuple(float(b) for b in self.budgets.split(",")) if self.budgets else (self.budget,)
        except ValueError as error:
            raise ValueError(f"--budgets takes numbers, separated by commas; got {self.budgets!r}") from error
        require_writable(self.out / "report.json")
        pipe, judge = load_pipeline(self.of.model_id, self.of.dtype), self.of.judge()
        generation = Generation.for_model(self.of.model_id, self.of.steps, self.of.guidance_scale)
        config = Comparison(
            prompts, samplers, budgets, self.out, self.seed, self.pairs if self.prompt is None else 0,
            batch_size=self.batch_size, autocast=self.autocast,
        )  # fmt: skip
        guide = judge if self.guide is None else load_judge(self.guide)
        monitors = {name: load_judge(name) for name in _listed(self.monitor or "")}
        try:
            report = compare(config, pipe, generation, guide, monitors)
        except KeyboardInterrupt as interrupt:
            raise KeyboardInterrupt(
                f"with the finished parts in {self.out / 'runs'}: run the same command again to go on"
            ) from interrupt
        for key, run in report["runs"].items():
            shown = {k: run[k] for k in ("reward", "monitors", "evaluations", "seconds", "diversity") if k in run}
            _say({"run": key, "sampler": run["label"], "images": len(prompts), **shown})
        for key, reason in report["skipped"].items():
            _say({"skipped": key, "reason": reason})


def _listed(text: str) -> list[str]:
    """Entries between commas that stand in no brackets."""
    return [n.strip() for n in re.split(r",(?![^\[(]*[\])])", text) if n.strip()]


@dataclass(frozen=True)
class Score:
    """Score images under a prompt; one JSON object per image.

    rsm-guidance score out.png --prompt "two red circles and a blue square" --reward shapes-verifier
    """

    images: tyro.conf.Positional[tuple[Path, ...]]
    """Image files."""
    prompt: str
    """What they should show."""
    reward: str = "shapes-drm"
    """A name, the folder or hub id of a diffusion reward model, or package.module:object."""

    def run(self) -> None:
        if not self.images:
            raise ValueError("no images were given; name at least one file")
        if not self.prompt.strip():
            raise ValueError("the prompt is empty; say what the images should show")
        judge = load_judge(self.reward)
        size: tuple[int, int] | None = None
        if isinstance(judge, DiffusionRewardModel):
            size = (judge.image_size, judge.image_size)
        elif judge in (shapes_verifier, shapes_correct):
            size = (IMAGE_SIZE, IMAGE_SIZE)
        for path, image in [(p, read_image(p, size)) for p in self.images]:
            [score] = scores_of(judge, image, [self.prompt])
            _say({"image": str(path), "prompt": self.prompt, "score": score})


@dataclass(frozen=True)
class Evaluate:
    """Make one image for every prompt of a file and score them.

    rsm-guidance evaluate --pipeline shapes --prompts prompts.txt --reward shapes-verifier --json out.json
    """

    prompts: Path
    """UTF-8 text with one prompt per line, or JSON lines with a "prompt" field in a .jsonl file."""
    json: Path
    """Where the result goes."""
    sampler: str = "none"
    """A name of the README's table, with options of its own, as in stepwise:trajectories=2."""
    guide: str | None = None
    """What guides the sampler; default: the reward."""
    seed: int = 0
    """Names all random numbers."""
    batch_size: int = 16
    """Prompts per batch; changes no image."""
    images: Path | None = None
    """Folder to keep the images in."""
    options: tyro.conf.OmitArgPrefixes[SamplerOptions] = field(default_factory=SamplerOptions)
    of: tyro.conf.OmitArgPrefixes[ModelOptions] = field(default_factory=ModelOptions)

    def run(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch-size must be at least 1; got {self.batch_size}")
        sampler: Sampler = self.options.build(self.sampler)
        prompts = read_prompts(self.prompts)
        require_writable(self.json)
        if self.images is not None:
            require_writable(self.images / "00000.png")
        judge = self.of.judge()
        guide = judge if self.guide is None else load_judge(self.guide)
        pipe = load_pipeline(self.of.model_id, self.of.dtype)
        generation = Generation.for_model(self.of.model_id, self.of.steps, self.of.guidance_scale)
        samples = []
        with tqdm(total=len(prompts), desc=sampler.name, unit="image") as bar:
            for batch in generate(pipe, prompts, sampler, guide, generation, self.seed, self.batch_size):
                samples += batch
                bar.update(len(batch))
        samples.sort(key=lambda s: s.index)
        rewards = [s.reward for s in samples]
        if guide is not judge:
            pixels = [torch.from_numpy(np.array(s.image.convert("RGB"))).permute(2, 0, 1)[None] / 255 for s in samples]
            rewards = [scores_of(judge, p, [s.prompt])[0] for p, s in zip(pixels, samples, strict=True)]
        values = np.array(rewards, float)
        report = {
            "pipeline": self.of.model,
            "sampler": repr(sampler),
            "reward": self.of.reward,
            "seed": self.seed,
            "mean_reward": float(values.mean()),
            "standard_error": float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None,
            "evaluations_per_image": float(np.mean([s.evaluations for s in samples])),
            "seconds_per_image": float(np.mean([s.seconds for s in samples])),
            "images": [{"prompt": s.prompt, "reward": r} for s, r in zip(samples, rewards, strict=True)],
        }
        write_json(self.json, report)
        if self.images is not None:
            for s in samples:
                write_image(self.images / f"{s.index:05d}.png", s.image)
        _say({k: v for k, v in report.items() if k != "images"})

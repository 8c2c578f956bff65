"""Every sampler at every budget on the same prompts: `rsm-guidance compare`.

The cost is the number of denoiser evaluations (NFE): classifier-free guidance counts twice, a value model by its share of
the depth, a backward pass at twice what it differentiates.  A budget is a hard cap per image; within it each sampler is as
large as a dry run says it may be.  All samplers share prompts and seeds, so that differences are paired.  Each steps by its
own transition unless it is given another: beside `none` as it comes, compare `none` with the transition of the others.

The *guide* is the proxy reward that samplers maximise, the *monitors* are gold (held-out) rewards that none of them sees.

Runs are cut into chunks of prompts, each written when it is done: an interrupted comparison goes on where it stopped, and
under `accelerate launch` every process takes its share of the chunks.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm.auto import tqdm

from rsm_guidance.core.contracts import Reward
from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.ledger import Budget
from rsm_guidance.engine.families import denoisers_of
from rsm_guidance.evaluation.generate import (
    Generation,
    Sample,
    copies_of,
    costs_of,
    fingerprint,
    generate,
    pixels_of,
    scores_of,
)
from rsm_guidance.evaluation.report.pictures import grid
from rsm_guidance.evaluation.report.tables import comparison_table
from rsm_guidance.evaluation.statistics import mean_interval
from rsm_guidance.io.files import read_text, require_regular, write_atomically, write_image, write_json
from rsm_guidance.samplers import Sampler, Unguided
from rsm_guidance.samplers.planning import Costs, fit_to_budget

_SECOND = 1_000_003  # offset of the seed of second images


@dataclass(frozen=True)
class Comparison:
    """What is compared.

    Attributes:
        prompts: one image is made for each.
        samplers: labels and samplers; `none` is one run, the others one per budget.
        budgets: NFE per image.
        out: folder of the report.
        seed: names all random numbers.
        pairs: number of prompts that get a second image with another seed, whose distance from the first is the diversity.
        shown: number of prompts in the picture.
        batch_size: prompts per call; changes no image.
        chunk: prompts per chunk of work.
        autocast: run in bfloat16 autocast, which is faster on CPUs; figures are reported as such.
    """

    prompts: list[str]
    samplers: dict[str, Sampler]
    budgets: tuple[float, ...]
    out: Path
    seed: int = 0
    pairs: int = 32
    shown: int = 4
    batch_size: int = 16
    chunk: int = 64
    autocast: bool = False


@dataclass(frozen=True)
class _Run:
    label: str
    budget: float | None
    sampler: Sampler

    @property
    def key(self) -> str:
        return self.label if self.budget is None else f"{self.label}@{self.budget:g}"


def compare(
    config: Comparison,
    pipe: DiffusionPipeline,
    generation: Generation,
    guide: Reward,
    monitors: Mapping[str, Reward] | None = None,
) -> dict[str, Any]:
    """Run what is missing, write report.json, report.md, curves.png and comparison.png, and return the report.

    Args:
        config: what to compare.
        pipe: a reward-guided pipeline.
        generation: arguments of its call.
        guide: the proxy reward, which samplers maximise.
        monitors: gold rewards, which none of them sees, by name.

    Raises:
        UsageError: if no budget pays for any of the samplers.
    """
    costs = costs_of(pipe, generation, guide)
    plan, skipped = _plan(config, costs)
    settings = {
        "steps": costs.schedule.steps, "unguided_cost": costs.once, "seed": config.seed, "autocast": config.autocast,
        "guidance_scale": generation.guidance_scale, "denoiser": " ".join(map(fingerprint, denoisers_of(pipe).values())),
        "guide": _named(guide), "monitors": {name: _named(reward) for name, reward in (monitors or {}).items()},
    }  # fmt: skip
    state = PartialState()
    chunks = [
        list(range(i, min(i + config.chunk, len(config.prompts)))) for i in range(0, len(config.prompts), config.chunk)
    ]
    work = [(run, chunk, second) for run in plan for chunk, second in _chunks(config, chunks)]
    for run, chunk, second in tqdm(work[state.process_index :: state.num_processes], desc="compare", unit="chunk"):
        _work(config, settings, run, chunk, second, pipe, generation, guide, monitors or {})
    state.wait_for_everyone()
    report: dict[str, Any] = {"settings": settings, "prompts": config.prompts, "skipped": skipped, "runs": {}}
    for run in plan:
        parts = [_read(config, settings, run, chunk, second) for chunk, second in _chunks(config, chunks)]
        report["runs"][run.key] = _summary(config, run, [p for p in parts if p is not None])
    _against_unguided(report)
    if state.is_main_process:
        from rsm_guidance.evaluation.report.curves import curves  # loads matplotlib, which other processes need not

        text = comparison_table(report) + "\n"
        write_atomically(config.out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
        write_json(config.out / "report.json", report)
        write_atomically(config.out / "curves.png", lambda path: curves(report).savefig(path, dpi=130))
        write_image(config.out / "comparison.png", _picture(config, plan))
    state.wait_for_everyone()
    return report


def _plan(config: Comparison, costs: Costs) -> tuple[list[_Run], dict[str, str]]:
    """Every run, as large as its budget pays for, and why the others are left out.

    Raises:
        UsageError: if no budget pays for any of the guided samplers.
    """
    plan: list[_Run] = []
    skipped: dict[str, str] = {}
    for label, sampler in config.samplers.items():
        if isinstance(sampler, Unguided):
            plan.append(_Run(label, None, sampler))
            continue
        for budget in config.budgets:
            try:
                plan.append(_Run(label, budget, fit_to_budget(sampler, budget, costs)))
            except ValueError as error:
                skipped[f"{label}@{budget:g}"] = str(error)
    if skipped and not any(run.budget for run in plan):
        raise UsageError(next(iter(skipped.values())))
    return plan, skipped


def budgets_at(multiples: tuple[float, ...], costs: Costs) -> tuple[float, ...]:
    """Budgets per image as multiples of the cost of an unguided one."""
    if not multiples or not all(1 <= m < math.inf for m in multiples):
        raise UsageError(f"budgets are multiples, at least 1, of the cost of an unguided image; got {multiples}")
    return tuple(multiple * costs.once for multiple in multiples)


def _named(reward: Reward) -> str:
    """The name of a reward, and the fingerprint of its weights where it is a model."""
    return f"{reward.name} {fingerprint(reward)}" if isinstance(reward, torch.nn.Module) else reward.name


# --- chunks of work ---


def _chunks(config: Comparison, chunks: list[list[int]]) -> Iterator[tuple[list[int], bool]]:
    yield from ((chunk, False) for chunk in chunks)
    second = list(range(min(config.pairs, len(config.prompts))))
    if second:
        yield second, True


def _path(config: Comparison, run: _Run, chunk: list[int], second: bool) -> Path:
    name = run.key.replace("/", "_").replace(" ", "_")
    return config.out / "runs" / f"{name}.{'second' if second else f'{chunk[0]:05d}'}.json"


def _asked(config: Comparison, settings: dict[str, Any], run: _Run, chunk: list[int]) -> dict[str, Any]:
    prompts = [config.prompts[i] for i in chunk]
    return {
        "settings": settings, "sampler": repr(run.sampler), "budget": run.budget, "prompts": prompts,
        "copies": _copies(config, chunk),
    }  # fmt: skip


def _copies(config: Comparison, chunk: list[int]) -> list[int]:
    """Which repetition of its prompt each image is, among all prompts and not in its chunk alone."""
    copies = copies_of(config.prompts)
    return [copies[i] for i in chunk]


def _read(
    config: Comparison, settings: dict[str, Any], run: _Run, chunk: list[int], second: bool
) -> dict[str, Any] | None:
    """A finished chunk, or None if it or one of its images is missing, damaged, or of other settings."""
    try:
        found: dict[str, Any] = json.loads(read_text(_path(config, run, chunk, second)))
        asked = found["asked"] == _asked(config, settings, run, chunk)
        columns = [found[name] for name in ("reward", "evaluations", "seconds")] + [*found["monitors"].values()]
        whole = all(len(column) == len(chunk) and np.isfinite(column).all() for column in columns)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    whole = whole and found["monitors"].keys() == settings["monitors"].keys()
    shown = all(_image(config, run, index, second) is not None for index in _kept_images(config, chunk))
    return found if asked and whole and shown else None


def _work(
    config: Comparison,
    settings: dict[str, Any],
    run: _Run,
    chunk: list[int],
    second: bool,
    pipe: DiffusionPipeline,
    generation: Generation,
    guide: Reward,
    monitors: Mapping[str, Reward],
) -> None:
    if _read(config, settings, run, chunk, second) is not None:
        return
    prompts = [config.prompts[i] for i in chunk]
    seed = config.seed + _SECOND * second
    cap = None if run.budget is None else Budget(evaluations=run.budget)
    samples: list[Sample] = []
    with torch.autocast(pipe.device.type, torch.bfloat16, enabled=config.autocast):
        copies = _copies(config, chunk)
        for batch in generate(pipe, prompts, run.sampler, guide, generation, seed, config.batch_size, cap, copies):
            samples += batch
    samples.sort(key=lambda s: s.index)
    pixels = pixels_of([s.image for s in samples])
    path = _path(config, run, chunk, second)
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = _kept_images(config, chunk)
    for s in samples:
        if chunk[s.index] in kept:
            write_image(path.with_name(f"{path.stem}.{chunk[s.index]:05d}.png"), s.image)
    result = {
        "asked": _asked(config, settings, run, chunk),
        "reward": [s.reward for s in samples],
        "monitors": {name: scores_of(reward, pixels, prompts) for name, reward in monitors.items()},
        "evaluations": [s.evaluations for s in samples],
        "seconds": [s.seconds for s in samples],
    }
    write_json(path, result)


# --- the report ---


def _summary(config: Comparison, run: _Run, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The figures of one run, with 95% intervals over prompts."""
    first = parts[: math.ceil(len(config.prompts) / config.chunk)]
    columns = {name: [x for p in first for x in p[name]] for name in ("reward", "evaluations", "seconds")}
    summary: dict[str, Any] = {
        "sampler": repr(run.sampler),
        "label": run.label,
        "budget": run.budget,
        "reward": _interval(columns["reward"]),
        "evaluations": float(np.mean(columns["evaluations"])),
        "seconds": float(np.mean(columns["seconds"])),
        "rewards": [round(x, 4) for x in columns["reward"]],
    }
    watched = {name: [round(x, 4) for p in first for x in p["monitors"][name]] for name in first[0]["monitors"]}
    summary |= {"monitored": watched, "monitors": {name: _interval(scores) for name, scores in watched.items()}}
    distances = [_distance(config, run, i) for i in range(min(config.pairs, len(config.prompts)))]
    known = [d for d in distances if d is not None]
    summary["diversity"] = _interval(known) if known else None
    return summary


def _interval(values: list[float]) -> list[float]:
    return [round(float(v), 5) for v in mean_interval(np.array(values, float))]


def _kept_images(config: Comparison, chunk: list[int]) -> list[int]:
    """The prompts of a chunk whose images are kept: for the picture, and to measure diversity."""
    return [index for index in chunk if index < max(config.shown, config.pairs)]


def _image(config: Comparison, run: _Run, index: int, second: bool) -> Image.Image | None:
    chunk = list(range(config.pairs)) if second else [index // config.chunk * config.chunk]
    path = _path(config, run, chunk, second)
    path = path.with_name(f"{path.stem}.{index:05d}.png")
    try:
        with Image.open(require_regular(path)) as file:
            return file.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _distance(config: Comparison, run: _Run, index: int) -> float | None:
    """Root mean square difference, in [0, 1], of the two images of a prompt."""
    pair = [_image(config, run, index, second) for second in (False, True)]
    if pair[0] is None or pair[1] is None:
        return None
    a, b = (np.asarray(image, float) / 255 for image in pair if image is not None)
    return float(np.sqrt(np.mean((a - b) ** 2)))


def _against_unguided(report: dict[str, Any]) -> None:
    """Gains over the first unguided run, paired, and the over-optimisation gap.

    The gap is the gain of the proxy reward minus that of the first gold reward, each in standard deviations of the unguided
    run.
    """
    base = next((r for r in report["runs"].values() if r["budget"] is None), None)
    if base is None:
        return
    for run in report["runs"].values():
        run["reward_gain"] = _interval(list(np.subtract(run["rewards"], base["rewards"])))
        watched = base["monitored"]
        run["monitor_gain"] = {n: _interval(list(np.subtract(run["monitored"][n], watched[n]))) for n in watched}
        if watched:
            first = next(iter(watched))
            spread = [float(np.std(values)) or 1.0 for values in (base["rewards"], watched[first])]
            run["over_optimisation_gap"] = run["reward_gain"][0] / spread[0] - run["monitor_gain"][first][0] / spread[1]


def _picture(config: Comparison, plan: list[_Run]) -> Image.Image:
    """The first prompts (rows) under every sampler (columns) at its largest budget."""
    last = {run.label: run for run in plan}
    rows, copies = [], copies_of(config.prompts)
    for index in range(min(config.shown, len(config.prompts))):
        caption = config.prompts[index] + (f" ({copies[index] + 1})" if copies[index] else "")
        images = [_image(config, run, index, False) or Image.new("RGB", (64, 64), "white") for run in last.values()]
        rows.append([(image, caption if i == 0 else "") for i, image in enumerate(images)])
    return grid(rows, 128, [run.key for run in last.values()])

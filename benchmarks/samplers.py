"""Samplers at equal cost on held-out captions of the shapes world: `python -m benchmarks.samplers --help`.

Cost counts denoiser evaluations, classifier-free guidance twice, and value-model calls by their share of the depth.
Every sampler steps with the same transition and starts from the same noise, so differences are paired per caption.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from benchmarks import script
from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.transitions import ODE
from rsm_guidance.evaluation.generate import Generation, Sample, costs_of, fingerprint, generate
from rsm_guidance.evaluation.report.tables import table
from rsm_guidance.evaluation.statistics import mean_interval
from rsm_guidance.io.files import write_json
from rsm_guidance.pipelines.load import load_pipeline
from rsm_guidance.rewards import resolve_reward
from rsm_guidance.samplers import BestOfN, Sampler, StepwiseSampling, Unguided, parse_sampler
from rsm_guidance.samplers.planning import Costs, fit_to_budget
from rsm_guidance.shapes import CATEGORIES, caption_set, parse_caption, verify

_SHORT = {"single_object": "single", "two_objects": "two", "counting": "count", "colors": "colours",
          "position": "position", "attribute_binding": "binding"}  # fmt: skip


@dataclass(frozen=True)
class Samplers:
    """Accuracy by the verifier and mean DRM score of none, best-of-n and stepwise at equal cost; interrupted runs resume.

    python -m benchmarks.samplers --autocast

    Attributes:
        out: JSON file for the result; finished runs found in it are not repeated.
        captions: number of unique held-out captions.
        multiples: budgets as multiples of an unguided image's cost.
        two_runs: budgets, at least 3, at which step-wise sampling also runs two trajectories.
        stepwise: step-wise sampling with its settings, as text; its transition is everyone's.
        model: packaged name, folder or hub id of the pipeline.
        reward: a diffusion reward model, which guides.
        seed: names all random numbers.
        batch_size: captions per batch.
        autocast: run in bfloat16 autocast, which is faster on CPUs; figures are reported as such.
    """

    out: Path = Path("benchmarks/results/samplers.json")
    captions: int = 512
    multiples: tuple[float, ...] = (2.0, 4.0, 8.0)
    two_runs: tuple[float, ...] = (4.0,)
    stepwise: str = "stepwise"
    model: str = "shapes"
    reward: str = "shapes-drm"
    seed: int = 0
    batch_size: int = 32
    autocast: bool = False


def verified(samples: list[Sample]) -> dict[str, Any]:
    """Verifier accuracy and score per caption and per category, with mean reward, cost and time."""
    verdicts = [verify(np.array(s.image), s.prompt) for s in samples]
    categories = [parse_caption(s.prompt).category for s in samples]
    correct = np.array([v.correct for v in verdicts], float)
    return {
        "correct": [int(c) for c in correct],
        "score": [round(v.score, 4) for v in verdicts],
        "reward": [None if s.reward is None else round(s.reward, 4) for s in samples],
        "accuracy": float(correct.mean()),
        "accuracy_by_category": {
            k: float(np.mean([c for c, at in zip(correct, categories, strict=True) if at == k]))
            for k in CATEGORIES
            if k in categories
        },
        "evaluations_per_image": float(np.mean([s.evaluations for s in samples])),
        "seconds_per_image": float(np.mean([s.seconds for s in samples])),
    }


def run_samplers(config: Samplers) -> dict[str, Any]:
    """Run what is missing of the benchmark, write the JSON after every sampler, and return it.

    Raises:
        UsageError: for a reward that is no diffusion reward model, or a sampler that is not step-wise sampling.
    """
    pipe = load_pipeline(config.model)
    reward: Any = resolve_reward(config.reward, pipe)
    if not hasattr(reward, "value"):
        raise UsageError("the benchmark compares samplers guided by a diffusion reward model; pass one as reward")
    generation = Generation.for_model(config.model)
    costs = costs_of(pipe, generation, reward)
    plan = planned_runs(config, costs)
    prompts = [c.text for c in caption_set(config.captions, 0)]
    settings = {
        "captions": config.captions, "seed": config.seed, "steps": costs.schedule.steps,
        "guidance_scale": generation.guidance_scale, "stepwise": config.stepwise, "autocast": config.autocast,
        "unguided_cost": costs.once, "denoiser": fingerprint(pipe.transformer), "reward": fingerprint(reward),
    }  # fmt: skip
    result: dict[str, Any] = {"settings": settings, "prompts": prompts, "runs": {}}
    if config.out.exists():
        found = json.loads(config.out.read_text())
        if found.get("settings") == settings:
            result["runs"] = found["runs"]
    for label, sampler in plan.items():
        described = repr(sampler)
        if result["runs"].get(label, {}).get("sampler") == described:
            continue
        samples: list[Sample] = []
        with (
            torch.autocast("cpu", torch.bfloat16, enabled=config.autocast),
            tqdm(total=len(prompts), desc=label) as bar,
        ):
            for batch in generate(pipe, prompts, sampler, reward, generation, config.seed, config.batch_size):
                samples += batch
                bar.update(len(batch))
        result["runs"][label] = {"sampler": described, **verified(samples)}
        write_json(config.out, result)
    result["runs"] = {k: result["runs"][k] for k in plan}
    result["comparisons"] = _comparisons(result["runs"], config)
    write_json(config.out, result)
    return result


def planned_runs(config: Samplers, costs: Costs) -> dict[str, Sampler]:
    """Every run by its label, as large as its budget pays for."""
    stepwise = parse_sampler(config.stepwise)
    if not isinstance(stepwise, StepwiseSampling):
        raise UsageError(f"the benchmark is of step-wise sampling; got {config.stepwise!r}")
    transition = stepwise.transition
    plan: dict[str, Sampler] = {"none": Unguided(transition), "none (ode)": Unguided(ODE())}
    for multiple in config.multiples:
        both: tuple[Sampler, ...] = (BestOfN(transition=transition), stepwise)
        for sampler in both:
            plan[f"{sampler.name} {multiple:g}x"] = fit_to_budget(sampler, multiple * costs.once, costs)
    twice = replace(stepwise, trajectories=2)
    for multiple in config.two_runs:
        plan[f"stepwise, 2 runs {multiple:g}x"] = fit_to_budget(twice, multiple * costs.once, costs)
    return plan


def _comparisons(runs: dict[str, Any], config: Samplers) -> dict[str, dict[str, list[float]]]:
    pairs = []
    for m in config.multiples:
        pairs += [
            (f"stepwise {m:g}x", "none"),
            (f"best-of-n {m:g}x", "none"),
            (f"stepwise {m:g}x", f"best-of-n {m:g}x"),
        ]
    pairs += [(f"stepwise, 2 runs {m:g}x", f"best-of-n {m:g}x") for m in config.two_runs if m in config.multiples]
    return {
        f"{a} - {b}": {
            "accuracy": list(mean_interval(np.subtract(runs[a]["correct"], runs[b]["correct"], dtype=float))),
            "reward": list(mean_interval(np.subtract(runs[a]["reward"], runs[b]["reward"], dtype=float))),
        }
        for a, b in pairs
    }


def samplers_table(result: dict[str, Any]) -> str:
    """The result as two Markdown tables: runs, and paired differences."""
    rows = []
    for label, run in result["runs"].items():
        by = run["accuracy_by_category"]
        reward = np.mean([r for r in run["reward"] if r is not None])
        rows.append(
            [label, f"{run['evaluations_per_image']:.0f}", f"**{run['accuracy']:.3f}**"]
            + [f"{by[k]:.2f}" if k in by else "" for k in _SHORT]
            + [f"{reward:.2f}", f"{run['seconds_per_image']:.2f}"]
        )
    differences = []
    for label, values in result["comparisons"].items():
        (a, lo, hi), (r, rlo, rhi) = values["accuracy"], values["reward"]
        differences.append([label, f"{a:+.3f} [{lo:+.3f}, {hi:+.3f}]", f"{r:+.2f} [{rlo:+.2f}, {rhi:+.2f}]"])
    return "\n\n".join([
        table(["sampler", "NFE", "accuracy", *_SHORT.values(), "DRM score", "s/image"], rows),
        table(["paired difference (95% interval)", "accuracy", "DRM score"], differences),
    ])  # fmt: skip


if __name__ == "__main__":
    script(Samplers, run_samplers, samplers_table)

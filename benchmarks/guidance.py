"""What damping does to gradient guidance by plug-in estimates: `python -m benchmarks.guidance --help`.

On mixtures with the exact denoiser: how far guided samples are from the tilted law.  On the embedded model: the gain of the proxy
reward, which guides, and that of the gold reward, the verifier, over unguided samples of the same seeds.  Guidance is Flow-NRG's,
v' = v - strength t / (1 - t) grad V (`push="velocity"`, `scale="plain"`), by the exact or learned value of noisy latents, or by
the plug-in estimate, the reward of the posterior mean.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from benchmarks import script
from benchmarks.exactness import mixture_task
from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import DDIM, GaussianTransition
from rsm_guidance.evaluation.generate import Generation, pixels_of, scores_of
from rsm_guidance.evaluation.report.tables import table
from rsm_guidance.evaluation.statistics import mean_interval
from rsm_guidance.io.files import write_json
from rsm_guidance.oracles.cases import CASES
from rsm_guidance.oracles.mixture import expected_reward, tilt
from rsm_guidance.pipelines.load import load_pipeline
from rsm_guidance.rewards import resolve_reward
from rsm_guidance.samplers import RewardGradient, Sampler, Unguided, run
from rsm_guidance.shapes import caption_set, verify

_STEP: GaussianTransition = DDIM(1.0)
_NRG = RewardGradient(1.0, "velocity", "plain", None, transition=_STEP)


@dataclass(frozen=True)
class Guidance:
    """Errors of guided samples on mixtures, and gains of proxy and gold reward on the embedded model.

    python -m benchmarks.guidance --captions 64

    Attributes:
        out: JSON file for the result.
        cases: names of mixtures, under rewards of their own; their curvature is the damping there.
        points: guided samples per mixture.
        captions: held-out captions on the embedded model; 0 leaves it out.
        strengths: of guidance on the embedded model, inverse temperatures.
        dampings: curvatures on the embedded model.
        steps: denoising steps, in both worlds.
        reward: the proxy, a diffusion reward model.
        bound: largest root mean square of a push on the embedded model.
        seed: names all random numbers.
        batch_size: captions per batch.
    """

    out: Path = Path("benchmarks/results/guidance.json")
    cases: tuple[str, ...] = ("linear", "ring", "grid", "random")
    points: int = 1000
    captions: int = 64
    strengths: tuple[float, ...] = (1.0, 3.0)
    dampings: tuple[float, ...] = (0.5, 2.0)
    steps: int = 20
    reward: str = "shapes-drm"
    bound: float = 1.0
    seed: int = 0
    batch_size: int = 16


def mixture_errors(config: Guidance, case: str, flow: bool) -> dict[str, Any]:
    """Per kind of guidance at temperature 1: E[r] minus the tilted law's, with its standard error."""
    mixture, reward = CASES[case]
    schedule = (NoiseSchedule.flow if flow else NoiseSchedule.variance_preserving)(config.steps)
    target = float(expected_reward(tilt(mixture, reward)[0], reward))
    curvature = float(reward.curvature.max())
    found: dict[str, Any] = {
        "case": case,
        "schedule": "flow" if flow else "vp",
        "target": target,
        "curvature": curvature,
    }
    kinds: dict[str, tuple[Sampler, bool]] = {
        "unguided": (Unguided(_STEP), True),
        "exact value": (_NRG, True),
        "plug-in": (_NRG, False),
        "plug-in, damped": (replace(_NRG, damping=curvature), False),
    }
    for name, (sampler, exact) in kinds.items():
        rewards = run(sampler, mixture_task(case, schedule, config.points, exact, config.seed)).rewards
        assert rewards is not None
        found[name] = [float(rewards.mean()) - target, float(rewards.std()) / config.points**0.5]
    return found


def model_runs(config: Guidance) -> dict[str, tuple[Sampler, str | None]]:
    """Every run on the embedded model by its label, with the estimator of its value (None for the reward model's own)."""
    runs: dict[str, tuple[Sampler, str | None]] = {"unguided": (Unguided(_STEP), None)}
    for strength in config.strengths:
        nrg = replace(_NRG, strength=strength, largest=config.bound)
        runs[f"learned value, {strength:g}"] = (nrg, None)
        runs[f"plug-in, {strength:g}"] = (nrg, "tweedie")
        for damping in config.dampings:
            runs[f"plug-in, {strength:g}, damping {damping:g}"] = (replace(nrg, damping=damping), "tweedie")
    return runs


def model_gains(config: Guidance) -> dict[str, Any]:
    """Proxy reward, the verifier's graded score and accuracy per caption, for every run."""
    pipe = load_pipeline("shapes")
    reward: Any = resolve_reward(config.reward, pipe)
    if not hasattr(reward, "value"):
        raise UsageError(
            "this compares the value of a diffusion reward model with its plug-in estimate; pass one as reward"
        )
    generation = Generation.for_model("shapes", config.steps)
    prompts = [c.text for c in caption_set(config.captions, 0)]
    runs: dict[str, Any] = {}
    for label, (sampler, estimator) in tqdm(model_runs(config).items(), desc="guidance", unit="run"):
        found: dict[str, list[float]] = {"proxy": [], "gold": [], "correct": []}
        for start in range(0, len(prompts), config.batch_size):
            batch = prompts[start : start + config.batch_size]
            call = {"sampler": sampler, "reward": reward, "value": estimator, "seed": config.seed}
            images = pipe(prompt=batch, **call, **generation.call()).images
            verdicts = [verify(np.array(image), prompt) for image, prompt in zip(images, batch, strict=True)]
            found["proxy"] += [round(s, 4) for s in scores_of(reward, pixels_of(images), batch)]
            found["gold"] += [round(v.score, 4) for v in verdicts]
            found["correct"] += [float(v.correct) for v in verdicts]
        runs[label] = found
    return runs


def run_guidance(config: Guidance) -> dict[str, Any]:
    """Run both worlds, write JSON, and return the result.

    Raises:
        UsageError: for an unknown case, or a reward without a value.
    """
    unknown = sorted(set(config.cases) - CASES.keys())
    if unknown:
        raise UsageError(f"unknown case {unknown[0]!r}; choose from {', '.join(CASES)}")
    mixtures = [mixture_errors(config, case, flow) for case in config.cases for flow in (True, False)]
    settings = {"captions": config.captions, "steps": config.steps, "bound": config.bound, "seed": config.seed}
    result = settings | {"reward": config.reward, "mixtures": mixtures, "runs": {}}
    write_json(config.out, result)
    if config.captions:
        result["runs"] = model_gains(config)
        write_json(config.out, result)
    return result


def guidance_table(result: dict[str, Any]) -> str:
    """Two Markdown tables: errors on mixtures, and gains on the embedded model.

    The gap is the gain of the proxy beyond that of the gold reward, each in standard deviations of unguided samples.
    """
    kinds = ("unguided", "exact value", "plug-in", "plug-in, damped")
    rows = [
        [m["case"], m["schedule"], f"{m['target']:.2f}", *(f"{m[k][0]:+.2f} ± {m[k][1]:.2f}" for k in kinds)]
        for m in result["mixtures"]
    ]
    tables = [table(["mixture", "schedule", "E*[r]", *kinds], rows)]
    if result["runs"]:
        plain = {k: np.array(v) for k, v in result["runs"]["unguided"].items()}
        rows = []
        for label, found in result["runs"].items():
            gains = {k: (np.array(found[k]) - plain[k]) / max(plain[k].std(), 1e-9) for k in ("proxy", "gold")}
            cells = []
            for gain in (gains["proxy"], gains["gold"], gains["proxy"] - gains["gold"]):
                mean, low, high = mean_interval(gain)
                cells.append("" if label == "unguided" else f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]")
            means = [f"{np.mean(found[k]):.2f}" for k in ("proxy", "gold", "correct")]
            rows.append([label, *means, *cells])
        head = [
            "guidance, strength",
            "proxy",
            "gold",
            "accuracy",
            "gain of proxy (SD)",
            "gain of gold (SD)",
            "gap (SD)",
        ]
        tables.append(table(head, rows))
    return "\n\n".join(tables)


if __name__ == "__main__":
    script(Guidance, run_guidance, guidance_table)

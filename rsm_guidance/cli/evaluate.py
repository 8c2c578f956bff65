"""The command `evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from rsm_guidance.cli.options import ModelGroup, ModelOptions, SamplerGroup, SamplerOptions, load_reward, running, say
from rsm_guidance.core.errors import UsageError

if TYPE_CHECKING:
    from rsm_guidance.evaluation.generate import Sample


@dataclass(frozen=True)
class Evaluate:
    """Make one image for every prompt of a file and score them.

    rsm-guidance evaluate --pipeline shapes --prompts prompts.txt --reward shapes-verifier --json out.json
    """

    prompts: Path
    """UTF-8 text with one prompt per line, or JSON lines with a "prompt" field in a .jsonl file."""
    json: Path
    """JSON file for the result."""
    sampler: str = "none"
    """Name of a sampler, with options of its own, as in stepwise:trajectories=2; "none" is unguided."""
    guide: str | None = None
    """The proxy reward, which the sampler maximises; default: --reward."""
    images: Path | None = None
    """Folder to keep the images in."""
    seed: int = 0
    """Names all random numbers."""
    batch_size: int = 16
    """Prompts per batch; changes no image."""
    options: SamplerGroup = field(default_factory=SamplerOptions)
    model: ModelGroup = field(default_factory=ModelOptions)

    def run(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"--batch-size must be at least 1; got {self.batch_size}")
        from tqdm.auto import tqdm

        from rsm_guidance.evaluation.generate import generate, pixels_of, scores_of
        from rsm_guidance.io.files import read_prompts, require_writable, write_image, write_json

        sampler, prompts = self.options.build(self.sampler), read_prompts(self.prompts)
        require_writable(self.json)
        if self.images is not None:
            require_writable(self.images / "00000.png")
        pipe, reward, generation = self.model.load()
        guide = reward if self.guide is None else load_reward(self.guide, pipe)
        samples: list[Sample] = []
        with running(self.model.model), tqdm(total=len(prompts), desc=sampler.name, unit="image") as bar:
            for batch in generate(pipe, prompts, sampler, guide, generation, self.seed, self.batch_size):
                samples += batch
                bar.update(len(batch))
        samples.sort(key=lambda s: s.index)
        if guide is reward:
            scores = [s.reward for s in samples]
        else:
            scores = [scores_of(reward, pixels_of([s.image]), [s.prompt])[0] for s in samples]
        report = {
            "pipeline": self.model.model,
            "sampler": repr(sampler),
            "reward": self.model.reward,
            "seed": self.seed,
        }
        report |= _summary(samples, scores)
        write_json(self.json, report)
        if self.images is not None:
            for s in samples:
                write_image(self.images / f"{s.index:05d}.png", s.image)
        say({k: v for k, v in report.items() if k != "images"})


def _summary(samples: list[Sample], scores: list[float | None]) -> dict[str, object]:
    """Means over images, the standard error of the mean reward, and the rewards one by one."""
    import numpy as np

    values = np.array(scores, float)
    return {
        "mean_reward": float(values.mean()),
        "standard_error": float(values.std(ddof=1) / len(values) ** 0.5) if len(values) > 1 else None,
        "evaluations_per_image": float(np.mean([s.evaluations for s in samples])),
        "seconds_per_image": float(np.mean([s.seconds for s in samples])),
        "images": [{"prompt": s.prompt, "reward": r} for s, r in zip(samples, scores, strict=True)],
    }

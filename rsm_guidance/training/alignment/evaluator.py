"""What is measured on the way: rewards and the gold reward of stock samples, their diversity, how far the policy has gone."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rsm_guidance.core.random import RandomStreams, generator_of
from rsm_guidance.core.transitions import ODE
from rsm_guidance.data.prompts import PromptSet, chosen
from rsm_guidance.evaluation.report.pictures import grid
from rsm_guidance.io.files import write_image
from rsm_guidance.rollouts import collect
from rsm_guidance.rollouts.collect import initial_generators
from rsm_guidance.training.alignment.conditions import Conditions
from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.judge import Judge
from rsm_guidance.training.alignment.learner import Learner
from rsm_guidance.training.alignment.lora_file import FILE, save_lora
from rsm_guidance.training.alignment.rows import Gather, alone
from rsm_guidance.training.loop import Metrics

_STATES = 8  # prompts whose states tell how far the policy has gone
_SIDE = 32  # pixels along a side, of images that are compared


@dataclass
class Evaluator:
    """Measures the averaged weights with the stock pipeline, and keeps the best LoRA; `loop.Evaluate`.

    The best is that of the highest gold reward, or of the highest mean reward where there is no gold.

    Attributes:
        config: of the training.
        learner: with the policy.
        prompts: to evaluate with.
        call: arguments of the stock call.
        judge: of the rewards that are trained on.
        gold: of the gold reward, or None.
        conditions: of the rollouts, for states to compare at.
        about: goes into the metadata of the LoRA.
        gather: from all processes.
        process: number of this one.
        step: updates made, as whoever makes the batches knows.
        stopped: whether the rewards are being over-optimised.
    """

    config: AlignConfig
    learner: Learner
    prompts: PromptSet
    call: dict[str, Any]
    judge: Judge
    gold: Judge | None
    conditions: Conditions
    about: dict[str, str]
    gather: Gather = alone
    process: int = 0
    step: int = 0
    stopped: bool = False
    _states: tuple[Any, Tensor, Tensor, Tensor] | None = field(default=None, init=False)

    @torch.no_grad()
    def __call__(self, past: list[Metrics]) -> Metrics:
        found = self.measure(self.config.out / "samples" / f"step-{self.step:06d}.png")
        metrics = found | self.drift()
        self._keep(past, metrics)
        self.stopped = self.stopped or self._overdone([*past, metrics])
        return metrics

    # --- samples ---

    @torch.no_grad()
    def measure(self, picture: Path | None = None) -> Metrics:
        """Mean scores and diversity of stock samples, of which some are drawn into a picture."""
        evaluation, processes = self.config.evaluation, len(self.gather(0))
        mine = list(range(self.process, len(self.prompts.prompts), processes))
        scores, golds, features, shown = [], [], [], []
        per_batch = max(1, evaluation.batch // evaluation.images)
        for start in range(0, len(mine), per_batch):
            places = mine[start : start + per_batch]
            images = self.images(places)
            texts = [self.prompts.prompts[p] for p in places for _ in range(evaluation.images)]
            columns = chosen(self.prompts.columns, [p for p in places for _ in range(evaluation.images)])
            scores.append(self.judge.images(images, texts, columns))
            if self.gold is not None:
                golds.append(self.gold.images(images, texts, columns))
            features.append(_features(images).unflatten(0, (-1, evaluation.images)))
            if self.process == 0:
                shown += list(zip(images, texts, scores[-1].sum(1).tolist(), strict=True))
        told = self.gather((mine, torch.cat(scores), torch.cat(golds) if golds else None, torch.cat(features)))
        mean = torch.cat([part[1] for part in told]).mean(0)
        metrics = {name: float(m) for name, m in zip(_names(self.judge), mean, strict=True)}
        metrics["reward"] = float(mean @ self._weights(len(mean)))
        if self.gold is not None:
            metrics["gold"] = float(torch.cat([part[2] for part in told]).mean())
        if evaluation.images > 1:
            metrics["diversity"] = _spread(torch.cat([part[3] for part in told]))
        if picture is not None and self.process == 0:
            write_image(picture, _grid(shown[: evaluation.pictures]))
        return metrics

    def images(self, places: Sequence[int]) -> Tensor:
        """Images [len(places) * images, 3, H, W] of the stock pipeline, at the seeds of their prompts."""
        count = self.config.evaluation.images
        texts = [self.prompts.prompts[p] for p in places for _ in range(count)]
        drawn = [generator_of("evaluation", self.config.seed, p, i) for p in places for i in range(count)]
        pipe = self.conditions.stock.pipe
        out = pipe(prompt=texts, generator=drawn, output_type="pt", **self.call)
        found: Any = getattr(out, "images", None)
        return torch.as_tensor(out.frames if found is None else found).float().clamp(0, 1)

    def _weights(self, count: int) -> Tensor:
        return torch.tensor(self.config.reward_weights or (1.0,) * count, dtype=torch.float64)

    # --- distance ---

    @torch.no_grad()
    def drift(self) -> Metrics:
        """How far velocities are from the base model's, relative to their size, and how long: at states of its own ODE runs."""
        learner = self.learner
        if self._states is None:
            with learner.policy.acting("reference"):
                self._states = self._base_states()
        replay, x, levels, rows = self._states
        batch = {"x": x, "level": levels, "row": rows}
        with learner.policy.acting("reference"):
            base = learner.direction(replay.denoise(**_denoised(batch)))
        ours = learner.direction(replay.denoise(**_denoised(batch)))
        size = base.square().flatten(1).mean(1)
        moved = (ours - base).square().flatten(1).mean(1) / size
        norm = (ours.square().flatten(1).mean(1) / size).sqrt()
        return {"drift": float(moved.mean()), "norm": float(norm.mean())}

    def _base_states(self) -> tuple[Any, Tensor, Tensor, Tensor]:
        texts = self.prompts.prompts[:_STATES]
        streams = RandomStreams.for_prompts(self.config.seed, texts)
        replay = self.conditions.replay(texts)
        denoiser = self.conditions.denoiser(replay, texts, initial_generators(streams, 0), self.config.rollout_batch)
        steps = collect(denoiser, streams, ODE()).steps
        x = torch.cat([s.x for s in steps])
        return (
            replay,
            x,
            torch.cat([torch.full((len(s.x),), s.level) for s in steps]),
            torch.cat([s.rows for s in steps]),
        )

    # --- what follows ---

    def _keep(self, past: list[Metrics], metrics: Metrics) -> None:
        best = max((entry[self._measure] for entry in past[1:]), default=-float("inf"))
        if past and metrics[self._measure] > best and self.process == 0:
            save_lora(self.config.out, self.learner.policy, self.about | {"evaluation": json.dumps(metrics)})

    @property
    def _measure(self) -> str:
        return "gold" if self.gold is not None else "reward"

    def _overdone(self, entries: list[Metrics]) -> bool:
        """Whether the gold reward has been below its best for `patience` evaluations while the rewards went on rising."""
        patience = self.config.evaluation.patience
        if patience is None or self.gold is None or len(entries) <= patience:
            return False
        best = max(range(len(entries)), key=lambda i: entries[i]["gold"])
        since = entries[best + 1 :]
        return len(since) >= patience and all(e["reward"] > entries[best]["reward"] for e in since[-patience:])

    @property
    def file(self) -> Path:
        """The LoRA that is kept."""
        return self.config.out / FILE


def _denoised(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"x": batch["x"], "levels": batch["level"], "rows": batch["row"]}


def _names(judge: Judge) -> list[str]:
    """Names of the rewards, told apart where several have one."""
    names = [reward.name.replace(" ", "_") for reward in judge.rewards]
    return [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]


def _features(images: Tensor) -> Tensor:
    """Small versions of images [R, D] (of videos, their mean frame), to be compared by their distance."""
    flat = images.mean(1) if images.ndim == 5 else images
    return torch.nn.functional.adaptive_avg_pool2d(flat, min(_SIDE, flat.shape[-1])).flatten(1).cpu()


def _spread(features: Tensor) -> float:
    """Mean root-mean-square distance of the images of a prompt, features [P, K, D]."""
    distance = torch.cdist(features.double(), features.double()) / features.shape[2] ** 0.5
    count = features.shape[1]
    return float(distance.sum((1, 2)).mean() / (count * (count - 1)))


def _grid(shown: Sequence[tuple[Tensor, str, float]]) -> Image.Image:
    cells = [(_picture(image), f"{score:.2f} {text}") for image, text, score in shown]
    side = max(1, round(len(cells) ** 0.5))
    return grid([cells[i : i + side] for i in range(0, len(cells), side)])


def _picture(image: Tensor) -> Image.Image:
    frame = image[0] if image.ndim == 4 else image
    return Image.fromarray((frame.permute(1, 2, 0).cpu().numpy() * 255).round().astype(np.uint8))

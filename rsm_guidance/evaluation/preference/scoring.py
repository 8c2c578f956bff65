"""Preference data scored by rewards: a diffusion reward model at several noise levels, others on the images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rsm_guidance.core.contracts import Reward
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.data.preferences import Decoded, PreferenceFiles, Tally, decoded
from rsm_guidance.engine.encode import encode_images
from rsm_guidance.evaluation.preference.figures import (
    PairScores,
    agreement,
    calibration,
    figures_of,
    grouped,
    scores_vary,
)
from rsm_guidance.reward_models import DiffusionRewardModel
from rsm_guidance.reward_models.levels import level_table
from rsm_guidance.rewards import scored

CLEAN = "images"
"""What is scored by a reward that sees images."""
ScorePairs = Callable[[Sequence[Decoded]], dict[str, np.ndarray]]
"""Pairs [B] to scores [B, 2] by what was scored: a noise level, or the images."""


@dataclass(frozen=True)
class Comparison:
    """Scores of all pairs.

    Attributes:
        by: by name of the reward, and then by what was scored ("images", or "sigma 0.4").
        skipped: pairs that could not be used, by reason.
    """

    by: dict[str, dict[str, PairScores]]
    skipped: Tally


def compare_pairs(
    data: PreferenceFiles,
    rewards: dict[str, Reward],
    levels: Sequence[float] = (0.0,),
    batch: int = 8,
    limit: int | None = None,
    side: int | None = None,
    on_pair: Callable[[int], object] | None = None,
) -> Comparison:
    """Score the pairs of a data set, streamed, by several rewards.

    Args:
        data: preferences.
        rewards: by name; a diffusion reward model scores noisy latents at each level, others score the images.
        levels: sigma in [0, 1].
        batch: pairs at a time.
        limit: pairs; default all.
        side: of the squares, in pixels, to which images are scaled for diffusion reward models; default the model's own.
        on_pair: told how many more were scored.
    """
    tally = Tally()
    found: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in rewards}
    scorers = {name: _scorer(reward, levels, side) for name, reward in rewards.items()}
    labels: list[tuple[float, str, str]] = []
    pairs: Iterable[Decoded] = decoded(data.records(), tally.add)
    for some in _batches(islice(pairs, limit), batch):
        for name, scorer in scorers.items():
            for what, scores in scorer(some).items():
                found[name].setdefault(what, []).append(scores)
        labels += [(p.preference.probability, p.preference.source, p.preference.category) for p in some]
        if on_pair is not None:
            on_pair(len(some))
    probability = np.array([label[0] for label in labels], float)
    columns = [label[1] for label in labels], [label[2] for label in labels]
    by = {
        name: {what: PairScores(np.concatenate(parts), probability, *columns) for what, parts in scores.items()}
        for name, scores in found.items()
    }
    return Comparison(by, tally)


def report_of(comparison: Comparison, first: str) -> dict[str, Any]:
    """What a comparison says, as JSON has it.

    Args:
        comparison: of scores.
        first: the reward with which the others are compared, by what it scored first.
    """
    base = next(iter(comparison.by[first].values()))
    rewards: dict[str, Any] = {}
    for name, scores in comparison.by.items():
        rewards[name] = {
            what: {
                **figures_of(pairs),
                "by_source": grouped(pairs, "source"),
                "by_category": grouped(pairs, "category"),
                "calibration": calibration(pairs),
                "scores_vary": scores_vary(pairs),
            }
            for what, pairs in scores.items()
        }
    others = {
        f"{name}, {what}": agreement(base, pairs)
        for name, scores in comparison.by.items()
        for what, pairs in scores.items()
        if pairs is not base
    }
    return {
        "pairs": len(base.scores),
        "skipped": {str(reason): count for reason, count in comparison.skipped.counts.items()},
        "rewards": rewards,
        "agreement": others,
    }


def _batches(pairs: Iterable[Decoded], size: int) -> Iterator[list[Decoded]]:
    rest = iter(pairs)
    while some := list(islice(rest, size)):
        yield some


def _scorer(reward: Reward, levels: Sequence[float], side: int | None) -> ScorePairs:
    if hasattr(reward, "score_at_level"):  # it scores noisy latents
        return _Noisy(reward, levels, side)  # type: ignore[arg-type]
    return _Clean(reward)


@dataclass(frozen=True)
class _Clean:
    """Scores of images by any reward, each in its own size."""

    reward: Reward

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Decoded]) -> dict[str, np.ndarray]:
        rows = []
        for pair in pairs:
            images = [tensor_of(image) for image in pair.images[:2]]
            prompt = pair.preference.prompt
            rows.append([self._score(image, prompt) for image in images])
        return {CLEAN: np.array(rows, float)}

    def _score(self, image: Tensor, prompt: str) -> float:
        return float(scored(lambda: self.reward(image, [prompt]), 1, self.reward.name)[0])


class _Noisy:
    """Scores of latents at noise levels by a diffusion reward model; the noise belongs to the pair and the level."""

    def __init__(self, drm: DiffusionRewardModel, levels: Sequence[float], side: int | None) -> None:
        self._drm, self._levels, self._side = drm, levels, side or drm.image_size
        self._table, self._met = level_table(drm.pipe.scheduler), 0

    @torch.no_grad()
    def __call__(self, pairs: Sequence[Decoded]) -> dict[str, np.ndarray]:
        images = [i.resize((self._side, self._side), Image.Resampling.BICUBIC) for p in pairs for i in p.images[:2]]
        latents = encode_images(self._drm.pipe, torch.cat([tensor_of(image) for image in images])).float()
        prompts = [p.preference.prompt for p in pairs for _ in range(2)]
        numbers = range(self._met, self._met + len(images))
        self._met += len(images)
        streams = RandomStreams(0, tuple(("preference", number) for number in numbers))
        found = {}
        for level in self._levels:
            index = int(self._table.nearest(torch.tensor([level])))
            alpha, sigma, timestep = (float(t) for t in self._table.at(torch.tensor(index)))
            shape = tuple(latents.shape[1:])
            noise = streams.normals(range(len(images)), shape, [("noise", index)] * len(images)).to(latents)
            scores: Tensor = self._drm.score(alpha * latents + sigma * noise, timestep, prompts)
            found[f"sigma {level:g}"] = scores.double().cpu().numpy().reshape(-1, 2)
        return found


def tensor_of(image: Image.Image) -> Tensor:
    """An RGB image as [1, 3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255

"""Files of trees that are kept between runs: what two runs must share, the proof of it, and when to write."""

import os
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rsm_guidance.core.transitions import GaussianTransition
from rsm_guidance.rewards import name_of
from rsm_guidance.samplers.task import Task
from rsm_guidance.samplers.tree.selection import Widening
from rsm_guidance.samplers.tree.store import Forest

SAVE_EVERY = 30.0  # seconds between two savings, so that a killed run loses no more


class TreeFile:
    """The file in which a run keeps its trees.

    Args:
        path: a safetensors file, which need not exist.
        task: what the trees are grown for.
        settings: of the sampler, as far as they decide how trees grow.

    Raises:
        ValueError: if it is not there and cannot be written.
    """

    def __init__(self, path: Path, task: Task, settings: dict[str, Any]) -> None:
        self.task, self.path = task, path
        self.first = task.initial(0)
        self._identity = identity(task, settings, self.first)
        self._size = [0] * task.count
        self._saved = time.monotonic()
        if not path.exists() and not os.access(path.parent, os.W_OK):
            raise ValueError(f"the tree file {path} cannot be written: its folder is missing or not yours to write in")

    def save(self, forest: Forest, at_once: bool = True) -> None:
        """Write the trees if they have grown, and, but for `at_once`, half a minute has passed."""
        grown = [len(tree.leaves) for tree in forest.trees]
        if not self.task.can_score or grown == self._size:
            return
        if not at_once and time.monotonic() - self._saved <= SAVE_EVERY:
            return
        try:
            forest.save(self.path, self._identity)
        except (OSError, SafetensorError) as error:  # the images are worth more than the trees
            warnings.warn(
                f"the tree file {self.path} cannot be written, and these trees will be lost: {error}", stacklevel=2
            )
        self._size, self._saved = grown, time.monotonic()

    def load(self, random: Sequence[bool], rules: Widening, temperature: float) -> Forest | None:
        """The trees of the file, or None if there is none.

        Raises:
            ValueError: if it is damaged, or of another run.
        """
        if not self.path.exists():
            return None
        forest = Forest.load(self.path, self._identity, random, rules, temperature)
        self._size = [len(tree.leaves) for tree in forest.trees]
        return forest

    def prove(self, forest: Forest, transition: GaussianTransition) -> tuple[Tensor, float, int]:
        """That the trees were grown with this model and this reward.

        It takes one denoiser evaluation and, of one leaf, the final score for each prompt.

        Returns:
            The estimate [B, ...] of the clean latents at the first level, and what was spent per prompt: denoiser
            evaluations and reward calls.

        Raises:
            ValueError: if they were not.
        """
        task = self.task
        prediction = task.predict(self.first, 0)
        mean = transition(prediction, task.schedule, 0, 1).mean.cpu().double()
        assert forest.probe is not None
        stored = forest.probe.double()
        if (mean - stored).abs().mean() > 0.02 * stored.abs().mean():
            raise ValueError(
                f"the tree file {self.path} was grown with another model: this one answers differently to the same noise. "
                "Use the model it was grown with, or another tree_file"
            )
        cost, calls = float(task.denoiser.evaluations_per_row), 0
        if all(forest.clean) and task.can_score:
            self._prove_reward(forest)
            cost, calls = cost + task.final_cost, task.final_calls
        return prediction.x0, cost, calls

    def _prove_reward(self, forest: Forest) -> None:
        task = self.task
        leaves = [next(iter(store)) for store in forest.clean]
        latents = torch.stack([store[leaf] for store, leaf in zip(forest.clean, leaves, strict=True)])
        with torch.no_grad():
            scores = task.unwatched.final_scores(latents.to(self.first.device), task.rows)
        assert scores is not None
        for row, leaf in enumerate(leaves):
            before, now = forest.rewards[row][forest.trees[row].leaves.index(leaf)], float(scores[row])
            if abs(now - before) > 0.02 * (spread(forest.rewards[row]) + abs(before)):
                raise ValueError(
                    f"the tree file {self.path} was grown with another reward: a leaf of prompt {row} had {before:.4g} and now "
                    f"has {now:.4g} (a reward that is normalised among what is scored together cannot be continued). Use the "
                    "reward it was grown with, or another tree_file"
                )


def identity(task: Task, settings: dict[str, Any], first: Tensor) -> dict[str, Any]:
    """What a tree file must share with the run that continues it."""
    value = getattr(task.value, "inner", task.value)
    scores = {
        "reward": None if task.reward is None else name_of(task.reward),
        "value": None if value is None else f"{name_of(value)} {type(value).__name__}",
    }
    return {
        "prompts": list(task.denoiser.prompts),
        "seed": task.streams.seed,
        "schedule": {n: getattr(task.schedule, n).tolist() for n in ("alpha", "sigma", "timesteps")},
        "settings": settings,
        "scores": scores,
        "shape": list(first.shape[1:]),
    }


def spread(rewards: Sequence[float]) -> float:
    """Standard deviation of rewards, 1 where there is none."""
    if len(rewards) < 2:
        return 1.0
    return float(torch.tensor(rewards, dtype=torch.float64).std()) or 1.0

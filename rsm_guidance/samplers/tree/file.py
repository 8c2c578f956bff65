"""Files of trees that are kept between runs: what two runs must share, the proof of it, and when to write."""

import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rsm_guidance.samplers.tree.store import Forest
from rsm_guidance.rewards import name_of
from rsm_guidance.samplers.base import interruptible

if TYPE_CHECKING:
    from rsm_guidance.samplers.tree.search import Growth

_SAVE_EVERY = 30.0  # seconds between two savings, so that a killed run loses no more


class TreeFile:
    """The file in which a run keeps its trees.

    Raises:
        ValueError: if it is not there and cannot be written.
    """

    def __init__(self, growth: "Growth") -> None:
        assert growth.config.tree_file is not None
        self.growth, self.path = growth, Path(growth.config.tree_file)
        self._size = [0] * growth.problem.count
        self._saved = time.monotonic()
        if not self.path.exists() and not os.access(self.path.parent, os.W_OK):
            raise ValueError(
                f"the tree file {self.path} cannot be written: its folder is missing or not yours to write in"
            )

    def save(self, forest: Forest, at_once: bool = True) -> None:
        """Write the trees if they have grown, and, but for `at_once`, half a minute has passed."""
        grown = [len(tree.leaves) for tree in forest.trees]
        if not self.growth.judging or grown == self._size:
            return
        if not at_once and time.monotonic() - self._saved <= _SAVE_EVERY:
            return
        try:
            forest.save(self.path, self._identity())
        except (OSError, SafetensorError) as error:  # the images are worth more than the trees
            warnings.warn(
                f"the tree file {self.path} cannot be written, and these trees will be lost: {error}", stacklevel=2
            )
        self._size, self._saved = grown, time.monotonic()

    def load(self) -> Forest | None:
        """The trees of the file, or None if there is none.

        Raises:
            ValueError: if it is damaged, or of another run.
        """
        if not self.path.exists():
            return None
        growth = self.growth
        forest = Forest.load(self.path, self._identity(), growth.random, growth.rules, growth.config.temperature)
        self._size = [len(tree.leaves) for tree in forest.trees]
        return forest

    def prove(self, forest: Forest) -> tuple[Tensor, float, int]:
        """That the trees were grown with this model and this judge.

        It takes one denoiser evaluation and, of one leaf, the final score for each prompt.

        Returns:
            The estimate [B, ...] of the clean latents at the first level, and what was spent per prompt: denoiser
            evaluations and reward calls.

        Raises:
            ValueError: if they were not.
        """
        growth, problem = self.growth, self.growth.problem
        with interruptible(problem):
            prediction = problem.denoiser.predict(growth.first, 0, problem.rows)
        mean = growth.config.transition(prediction, growth.schedule, 0, 1).mean.cpu().double()
        assert forest.probe is not None
        stored = forest.probe.double()
        if (mean - stored).abs().mean() > 0.02 * stored.abs().mean():
            raise ValueError(
                f"the tree file {self.path} was grown with another model: this one answers differently to the same noise. "
                "Use the model it was grown with, or another tree_file"
            )
        cost, calls = problem.denoiser.evaluations_per_row, 0
        if all(forest.clean) and growth.judging:
            self._prove_judge(forest)
            cost, calls = cost + problem.final_cost, problem.final_calls
        return prediction.x0, cost, calls

    def _prove_judge(self, forest: Forest) -> None:
        problem = self.growth.problem
        leaves = [next(iter(store)) for store in forest.clean]
        latents = torch.stack([store[leaf] for store, leaf in zip(forest.clean, leaves, strict=True)])
        with interruptible(problem), torch.no_grad():
            said = replace(problem, watch=None).final_rewards(latents.to(self.growth.first.device), problem.rows)
        assert said is not None
        for row, leaf in enumerate(leaves):
            before, now = forest.rewards[row][forest.trees[row].leaves.index(leaf)], float(said[row])
            if abs(now - before) > 0.02 * (spread(forest.rewards[row]) + abs(before)):
                raise ValueError(
                    f"the tree file {self.path} was grown with another reward: a leaf of prompt {row} had {before:.4g} and now "
                    f"has {now:.4g} (a reward that is normalised among what is judged together cannot be continued). Use the "
                    "reward it was grown with, or another tree_file"
                )

    def _identity(self) -> dict[str, Any]:
        """What a tree file must share with the run that continues it."""
        problem, schedule = self.growth.problem, self.growth.schedule
        judges = {
            n: None if j is None else f"{name_of(j)} {getattr(j, 'estimator', '')}".strip()
            for n, j in (("reward", problem.reward), ("value", problem.value))
        }
        return {
            "prompts": list(problem.denoiser.prompts),
            "seed": problem.streams.seed,
            "schedule": {n: getattr(schedule, n).tolist() for n in ("alpha", "sigma", "timesteps")},
            "settings": self.growth.config.settings(),
            "judges": judges,
            "shape": list(self.growth.first.shape[1:]),
        }


def spread(rewards: Sequence[float]) -> float:
    """Standard deviation of rewards, 1 where there is none."""
    if len(rewards) < 2:
        return 1.0
    return float(torch.tensor(rewards, dtype=torch.float64).std()) or 1.0

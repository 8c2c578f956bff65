"""What a reward model is trained for: both images of a pair, noised to one level, in the order that people prefer."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from rsm_guidance.reward_models import DiffusionRewardModel
from rsm_guidance.reward_models.blocks import Grid
from rsm_guidance.reward_models.levels import level_table, noised
from rsm_guidance.training.reward_model.collate import PromptEmbeddings
from rsm_guidance.training.reward_model.config import RewardConfig
from rsm_guidance.training.reward_model.losses import LOSSES, PairLabel, informs, weighted_mean
from rsm_guidance.training.reward_model.noise import drawn_levels, pair_noise


class PairObjective(nn.Module):
    """The objective: batches of `collate` to losses, in one forward pass of the reward model.

    A batch may name a `level`, an entry of the table, at which all its pairs are compared with noise that is always the same;
    then the result has "scores" [B, 2].

    Attributes:
        drm: what is trained.
        table: noise levels.
    """

    def __init__(
        self, drm: DiffusionRewardModel, config: RewardConfig, embeddings: PromptEmbeddings | None, grids: list[Grid]
    ) -> None:
        super().__init__()
        self.drm = drm
        self.table = level_table(drm.pipe.scheduler)
        self._noise, self._loss, self._seed = config.noise, config.loss, config.seed
        self._embeddings, self._grids = embeddings, grids

    def weight(self, batch: dict[str, Any]) -> float:
        """What a batch counts: the weights of the pairs that tell something."""
        return float(self._weights(batch, self._label(batch)).double().sum())

    def forward(self, batch: dict[str, Any], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Losses: "loss"; and "accuracy" over decided pairs (0.5 without any) and "margin", the mean |difference|."""
        raw, sigma = self._raw(batch)
        said = self.drm.read(raw)
        if "level" in batch:
            return {"scores": said.mean.unflatten(0, (-1, 2))}
        first, second = said.pick(slice(0, None, 2)), said.pick(slice(1, None, 2))
        label = self._label(batch, sigma).to(raw.device)
        losses = LOSSES[self._loss.name](first, second, label, **self._loss.constants)
        told, decided = (first.mean - second.mean).detach(), label.win != 0.5
        right = torch.where(told == 0, 0.5, ((told > 0) == (label.win > 0.5)).to(told.dtype))
        return {
            "loss": weighted_mean(losses, self._weights(batch, label).to(losses)),
            "accuracy": right[decided].mean() if bool(decided.any()) else told.new_tensor(0.5),
            "margin": told.abs().mean(),
        }

    def _label(self, batch: dict[str, Any], sigma: Tensor | None = None) -> PairLabel:
        win: Tensor = batch["probability"].float()
        ratings = None
        if self._loss.ratings is not None:
            missing = (math.nan, math.nan)
            ratings = torch.tensor([scores.get(self._loss.ratings, missing) for scores in batch["scores"]])
        return PairLabel(win, win == 0.5, torch.zeros_like(win) if sigma is None else sigma, ratings)

    def _weights(self, batch: dict[str, Any], label: PairLabel) -> Tensor:
        """Weights [B]: 0 for pairs that tell the loss nothing."""
        counted = informs(self._loss.name, label)
        if self._loss.ties == "skip":
            counted = counted & ~label.tie
        weights: Tensor = batch["weight"].to(counted.device) * counted
        return weights

    def _raw(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The head's numbers for both latents of each pair, [2B, channels], and noise levels [B]."""
        first, second, pairs = batch["first"].float(), batch["second"].float(), batch["pair"]
        shape = tuple(first.shape[1:])
        if "level" in batch:
            index = torch.full((len(pairs),), batch["level"])
            noise = pair_noise(self._seed, "held out", batch["level"], pairs, shape)
        else:
            index = drawn_levels(self._noise, self.table, self._seed, batch["epoch"], pairs)
            noise = pair_noise(self._seed, "pair", batch["epoch"], pairs, shape, self._noise.same)
        both = torch.stack([first, second], 1).flatten(0, 1)
        x = noised(both, index.repeat_interleave(2), self.table, noise.flatten(0, 1))
        x = x.to(next(self.drm.head.parameters()).device)
        _, sigma, timesteps = self.table.at(index)
        prompts = [prompt for prompt in batch["prompt"] for _ in range(2)]
        grid = self._grids[batch["bucket"]]
        if self._embeddings is not None:
            self._embeddings.put_back(batch["prompt"], batch["embeddings"], shape, grid)
        raw: Tensor = self.drm.scorer(*self.drm.inputs(x, timesteps.repeat_interleave(2), prompts, grid))
        return raw, sigma

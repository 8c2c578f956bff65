"""What a reward model is trained for: both images of a pair, noised to one level, in the order that people prefer."""

from typing import Any

import torch
from torch import Tensor, nn

from rsm_guidance.reward_models import DiffusionRewardModel
from rsm_guidance.reward_models.blocks import Grid
from rsm_guidance.reward_models.noise_table import NoiseTable
from rsm_guidance.reward_models.outputs import mean_of
from rsm_guidance.training.reward_model.collate import PromptEmbeddings
from rsm_guidance.training.reward_model.config import RewardConfig
from rsm_guidance.training.reward_model.noise import drawn_levels, noised, pair_noise
from rsm_guidance.training.reward_model.pair_losses import LOSSES


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
        self.table = NoiseTable.of(drm.pipe.scheduler)
        self._noise, self._ties, self._seed = config.noise, config.loss.ties, config.seed
        self._loss, self._margin = LOSSES[config.loss.name], config.loss.margin
        self._embeddings, self._grids = embeddings, grids

    def weight(self, batch: dict[str, Any]) -> float:
        """What a batch counts: the weights of the pairs that tell something."""
        return float(self._weights(batch).double().sum())

    def forward(self, batch: dict[str, Any], generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Losses: "loss"; and "accuracy" over decided pairs (0.5 without any) and "margin", the mean |difference|."""
        outputs, sigma = self._outputs(batch)
        scores = mean_of(outputs, self.drm.drm_config.output)
        if "level" in batch:
            return {"scores": scores}
        margin = scores[:, 0] - scores[:, 1]
        probability, weights = batch["probability"].to(margin), self._weights(batch).to(margin)
        losses = self._loss.call(outputs[:, 0], outputs[:, 1], probability, sigma.to(margin), self._margin)
        told = margin.detach()
        decided = probability != 0.5
        right = torch.where(told == 0, 0.5, ((told > 0) == (probability > 0.5)).to(told.dtype))
        accuracy = right[decided].mean() if bool(decided.any()) else told.new_tensor(0.5)
        return {
            "loss": (weights * losses).sum() / weights.sum().clamp_min(1e-30),
            "accuracy": accuracy,
            "margin": told.abs().mean(),
        }

    def _weights(self, batch: dict[str, Any]) -> Tensor:
        weights: Tensor = batch["weight"]
        return weights * (batch["probability"] != 0.5) if self._ties == "skip" else weights

    def _outputs(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The head's outputs [B, 2, N], and noise levels [B]."""
        first, second, pairs = batch["first"].float(), batch["second"].float(), batch["pair"]
        shape = tuple(first.shape[1:])
        if "level" in batch:
            index = torch.full((len(pairs),), batch["level"])
            noise = pair_noise(self._seed, "held out", batch["level"], pairs, shape)
        else:
            index = drawn_levels(self._noise, self.table, self._seed, batch["epoch"], pairs)
            noise = pair_noise(self._seed, "pair", batch["epoch"], pairs, shape, self._noise.same)
        alpha, sigma, timesteps = self.table.at(index)
        x = noised(first, second, alpha, sigma, noise).flatten(0, 1).to(next(self.drm.head.parameters()).device)
        prompts = [prompt for prompt in batch["prompt"] for _ in range(2)]
        grid = self._grids[batch["bucket"]]
        if self._embeddings is not None:
            self._embeddings.put_back(batch["prompt"], batch["embeddings"], shape, grid)
        inputs = self.drm.inputs(x, timesteps.repeat_interleave(2), prompts, grid)
        outputs: Tensor = self.drm.scorer(*inputs)
        return outputs.unflatten(0, (-1, 2)), sigma

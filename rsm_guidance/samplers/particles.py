"""Weighted particles per prompt, shared by the sequential Monte Carlo samplers.

K particles for each of B prompts; latents are particle-major [K * B, ...], as everywhere, and weights are [B, K].  Weights
are carried in the log-domain from level to level and forgotten only by resampling, so that products of increments
telescope.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from rsm_guidance.core.resampling import Scheme, resample
from rsm_guidance.core.weights import choose, effective_sample_size, log_mean_exp, normalize
from rsm_guidance.samplers.base import Problem, SamplerOutput, finished


@dataclass
class Particles:
    """The state of a particle run.

    Attributes:
        problem: the task.
        count: K.
        latents: [K * B, ...].
        log_weights: float64 [B, K], since the last resampling.
        log_normalizer: float64 [B], log of the product of mean weights so far, an unbiased estimate of Z in the end.
        carried: per-particle quantities [B, K] that follow their particle through resampling.
    """

    problem: Problem
    count: int
    latents: Tensor
    log_weights: Tensor = field(init=False)
    log_normalizer: Tensor = field(init=False)
    carried: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.log_weights = torch.zeros(self.problem.count, self.count, dtype=torch.float64)
        self.log_normalizer = torch.zeros(self.problem.count, dtype=torch.float64)

    @property
    def rows(self) -> Tensor:
        """The prompt of every latent, [K * B]."""
        return self.problem.rows.repeat(self.count)

    def table(self, values: Tensor) -> Tensor:
        """Values of the latents [K * B] as [B, K]."""
        return values.view(self.count, self.problem.count).T

    def pick(self, index: Tensor) -> Tensor:
        """Latents [N * B, ...] of chosen particles [B, N], particle-major."""
        grouped = self.latents.view(self.count, self.problem.count, *self.latents.shape[1:])
        return grouped[index.T, self.problem.rows].flatten(0, 1)

    def reweight(self, increment: Tensor) -> None:
        """Multiply the weights: log-increments [B, K]."""
        self.log_weights = self.log_weights + increment

    def resample(self, level: int, scheme: Scheme, threshold: float, trace: dict[str, Any]) -> Tensor | None:
        """Resample the prompts whose effective sample size fell below `threshold` K; the others keep their weights.

        Returns the old place of every latent [K * B], for what else has to follow, or None if nothing moved.
        """
        size = effective_sample_size(self.log_weights)
        due = size < threshold * self.count - 1e-9
        ancestors = torch.arange(self.count).expand(self.problem.count, -1).clone()
        trace["levels"].append({"level": level, "effective_sample_size": size.tolist()})
        moved = None
        if bool(due.any()):
            streams = self.problem.streams
            for row in due.nonzero().flatten().tolist():
                generator = streams.generator(row, "resample", level)
                uniform = torch.rand(1, self.count, generator=generator, dtype=torch.float64)
                ancestors[row] = resample(self.log_weights[row][None], uniform, scheme)[0]
            moved = (ancestors.T * self.problem.count + self.problem.rows).flatten()
            self.latents = self.latents[moved]
            self.carried = {name: values.gather(1, ancestors) for name, values in self.carried.items()}
            mean = log_mean_exp(self.log_weights)
            self.log_normalizer = torch.where(due, self.log_normalizer + mean, self.log_normalizer)
            self.log_weights = torch.where(due[:, None], 0.0, self.log_weights)
        trace["levels"][-1]["ancestors"] = ancestors.tolist()
        return moved

    def _close(self) -> Tensor:
        """Account for the last weights; returns them normalised, float64 [B, K]."""
        self.log_normalizer = self.log_normalizer + log_mean_exp(self.log_weights)
        return normalize(self.log_weights)

    def _draw(self, log_weights: Tensor) -> Tensor:
        """One particle per prompt [B], with probability proportional to its weight."""
        uniform = [self.problem.streams.uniform(row, "draw") for row in range(self.problem.count)]
        return choose(log_weights, torch.tensor(uniform, dtype=torch.float64))


def conclude(
    group: Particles, rewards: Tensor, returned: Literal["best", "sample"], trace: dict[str, Any]
) -> SamplerOutput:
    """Close a particle run whose last weights are in: pick a particle per prompt by its reward [B, K] or its weight."""
    weights = group._close()
    chosen = rewards.argmax(1) if returned == "best" else group._draw(weights)
    trace["candidates"] = {"rewards": rewards.tolist(), "log_weights": weights.tolist(), "chosen": chosen.tolist()}
    picked = (group.problem.rows, chosen)
    output = finished(group.problem, group.pick(chosen[:, None]), trace, rewards[picked])
    output.log_normalizer, output.log_weights = group.log_normalizer, weights[picked]
    return output

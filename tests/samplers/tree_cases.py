"""Trees on a small Gaussian mixture, shared by the tests of the tree samplers."""

from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.ledger import Budget, Ledger
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.oracles.mixture import GaussianMixture, GaussianMixtureDenoiser, QuadraticReward
from rsm_guidance.samplers import SamplerOutput, Task
from rsm_guidance.samplers.tree.methods import TreeSampling, TreeSearch
from tests.samplers.cases import OpenTask

A = Transition("ddim", 1.0)
MIXTURE = GaussianMixture.from_weights([0.5, 0.5], [[-2.0], [2.0]], 0.25)
REWARD = QuadraticReward.around([1.0], [1.0])
RARE = QuadraticReward.around([3.0], [10.0])
SCHEDULE = NoiseSchedule.variance_preserving(10)


class Tweedie:
    """The reward of the posterior mean, by a model that costs half an evaluation and a reward call."""

    name = "tweedie"
    share = 0.5
    evaluations_per_row = 0.5
    reward_calls_per_row = 1
    reads_prediction = False

    def __init__(self, task: Task) -> None:
        self.task, self.denoiser = task, GaussianMixtureDenoiser(MIXTURE, SCHEDULE, [])

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        if level < SCHEDULE.steps:
            x = self.denoiser.predict(x, level).x0
        return self.task.reward(self.task.denoiser.decode(x), rows)


def problem(
    count: int = 4, reward: QuadraticReward = REWARD, seed: int = 0, prompts: list[str] | None = None, **caps: float
) -> Task:
    prompts = prompts or [f"point {i}" for i in range(count)]
    denoiser = GaussianMixtureDenoiser(MIXTURE, SCHEDULE, prompts, seed)
    streams = RandomStreams.for_prompts(seed, prompts)
    task = OpenTask(denoiser, streams, Ledger(Budget(**caps), images=len(prompts)), reward)
    task.value = Tweedie(task)
    return task


BOTH = [
    TreeSampling(20, transition=A),
    TreeSampling(20, transition=A, selection="proportional"),
    TreeSampling(20, transition=A, selection="boltzmann", batch=5, prior="value"),
    TreeSampling(20, transition=A, stored_nodes=6, node_dtype="bfloat16"),
    TreeSearch(20, transition=A, prior="value"),
    TreeSearch(20, transition=A, stored_nodes=30, branching=3),
]


def ids(sampler: Any) -> str:
    return "-".join([sampler.name, getattr(sampler, "selection", "uct"), sampler.prior, str(sampler.stored_nodes)])


def same(one: SamplerOutput, other: SamplerOutput) -> None:
    assert torch.equal(one.latents, other.latents)
    assert one.trace["tree"] == other.trace["tree"] and one.trace["candidates"] == other.trace["candidates"]

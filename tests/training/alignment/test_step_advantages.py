"""Credits of steps become advantages of the groups that a configuration names."""

from typing import Any

import pytest
import torch

from rsm_guidance.training.alignment.credit import step_advantages
from rsm_guidance.training.alignment.read import read_align

PROMPTS, SEEDS = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])


def config(**options: Any):
    base: dict[str, Any] = {"rollout": {"kind": "sde", "group": 2}, "estimator": {"name": "tweedie-difference"}}
    return read_align(options=base | options)


def test_gains_are_compared_within_prompt_and_step() -> None:
    credits = torch.tensor([[1.0, 100.0], [3.0, 300.0], [0.0, -5.0], [2.0, 5.0]])
    found = step_advantages(
        config(advantage={"by": ["prompt", "step"], "deviation": "none", "clip": None}), credits, PROMPTS, SEEDS
    )
    assert found.values.tolist() == [-1, -100, 1, 100, -1, -5, 1, 5]
    assert found.groups == 4


def test_children_are_compared_with_their_siblings_alone() -> None:
    branches = read_align(name="tempflow-grpo", options={"advantage": {"deviation": "none"}})
    credits = torch.tensor([[0.0], [1.0], [10.0], [14.0]])
    steps, seeds = torch.tensor([[0], [0], [1], [1]]), torch.zeros(4, dtype=torch.int64)
    found = step_advantages(branches, credits, torch.zeros(4, dtype=torch.int64), seeds, steps=steps)
    assert found.values.tolist() == [-0.5, 0.5, -2, 2]


def test_seeds_of_other_prompts_are_others() -> None:
    seeds = read_align(
        options={"rollout": {"kind": "sde", "same_start": True}, "advantage": {"by": ["seed"], "deviation": "none"}}
    )
    credits = torch.tensor([[0.0], [1.0], [10.0], [14.0]])
    found = step_advantages(seeds, credits, PROMPTS, torch.zeros(4, dtype=torch.int64))
    assert found.values.tolist() == [-0.5, 0.5, -2, 2]


def test_the_absolute_term_is_that_of_the_first_steps() -> None:
    c = config(advantage={"by": ["prompt", "step"], "absolute": 1.0, "absolute_steps": 1})
    credits = torch.tensor([[1.0, 1.0], [1.0, 1.0], [3.0, 3.0], [3.0, 3.0]])
    found = step_advantages(c, credits, PROMPTS, SEEDS)
    assert found.values.tolist() == [-1, 0, -1, 0, 1, 0, 1, 0]
    assert found.kept.tolist() == [True, False] * 4


def test_the_ratio_of_process_values_multiplies() -> None:
    options = {"reward_sign": "positive", "estimator": {"name": "process-value", "discount": 1.0, "ratio": True}}
    c = config(**options, advantage={"by": ["prompt", "step"], "deviation": "none", "clip": None})
    credits = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    found = step_advantages(c, credits, torch.zeros(2, dtype=torch.int64), SEEDS[:2])
    assert found.values.tolist() == [-0.5 * 0.5, 0.5 * 1.5, 0.5, -0.5]


def test_positive_only_and_diversity() -> None:
    base = {"by": ["prompt", "step"], "deviation": "none"}
    credits = torch.tensor([[1.0], [3.0], [0.0], [2.0]])
    found = step_advantages(config(advantage=base | {"positive_only": True}), credits, PROMPTS, SEEDS)
    assert found.values.tolist() == [0, 1, 0, 1] and found.kept.tolist() == [False, True, False, True]
    c = config(advantage=base | {"diversity": True})
    varied = step_advantages(c, credits, PROMPTS, SEEDS, distances=torch.tensor([1.0, 3.0, 1.0, 1.0]))
    assert varied.values.tolist() == [-1, 1.5, -1, 1]
    with pytest.raises(ValueError, match="distances"):
        step_advantages(c, credits, PROMPTS, SEEDS)


def test_rewards_have_weights() -> None:
    c = config(rewards=["a", "b"], reward_weights=[1.0, 0.0], advantage={"by": ["prompt", "step"], "deviation": "none"})
    credits = torch.stack([torch.tensor([[1.0], [3.0]]), torch.tensor([[9.0], [0.0]])], 2)
    found = step_advantages(c, credits, torch.zeros(2, dtype=torch.int64), SEEDS[:2])
    assert found.values.tolist() == [-1, 1]

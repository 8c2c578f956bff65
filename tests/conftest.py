"""Shared fixtures: the embedded pipeline, small and loaded once."""

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

import rsm_guidance as rg

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def fixed_global_seed() -> None:
    """Untrained modules are the same in every test, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def stock() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(rg.shapes.model_path())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def guided(stock: StableDiffusion3Pipeline) -> DiffusionPipeline:
    pipe = rg.RewardGuidedStableDiffusion3Pipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def drm() -> rg.DiffusionRewardModel:
    model = rg.resolve_reward("shapes-drm")
    assert isinstance(model, rg.DiffusionRewardModel)
    return model

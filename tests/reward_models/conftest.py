"""The packaged shapes pipeline and its reward model, loaded once, without what stands above reward models."""

import pytest
from diffusers import StableDiffusion3Pipeline

import rsm_guidance.shapes.model  # noqa: F401 - a component's class, which diffusers wants imported
from rsm_guidance.io.names import model_location
from rsm_guidance.reward_models import DiffusionRewardModel, load_reward_model
from rsm_guidance.shapes.packaged import DRM


@pytest.fixture(scope="session")
def stock() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(model_location("shapes"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def drm(stock: StableDiffusion3Pipeline) -> DiffusionRewardModel:
    return load_reward_model(str(DRM), stock)

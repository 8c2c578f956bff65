"""The packaged shapes pipeline, loaded once, without what stands above the engine."""

import pytest
from diffusers import StableDiffusion3Pipeline

import rsm_guidance.shapes.model  # noqa: F401 - a component's class, which diffusers wants imported
from rsm_guidance.io.names import model_location


@pytest.fixture(scope="session")
def stock() -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(model_location("shapes"))
    pipe.set_progress_bar_config(disable=True)
    return pipe

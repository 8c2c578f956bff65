"""Tiny pipelines on disk and one table of choices, made once."""

from pathlib import Path

import pytest

from tests.training.reward_model.worlds import save_pipeline, write_choices


@pytest.fixture(scope="session")
def sd3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline("sd3", tmp_path_factory.mktemp("pipelines") / "sd3")


@pytest.fixture(scope="session")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline("sd15", tmp_path_factory.mktemp("pipelines") / "sd15")


@pytest.fixture(scope="session")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_choices(tmp_path_factory.mktemp("choices") / "data", ties=2)

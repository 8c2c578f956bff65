"""Tiny pipelines on disk, made once."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.zoo import ZOO


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline of a family."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp("pipelines") / name
            ZOO[name].build().save_pretrained(made[name])
        return made[name]

    return folder

"""Random command lines end with exit code 2 and one sentence, or with a right result, and leave nothing half done."""

import os
from pathlib import Path

import pytest

from tests.robustness.arguments import run

COUNT = int(os.environ.get("RSM_ROBUSTNESS", "0")) or 120


@pytest.mark.slow
@pytest.mark.parametrize("part", range(2))
def test_random_arguments(part: int, tmp_path: Path) -> None:
    faults = {
        str(words): end.fault + end.error[-300:] for words, end in run(range(part, COUNT, 2), tmp_path) if end.fault
    }
    assert not faults

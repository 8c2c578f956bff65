"""Random command lines end with exit code 2 and one sentence, or with a right result, and leave nothing half done."""

import os
from pathlib import Path

import pytest

from tests.robustness.arguments import judged

COUNT = int(os.environ.get("RSM_ROBUST_LISTS", "20"))  # 2000 for a thorough run


@pytest.mark.slow
def test_random_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for number in range(COUNT):
        words, faults, said = judged(number, tmp_path / "list")
        assert not faults, f"{number} {words}: {faults} ({said})"

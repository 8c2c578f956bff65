"""Damaged files and folders are refused in one sentence that names them, or give a right result; nothing is half written."""

import os
from pathlib import Path

import pytest

from tests.robustness.damage import Sources, judged

COUNT = int(os.environ.get("RSM_ROBUST_CASES", "60"))  # 300 for a thorough run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_and_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "whole").mkdir()
    sources = Sources.make(tmp_path / "whole")
    for number in range(COUNT):
        made, faults, said = judged(number, tmp_path / "case", sources)
        assert not faults, f"{number} {made.kind}, {made.how}: {faults} ({said})"

"""Random command lines end with exit code 2 and one sentence, or with a right result, and leave nothing half done."""

import json
import os
import random
from pathlib import Path

import pytest

from rsm_guidance.cli.main import main
from tests.robustness.arguments import arguments, furnish

COUNT = int(os.environ.get("RSM_ROBUSTNESS", "40"))  # 2000 for a thorough run
ON_A_SCREEN = 1600


def strict(constant: str) -> None:
    raise ValueError(constant)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_random_arguments(
    part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for number in range(part, COUNT, 4):
        folder = tmp_path / str(number)
        folder.mkdir()
        furnish(folder)
        os.mkfifo(folder / "fifo")
        monkeypatch.chdir(folder)
        before, code = set(folder.rglob("*")), 0
        words = arguments(random.Random(number))
        capsys.readouterr()
        try:
            main(words)
        except SystemExit as end:
            code = end.code  # type: ignore[assignment]
        error = capsys.readouterr().err
        assert code in (0, 2), words
        if code == 2:
            assert set(folder.rglob("*")) == before, f"{words} left files behind"
            assert len(error) < ON_A_SCREEN and "Traceback" not in error, words
        for path in folder.rglob("*.json"):
            json.loads(path.read_text(), parse_constant=strict)

"""The table of families: what it says of three, and that the committed one has all families and no false promise."""

import json
from pathlib import Path

import pytest

from benchmarks.families import BAD, BEGIN, END, SPECIMENS, Families, bad, families_table, run_families
from rsm_guidance.core.errors import UsageError

ROOT = Path(__file__).parents[2]


def test_promises_are_kept_and_what_is_not_kept_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("sdxl", "strange: remembering", "strange: padding")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}stale\n{END}\nafter\n")
    found = run_families(Families(tmp_path / "f.json", page, names))["families"]
    assert set(found["sdxl"]["entries"].values()) == {"works"}
    assert found["strange: remembering"]["entries"]["stepwise"] == "refused"
    assert "depends on the levels before" in found["strange: remembering"]["said"]["stepwise"]
    assert found["strange: padding"]["entries"]["batch"] == "told"
    assert "stale" not in page.read_text() and page.read_text().endswith("after\n")
    monkeypatch.setattr(
        "benchmarks.families.red", lambda images, prompts: images.flatten(1)[:, 0] * 0 + len(prompts[0])
    )
    assert "sdxl: none differs" in bad(run_families(Families(tmp_path / "f.json", families=("sdxl",))))
    with pytest.raises(UsageError, match="no family 'nothing'"):
        run_families(Families(tmp_path / "f.json", families=("nothing",)))


def test_the_committed_table_is_whole_and_has_no_false_promise() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())
    assert result["families"].keys() == SPECIMENS.keys() and len(SPECIMENS) >= 40
    assert not bad(result) and BAD
    assert families_table(result) in (ROOT / "docs" / "families.md").read_text()

"""Any mix of broken rows and images: what is given is right, and what is not given is counted."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsm_guidance.core.errors import UsageError
from rsm_guidance.data.preferences import Preference, Problem, Reason, decoded, part_of, read_preferences
from rsm_guidance.data.preferences.rows import Row, rows
from tests.data.layouts import images_in, pick, read, write_json, write_lines, write_parquet
from tests.data.pictures import BROKEN, noisy, number_of

GOOD = [f"{i}.png" for i in range(6)]
LINES = ["", "{", "[1, 2]", '"text"', "null", '{"prompt": "p"', "\\x", "12", '{"a": NaN}', "\udcff{"]
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "prompt": st.sampled_from(["p", "a red cat", "", "  ", None, 5]),
        "chosen": st.sampled_from([*GOOD, *BROKEN, "", None, 7, "https://x.org/a.png", "../gone/é.png", "\0"]),
        "rejected": st.sampled_from([*GOOD, *BROKEN, "", None, {"bytes": None, "path": "1.png"}, ["1.png"]]),
    },
)
WHOLE = st.fixed_dictionaries(
    {
        "prompt": st.sampled_from(["p", "a red cat"]),
        "chosen": st.sampled_from(GOOD[:3]),
        "rejected": st.sampled_from([*GOOD[:3], *BROKEN]),
    }
)
ROWS = st.lists(st.one_of(WHOLE, FIELDS, st.sampled_from(LINES)), min_size=4, max_size=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pairs")
    images_in(path, *GOOD)
    for name, data in BROKEN.items():
        if data is not None:
            (path / name).write_bytes(data)
    return path


def expected(row: Any) -> tuple[str, int, int] | None:
    """What a row means: the prompt and the numbers of the better and the worse image; None if it means nothing."""
    if not isinstance(row, dict):
        return None
    paths = [v["path"] if isinstance(v, dict) else v for v in (row.get("chosen"), row.get("rejected"))]
    prompt = row.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip() or not all(p in GOOD for p in paths if isinstance(p, str)):
        return None
    if not all(isinstance(p, str) for p in paths) or paths[0] == paths[1]:
        return None
    return prompt, GOOD.index(paths[0]) + 10, GOOD.index(paths[1]) + 10


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(mixed=ROWS)
def test_any_mix_of_broken_rows_gives_the_right_pairs_and_counts_the_rest(folder: Path, mixed: list[Any]) -> None:
    whole = [{"prompt": "first", "chosen": "0.png", "rejected": "1.png"}, *mixed]
    path = folder / "table.jsonl"
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in whole)
    path.write_bytes(text.encode(errors="surrogateescape"))
    problems: list[Problem] = []
    found = {}
    for pair in decoded(read_preferences(path).records(), problems.append):
        better, worse = pair.images if pair.preference.probability == 1 else pair.images[::-1]
        found[pair.preference.place] = pair.preference.prompt, number_of(better), number_of(worse)
    meant = {f"table.jsonl, line {i}": expected(row) for i, row in enumerate(whole, 1)}
    assert found == {place: pair for place, pair in meant.items() if pair is not None}
    blank = {f"table.jsonl, line {i}" for i, row in enumerate(whole, 1) if row == ""}
    assert [p.place for p in problems] == [p for p, pair in meant.items() if pair is None and p not in blank]


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_damaged_csv_gives_no_pair_that_was_not_in_it(folder: Path, data: st.DataObject) -> None:
    header, lines = "prompt,chosen,rejected", [f'"prompt, {i}",{i}.png,{i + 1}.png' for i in range(5)]
    text = "\n".join([header, *lines]) + "\n"
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(len(header) + 1, len(text) - 1))
        text = text[:at] + data.draw(st.sampled_from(['"', "", ",", "\n", "\0", "\ufffd"])) + text[at + 1 :]
    path = folder / "damaged.csv"
    path.write_text(text, newline="")
    try:
        pairs, _ = read(read_preferences(path))
    except UsageError:
        return
    for p in pairs:
        better, worse = (p.first, p.second) if p.probability == 1 else (p.second, p.first)
        if p.prompt in {f"prompt, {i}" for i in range(5)} and worse.path.name in GOOD and better.path.name in GOOD:
            i = int(p.prompt[-1])
            assert (better.path.name, worse.path.name) == (f"{i}.png", f"{i + 1}.png")


def test_a_quote_that_is_not_closed_joins_no_rows(folder: Path) -> None:
    path = folder / "quotes.csv"
    path.write_text('prompt,chosen,rejected\nfirst,0.png,1.png\n"p,1.png,2.png\n"q",3.png,4.png\nr,4.png,5.png\n')
    pairs, problems = read(read_preferences(path))
    assert [p.prompt for p in pairs] == ["first", "r"]
    assert [str(p).partition(": ',")[0] for p in problems] == [
        "quotes.csv, line 3: malformed row: quotes that do not match"
    ]


@pytest.mark.parametrize("size", [1, 40, 3000])
def test_a_json_list_is_read_as_it_is_and_up_to_where_it_is_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    monkeypatch.setattr("rsm_guidance.data.preferences.rows._BLOCK", 64)
    items = [{"n": i, "text": 'x]}[{"é' * (i % 7)} for i in range(size)]
    path = write_json(tmp_path / "list.json", items)
    assert [dict(r.values) for r in rows(path) if isinstance(r, Row)] == items
    whole = path.read_bytes()
    for share in (0.3, 0.9):
        path.write_bytes(whole[: int(share * len(whole)) or 1])
        *before, last = rows(path)
        assert isinstance(last, Problem) and last.reason is Reason.MALFORMED
        assert [dict(r.values) for r in before if isinstance(r, Row)] == items[: len(before)]
    path.write_text('[{"n": 0}, 5, {"n": 1}, {"n" 2}, {"n": 3}]')
    found = list(rows(path))
    assert [isinstance(r, Row) for r in found] == [True, False, True, False]
    assert "nothing is read from here on" in str(found[-1])


def test_a_damaged_parquet_file_does_not_end_the_run(tmp_path: Path) -> None:
    big = [pick(i, jpg_0=noisy(i, "PNG")) for i in range(100)]
    first = write_parquet(tmp_path / "train-00000-of-00003.parquet", big, row_group_size=20, compression="none")
    second = write_parquet(tmp_path / "train-00001-of-00003.parquet", [pick(i) for i in range(10)])
    write_parquet(tmp_path / "train-00002-of-00003.parquet", [pick(i) for i in range(100, 104)])
    second.write_bytes(second.read_bytes()[:-20])
    damaged = bytearray(first.read_bytes())
    late = damaged.index(big[70]["jpg_0"]) - 1000  # within the fourth group of rows
    damaged[late : late + 2000] = b"\xff" * 2000
    first.write_bytes(bytes(damaged))
    pairs, [lost, none] = read(read_preferences(tmp_path))
    assert [p.prompt for p in pairs] == [f"prompt {i}" for i in range(104) if not 60 <= i < 80]
    assert str(lost).startswith("train-00000-of-00003.parquet, row 61: malformed row: rows 61 to 80 cannot be read")
    assert str(none).startswith("train-00001-of-00003.parquet: malformed row: no parquet file")


def test_iterating_warns_once_of_rows_that_cannot_be_read(tmp_path: Path) -> None:
    good = {"prompt": "p", "chosen": "a.png", "rejected": "b.png"}
    data = read_preferences(write_lines(tmp_path / "a.jsonl", [good, {}, good, "{", {"prompt": ""}]))
    with pytest.warns(UserWarning, match=r"3 rows skipped \(.*2 missing field.*\); first: a.jsonl, line 2") as caught:
        assert len(list(data)) == 2
    assert len(caught) == 1


def test_a_prompt_stays_in_its_part_when_rows_are_added(tmp_path: Path) -> None:
    lines = [{"prompt": f"prompt {i % 150}", "chosen": f"{i}a.png", "rejected": f"{i}b.png"} for i in range(300)]
    path = write_lines(tmp_path / "a.jsonl", lines[:200])
    parts = {part: read_preferences(path, part, test_fraction=0.3) for part in ("train", "test")}
    before = {part: [p.prompt for p in data] for part, data in parts.items()}
    assert not set(before["train"]) & set(before["test"]) and sum(map(len, before.values())) == 200
    assert 30 < len(set(before["test"])) < 60
    random.Random(0).shuffle(lines)
    write_lines(path, lines)
    for part, data in parts.items():
        after = {p.prompt for p in data}
        assert set(before[part]) <= after
    assert part_of(" A Red  cat", 0.5) == part_of("a red CAT", 0.5)
    assert {part_of(f"p{i}", 0.5, 0) == part_of(f"p{i}", 0.5, 1) for i in range(20)} == {True, False}
    assert part_of("p", 0) == "train" and part_of("p", 1) == "test"
    with pytest.raises(UsageError, match="must lie in"):
        read_preferences(path, "test", test_fraction=5)


@pytest.mark.parametrize(
    "wrong", [{"probability": 1.2}, {"probability": float("nan")}, {"weight": 0.0}, {"prompt": " "}]
)
def test_a_record_refuses_what_is_no_preference(wrong: dict[str, Any]) -> None:
    from rsm_guidance.data.preferences import ImageSource

    image = ImageSource(Path("a.png"))
    with pytest.raises(ValueError):
        Preference(**{"prompt": "p", "first": image, "second": image, "probability": 1.0} | wrong)

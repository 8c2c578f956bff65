"""`rsm-guidance data check`: every row that cannot be used, with its line and reason, and exit codes."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from rsm_guidance.cli.main import main
from rsm_guidance.data.preferences import Reason, check_preferences, read_preferences
from rsm_guidance.data.preferences.check import fewest_tokens
from tests.data.layouts import images_in, pick, write_json, write_lines, write_parquet
from tests.data.pictures import BROKEN


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(["data", "check", *arguments])
    said = capsys.readouterr()
    return int(stop.value.code or 0), said.out + said.err


def pairs(folder: Path, count: int) -> list[dict[str, str]]:
    images_in(folder, *(f"{i}.png" for i in range(2 * count)))
    return [{"prompt": f"p{i}", "chosen": f"{2 * i}.png", "rejected": f"{2 * i + 1}.png"} for i in range(count)]


def test_what_is_wrong_is_said_row_by_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[object] = list(pairs(tmp_path, 4))
    for name, data in BROKEN.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        lines.append({"prompt": "broken", "chosen": "0.png", "rejected": name})
    lines += [lines[0], {**pairs(tmp_path, 4)[1], "chosen": "3.png", "rejected": "2.png"}]  # again, and turned round
    lines += [{"prompt": "same", "chosen": "0.png", "rejected": "copy.bmp"}, {"prompt": "x"}, "{"]
    Image.open(tmp_path / "0.png").save(tmp_path / "copy.bmp")
    path = write_lines(tmp_path / "choices.jsonl", lines)
    code, said = run(capsys, str(path), "--json", str(tmp_path / "report.json"))
    assert code == 1
    for number, reason in enumerate(BROKEN, 5):
        assert f"choices.jsonl, line {number}: {reason}: {tmp_path / reason}" in said
    assert "choices.jsonl, line 12: identical images" in said and "line 10:" not in said
    assert "choices.jsonl, line 13: missing field: 'chosen'" in said
    assert "choices.jsonl, line 14: malformed row: no JSON object" in said
    assert "rows         14, 8 of them with problems\npreferences  4 usable, 0 of them ties\nprompts      4" in said
    assert "duplicate                2  (left out by rule)" in said
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["reasons"] == dict.fromkeys(BROKEN, 1) | {
        "duplicate": 2,
        "identical images": 1,
        "missing field": 1,
        "malformed row": 1,
    }
    assert [p["place"].split()[-1] for p in report["problems"]] == [str(i) for i in (5, 6, 7, 8, 9, 12, 13, 14)]


def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[object] = list(pairs(tmp_path, 3))
    path = write_lines(tmp_path / "a.jsonl", lines)
    assert run(capsys, str(path))[0] == 0
    write_lines(path, [*lines, lines[0]])
    assert run(capsys, str(path))[0] == 0  # duplicates are left out by rule
    write_lines(path, [*lines, "{"])
    assert run(capsys, str(path))[0] == 1
    write_lines(path, [{**row, "chosen": "gone.png"} for row in pairs(tmp_path, 3)])
    code, said = run(capsys, str(path))
    assert code == 2 and "preferences  0 usable" in said
    code, said = run(capsys, str(tmp_path / "none.csv"))
    assert code == 2 and said.startswith("rsm-guidance: error: there is no file or folder")
    assert run(capsys, "ymhao/HPDv2")[0] == 2
    assert run(capsys, str(path), "--limit", "-1")[0] == 2


def test_the_list_is_capped_and_the_counts_are_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pairs(tmp_path, 1) + [{"prompt": "p", "chosen": "0.png", "rejected": f"gone {i}.png"} for i in range(30)]
    code, said = run(capsys, str(write_lines(tmp_path / "a.jsonl", rows)), "--limit", "3")
    assert code == 1 and said.count("missing file:") == 3 and "... and 27 more" in said
    assert "missing file        30" in said


def test_a_broken_image_of_a_ranked_list_is_said_once(tmp_path: Path) -> None:
    images_in(tmp_path / "test", "a.png", "b.png", "c.png")
    row = {"prompt": "p", "image_path": ["a.png", "gone.png", "b.png", "c.png"], "rank": [1, 2, 3, 4]}
    report = check_preferences(read_preferences(write_json(tmp_path / "test.json", [row])))
    assert (report.rows, report.unusable_rows, report.usable, report.exit_code) == (1, 1, 3, 1)
    assert report.problems.counts == {Reason.MISSING: 1}


def test_prompts_over_the_limit_are_said_once(tmp_path: Path) -> None:
    rows = pairs(tmp_path, 4)
    for row in rows[1:3]:
        row["prompt"] += " word" * 80
    data = read_preferences(write_lines(tmp_path / "a.jsonl", rows))
    [note] = check_preferences(data).notes()
    assert note.startswith("2 prompts have more than 77 tokens, the first at a.jsonl, line 2")
    [note] = check_preferences(data, count_tokens=len, token_limit=1).notes()
    assert note.startswith("4 prompts have more than 1 tokens, the first at a.jsonl, line 1")


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [("a cat", 4), ("it's 12 o'clock!!", 10), ("", 2), ("snake_case, café", 7), ("they're we'LL", 6)],
)
def test_the_fewest_tokens_that_clip_can_make(prompt: str, tokens: int) -> None:
    assert fewest_tokens(prompt) == tokens


def test_columns_that_are_not_used_are_named(tmp_path: Path) -> None:
    rows = [row | {"wieght": "2", "category": "x", "prompt ": ""} for row in pairs(tmp_path, 2)]
    [note] = check_preferences(read_preferences(write_lines(tmp_path / "a.jsonl", rows))).notes()
    assert note == "columns that are not used: wieght, prompt "
    path = write_parquet(tmp_path / "train-00000-of-00001.parquet", [pick(0) | {"more": 1}])
    assert not check_preferences(read_preferences(path)).notes()


def test_tokens_are_counted_with_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = pairs(tmp_path, 2)
    rows[1]["prompt"] = "a red star and " * 20
    path = write_lines(tmp_path / "a.jsonl", rows)
    code, said = run(capsys, str(path), "--tokenizer", "shapes")
    assert code == 0 and re.search(r"note: 1 prompt has more than \d+ tokens, the first at a.jsonl, line 2", said)
    code, said = run(capsys, str(path), "--tokenizer", str(tmp_path))
    assert code == 2 and "cannot load a tokenizer from" in said


def test_labels_that_never_change_are_noted(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train-00000-of-00001.parquet", [pick(i) for i in range(25)])
    [note] = check_preferences(read_preferences(path)).notes()
    assert note == "the first image is preferred in every row; is that what the labels mean?"
    write_parquet(path, [pick(i, (0.5, 0.5)) for i in range(3)])
    assert check_preferences(read_preferences(path)).notes() == ["every preference is a tie; there is nothing to learn"]

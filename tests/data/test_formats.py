"""Published formats, written here in their real layouts, and tables and folders of one's own."""

import csv
import sys
from pathlib import Path
from typing import Any

import pytest

from rsm_guidance.core.errors import UsageError
from rsm_guidance.data.preferences import FORMATS, Reason, read_preferences
from tests.data.layouts import compared, images_in, pick, read, write_json, write_lines, write_parquet
from tests.data.pictures import encoded, number_of


@pytest.mark.parametrize("struct", [False, True])
def test_pick_a_pic(tmp_path: Path, struct: bool) -> None:
    rows = [
        pick(0, num_example_per_prompt=1),
        pick(1, (0.0, 1.0), num_example_per_prompt=2),
        pick(2, (0.5, 0.5), num_example_per_prompt=2),
        pick(3, has_label=False),
        pick(4, (1.0, 1.0)),
        pick(5, jpg_1=None),
    ]
    if struct:
        rows = [r | {f"jpg_{i}": {"bytes": r[f"jpg_{i}"], "path": None} for i in (0, 1)} for r in rows]
    write_parquet(tmp_path / "data" / "train-00000-of-00002-abc.parquet", rows[:3])
    write_parquet(tmp_path / "data" / "train-00001-of-00002-abc.parquet", rows[3:])
    write_parquet(tmp_path / "data" / "validation_unique-00000-of-00001-abc.parquet", [pick(9)])
    found, problems = read(read_preferences(tmp_path))
    assert [compared(p) for p in found] == [
        ("prompt 0", 0, 1, 1.0),
        ("prompt 1", 3, 2, 1.0),
        ("prompt 2", 4, 5, 0.5),
    ]
    assert [p.probability for p in found] == [1, 0, 0.5] and found[2].tie
    assert [p.weight for p in found] == [1, 0.5, 0.5]
    assert found[0].models == ("a", "b") and found[0].ids["image_0_uid"] == "u0a"
    assert [p.reason for p in problems] == [Reason.NO_LABEL, Reason.BAD_LABEL, Reason.NO_FIELD]
    assert problems[0].place == "train-00001-of-00002-abc.parquet, row 1"
    [other], _ = read(read_preferences(tmp_path, "validation_unique"))
    assert other.prompt == "prompt 9"
    with pytest.raises(UsageError, match="has no split 'test'; choose one of train, validation_unique"):
        read_preferences(tmp_path, "test")


@pytest.mark.parametrize(("train", "test"), [("file_path", "image_path"), ("image_path", "file_path")])
def test_hpdv2(tmp_path: Path, train: str, test: str) -> None:
    images_in(tmp_path / "train", "a.png", "b.png")
    images_in(tmp_path / "test", "a.png", "b.png", "c.png", first=20)
    write_json(
        tmp_path / "train.json",
        [
            {"prompt": "p", train: ["a.png", "b.png"], "human_preference": [0, 1]},
            {"prompt": "q", train: ["a.png", "b.png"], "human_preference": [0, 0]},
            {"prompt": "r", train: ["a.png"], "human_preference": [1]},
        ],
    )
    annotations = [{"rank": [1, 2, 3], "user_hash": "x"}]
    lists = {"prompt": "t", test: ["a.png", "b.png", "c.png"], "rank": [2, 3, 2], "raw_annotations": annotations}
    write_json(tmp_path / "test.json", [lists])
    found, problems = read(read_preferences(tmp_path))
    assert [compared(p) for p in found] == [("p", 11, 10, 1.0)] and found[0].weight == 1
    assert [p.reason for p in problems] == [Reason.BAD_LABEL] * 2 and problems[1].place == "train.json, item 3"
    found, _ = read(read_preferences(tmp_path, "test"))
    assert [compared(p) for p in found] == [("t", 20, 21, 1), ("t", 20, 22, 0.5), ("t", 22, 21, 1)]
    assert sum(p.weight for p in found) == pytest.approx(1)


@pytest.mark.parametrize("ending", ["json", "jsonl", "lines as json"])
def test_hpdv3(tmp_path: Path, ending: str) -> None:
    images_in(tmp_path / "images", *(f"{i}.png" for i in range(40)))
    rows: list[dict[str, Any]] = [
        {"prompt": f"p{i}", "path1": f"images/{i}.png", "path2": f"images/{i + 20}.png", "model1": "m", "model2": "n"}
        | {"source": "real", "confidence": 0.97, "choice_dist": [18, 2]}
        for i in range(20)
    ]
    rows[3] |= {"confidence": None, "choice_dist": None}
    rows[4] |= {"confidence": 0.5, "choice_dist": [2, 6]}  # path1 is preferred all the same
    rows[5] |= {"choice_dist": [0, 0]}
    del rows[6]["confidence"], rows[6]["choice_dist"]
    if ending == "json":
        path = write_json(tmp_path / "train.json", rows)
    else:
        path = write_lines(tmp_path / ("train.jsonl" if ending == "jsonl" else "train.json"), rows)
    data = read_preferences(path)
    found, problems = read(data)
    expected = [(f"p{i}", 10 + i, 30 + i, 0.9) for i in range(20)]
    for i, label in ((3, 1.0), (4, 0.75), (6, 1.0)):
        expected[i] = (*expected[i][:3], label)
    del expected[5]
    assert [compared(p) for p in found] == expected
    assert [p.reason for p in problems] == [Reason.BAD_LABEL]
    first = [p.probability > 0.5 for p in found]
    assert 4 < sum(first) < 15  # chance decides the order
    assert all(p.models == (("m", "n") if f else ("n", "m")) for p, f in zip(found, first, strict=True))
    assert [p.probability > 0.5 for p in read(data)[0]] == first
    assert [p.probability > 0.5 for p in read(read_preferences(path, seed=1))[0]] != first
    found, problems = read(read_preferences(path, min_confidence=0.9))
    assert len(found) == 16 and [p.reason for p in problems].count(Reason.CONFIDENCE) == 3


def test_the_order_of_a_pair_does_not_depend_on_other_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "path1": f"{i}a.png", "path2": f"{i}b.png"} for i in range(30)]
    whole, _ = read(read_preferences(write_lines(tmp_path / "a.jsonl", rows)))
    part, _ = read(read_preferences(write_lines(tmp_path / "b.jsonl", rows[::-3])))
    labels = {p.prompt: p.probability for p in whole}
    assert [labels[p.prompt] for p in part] == [p.probability for p in part]


def image_reward_item(prompt: int, name: str, rank: int) -> dict[str, Any]:
    return {
        "image_path": f"images/elsewhere/{name}",
        "prompt_id": f"00{prompt}",
        "prompt": f"prompt {prompt}",
        "classification": "Animals",
        "image_amount_in_total": 3,
        "rank": rank,
        "overall_rating": 8 - rank,
        "image_text_alignment_rating": 5,
        "fidelity_rating": 6,
    }


def test_image_reward_db(tmp_path: Path) -> None:
    for shard in (1, 2, 10):
        folder = tmp_path / "images" / "train" / f"train_{shard}"
        images_in(folder, "a.webp", "b.webp", "c.webp", "d.webp", first=shard)
        items = [image_reward_item(1, "a.webp", 4), image_reward_item(2, "d.webp", 1)]
        items += [image_reward_item(1, "b.webp", 2), image_reward_item(1, "c.webp", 4)]
        write_json(folder / f"train_{shard}.json", items)
    found, problems = read(read_preferences(tmp_path, "train"))
    assert [compared(p) for p in found[:3]] == [("prompt 1", 2, 1, 1), ("prompt 1", 1, 3, 0.5), ("prompt 1", 2, 3, 1)]
    assert [number_of(p.first.load()) for p in found[::3]] == [1, 2, 10]  # shards in the order of their numbers
    assert found[0].scores == {"overall": (4, 6), "alignment": (5, 5), "fidelity": (6, 6)}
    assert found[0].category == "Animals"
    assert [p.reason for p in problems] == [Reason.BAD_LABEL] * 3  # one image is no comparison


def test_image_reward_lists(tmp_path: Path) -> None:
    images_in(tmp_path / "part-1", "a.webp", "b.webp", "c.webp")
    names = [f"part-1/{n}.webp" for n in "abc"]
    rows = [{"id": "1", "prompt": "p", "generations": names, "ranking": [5, 1, 2]}]
    rows.append({"id": "2", "prompt": "q", "generations": names, "ranking": [1, 2]})
    found, problems = read(read_preferences(write_json(tmp_path / "test.json", rows)))
    assert [compared(p)[1:3] for p in found] == [(11, 10), (12, 10), (11, 12)]
    assert [p.reason for p in problems] == [Reason.BAD_LABEL]


def test_rapidata(tmp_path: Path) -> None:
    def images(number: int) -> dict[str, Any]:
        both = {f"image{i}": {"bytes": encoded(number + i), "path": f"{i}.png"} for i in (1, 2)}
        return {"prompt": f"p{number}", "model1": "m", "model2": "n", **both}

    old = [images(0) | {"votes_image1": 3, "votes_image2": 7, "detailed_results": "[]", "image1_path": "x"}]
    old += [images(2) | {"votes_image1": 5, "votes_image2": 5}, images(4) | {"votes_image1": 0, "votes_image2": 0}]
    write_parquet(tmp_path / "old" / "data" / "train_0001-00000-of-00001.parquet", old[:2])
    write_parquet(tmp_path / "old" / "data" / "train_0002-00000-of-00001.parquet", old[2:])
    found, problems = read(read_preferences(tmp_path / "old", "train"))
    assert [p.probability for p in found] == [0.3, 0.5] and found[0].models == ("m", "n")
    assert [p.reason for p in problems] == [Reason.BAD_LABEL]
    assert len(read(read_preferences(tmp_path / "old", "train_0001"))[0]) == 2
    weights = {
        f"weighted_results_image{i}_{d}": float(v)
        for d, both in {"preference": (0.75, 0.25), "coherence": (1, 3), "alignment": (0, 2)}.items()
        for i, v in enumerate(both, 1)
    }
    path = write_parquet(tmp_path / "new" / "train-00000-of-00001.parquet", [images(0) | weights])
    [one], _ = read(read_preferences(path))
    assert one.probability == 0.75 and one.scores["coherence"] == (1, 3) and one.scores["alignment"] == (0, 2)


def test_edit_reward(tmp_path: Path) -> None:
    def struct(number: int) -> dict[str, Any]:
        return {"bytes": encoded(number), "path": None}

    rows = [
        {"key": "k", "unique_key": "uk", "pair_index": 0, "instruction": f"make it red {i}", "source_img": struct(1)}
        | {"left_output_image": struct(2), "right_output_image": struct(3), "left_model": "m", "right_model": "n"}
        | {"left_overall_score": 6.0, "right_overall_score": 4.0, "vote_type": vote}
        for i, vote in enumerate(["leftvote", "rightvote", "tie", "both"])
    ]
    found, problems = read(read_preferences(write_parquet(tmp_path / "train-00000-of-00001.parquet", rows)))
    assert [p.probability for p in found] == [1, 0, 0.5] and [p.reason for p in problems] == [Reason.BAD_LABEL]
    assert found[0].source_image is not None and number_of(found[0].source_image.load()) == 1
    assert found[0].scores == {"overall": (6, 4)} and found[0].swapped().scores == {"overall": (4, 6)}
    row = {"prompt": "p", "path1": "a.png", "path2": "b.png", "path_src": "s.png", "tie_case": True}
    [derived], _ = read(read_preferences(write_lines(tmp_path / "train.jsonl", [row])))
    assert derived.tie and derived.source_image is not None and derived.source_image.path == tmp_path / "s.png"


def write_table(path: Path, header: list[str], rows: list[list[Any]], delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file, delimiter=delimiter).writerows([header, *rows])
    return path


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_a_table_of_chosen_and_rejected_images(tmp_path: Path, delimiter: str) -> None:
    images_in(tmp_path / "images", "a.png", "b.png")
    header = ["prompt", "chosen", "rejected", "category", "weight"]
    rows = [['a "big", red; cat\nasleep', "images/a.png", "images/b.png", "x", "2"], ["q", "images/b.png", "", "", ""]]
    rows += [["", "images/a.png", "images/b.png", "", ""], ["r", "https://x.org/a.png", "images/a.png", "", ""]]
    found, problems = read(read_preferences(write_table(tmp_path / "c.csv", header, rows, delimiter)))
    assert [compared(p) for p in found] == [('a "big", red; cat\nasleep', 10, 11, 1)]
    assert (found[0].category, found[0].weight, found[0].place) == ("x", 2, "c.csv, line 2")
    assert [(p.place, p.reason) for p in problems] == [
        ("c.csv, line 4", Reason.NO_FIELD),
        ("c.csv, line 5", Reason.NO_FIELD),
        ("c.csv, line 6", Reason.MISSING),
    ]


def test_a_table_of_labels(tmp_path: Path) -> None:
    images_in(tmp_path, "a.png", "b.png")
    labels = {"0": 1, "1": 0, "tie": 0.5, "image_0": 1, " Image_1": 0, "0.25": 0.75, "2": None, "yes": None, "": None}
    rows = [[f"p{i}", "a.png", "b.png", label] for i, label in enumerate(labels)]
    path = write_table(tmp_path / "c.csv", ["caption", "image_0", "image_1", "label"], rows)
    found, problems = read(read_preferences(path))
    assert [p.probability for p in found] == [v for v in labels.values() if v is not None]
    assert [p.reason for p in problems] == [Reason.BAD_LABEL, Reason.BAD_LABEL, Reason.NO_LABEL]
    lines = [{"prompt": "p", "image_0": "a.png", "image_1": "b.png", "label": v} for v in (0, 1, 0.5, True, [1], None)]
    found, problems = read(read_preferences(write_lines(tmp_path / "c.jsonl", lines)))
    assert [p.probability for p in found] == [1, 0, 0.5]
    assert [p.reason for p in problems] == [Reason.BAD_LABEL, Reason.BAD_LABEL, Reason.NO_LABEL]


def test_a_folder_of_winners_and_losers(tmp_path: Path) -> None:
    images_in(tmp_path / "w", "a.png", "b.png", "c.png", "d.png", "e.png")
    images_in(tmp_path / "l", "a.jpg", "b.png", "c.png", "e.png", first=20)
    for name, caption in {"w/a": "a cat", "l/b": "a dog", "w/c": "one", "l/c": "another", "w/d": "d"}.items():
        (tmp_path / f"{name}.txt").write_text(caption + "\n")
    found, problems = read(read_preferences(tmp_path))
    assert [(p.prompt, number_of((p if p.probability == 1 else p.swapped()).first.load())) for p in found] == [
        ("a cat", 10),
        ("a dog", 11),
    ]
    assert [p.reason for p in problems] == [Reason.NO_PROMPT, Reason.MISSING, Reason.NO_PROMPT]
    assert "d: missing file: one image of this name is needed in l/; got none" in str(problems[1])


@pytest.mark.parametrize("hub", [hub for f in FORMATS.values() for hub in f.hub] + ["somebody/something"])
def test_a_hub_id_says_what_to_download(hub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=f"hf download {hub} --repo-type dataset --local-dir"):
        read_preferences(hub)
    if hub.endswith("HPDv2"):
        with pytest.raises(UsageError, match="unpack train.tar.gz"):
            read_preferences(hub)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [pick(0)])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UsageError, match=r'pip install "rsm-guidance\[data\]"'):
        read_preferences(path)


def test_what_cannot_be_recognised_is_said(tmp_path: Path) -> None:
    table = write_table(tmp_path / "c.csv", ["text", "winner"], [["a", "b"]])
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "none").mkdir()
    cases = {
        table: "has the columns text, winner; no known format has those.  A table needs prompt, chosen, rejected",
        tmp_path / "notes.txt": "its ending must be one of .jsonl",
        tmp_path / "empty.jsonl": "holds no rows that can be read",
        tmp_path / "none": "holds no preference data",
        tmp_path / "gone.csv": "there is no file or folder",
    }
    for path, message in cases.items():
        with pytest.raises(UsageError, match=message):
            read_preferences(path)
    with pytest.raises(UsageError, match="there is no format 'hpdv4'; did you mean 'hpdv"):
        read_preferences(table, format="hpdv4")
    with pytest.raises(UsageError, match="the format 'hpdv3' needs path1 path2 prompt"):
        read_preferences(table, format="hpdv3")
    good = write_table(tmp_path / "d.csv", ["prompt", "chosen", "rejected"], [["a", "b", "c"]])
    with pytest.raises(UsageError, match="has no splits of its own, so that the split is 'train' or 'test'"):
        read_preferences(good, "validation")
    with pytest.raises(UsageError, match="holds several tables; name one: c.csv, d.csv"):
        read_preferences(tmp_path)

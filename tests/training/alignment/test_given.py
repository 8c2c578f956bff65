"""Learning from images that are given: pairs, groups, and an anchor of captioned images."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rsm_guidance.core.errors import UsageError
from rsm_guidance.training.alignment.given import read_captioned, read_groups
from rsm_guidance.training.alignment.trainer import train_align
from tests.training.alignment.test_training import built
from tests.training.alignment.worlds import log, small
from tests.training.reward_model.worlds import picture, write_choices

Family = Callable[[str], Path]


@pytest.fixture(scope="module")
def groups(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Groups of three images, of which the redder ones are worth more; and the same images with captions alone."""
    folder = tmp_path_factory.mktemp("groups")
    lines, captioned = [], []
    for g in range(4):
        names = [f"{g}_{i}.png" for i in range(3)]
        for i, name in enumerate(names):
            picture(i / 3, 10 * g + i, 40).save(folder / name)
        lines.append({"prompt": f"a thing, number {g}", "images": names, "rewards": [0, 0.5, 1]})
        captioned += [{"prompt": f"a thing, number {g}", "image": name} for name in names]
    (folder / "captioned.jsonl").write_text("\n".join(map(json.dumps, captioned)))
    path = folder / "groups.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in log(out) if "loss" in line]


def test_pairs_and_groups_are_learnt(groups: Path, family: Family, tmp_path: Path) -> None:
    pairs = write_choices(tmp_path / "choices", count=8)
    for name, path, size in (("dpo", pairs, 2), ("gdro", groups, 3), ("rwr", groups, 3)):
        options: dict[str, Any] = {"rollout": {"kind": "data", "data": str(path), "group": size}, "epochs": 3}
        if name == "rwr":
            options["form"] = {"name": "rwr", "temperature": 1.0}
        config = small(name, family("sd3"), tmp_path / name / "run", **options)
        report = train_align(config)
        assert len(losses(config.out)) == 3 and report["best"]["drift"] > 0
        if name == "dpo":
            assert losses(config.out)[0] == pytest.approx(0.6931, abs=1e-3), "log 2 at the reference"


def test_groups_train_towards_what_is_worth_more(groups: Path, family: Family, tmp_path: Path) -> None:
    config = small(
        "gdro", family("sd3"), tmp_path / "run", rollout={"kind": "data", "data": str(groups), "group": 3},
        prompts_per_epoch=4, optimizer={"lr": 1e-2}, epochs=12, form={"top_weight": None, "implicit_strength": 50.0},
    )  # fmt: skip
    train_align(config)
    accuracy = [line["accuracy"] for line in log(config.out) if "accuracy" in line]
    assert accuracy[0] == 0 and sum(accuracy[-4:]) / 4 > 0.6


def test_the_anchor_adds_the_flow_matching_loss_of_given_images(groups: Path, family: Family, tmp_path: Path) -> None:
    path, found = groups.with_name("captioned.jsonl"), {}
    for weight in (None, 0.5):
        trust = {} if weight is None else {"data": str(path), "data_weight": weight}
        run = built(small("diffusion-nft", family("sd3"), tmp_path / "run", trust=trust))
        batch = next(run.epochs.start(0))
        found[weight] = run.learner(batch)
        if weight is not None:
            rows = batch["data"]
            with torch.no_grad():
                velocity = batch["data_replay"].denoise(rows["x"], rows["level"], rows["row"]).velocity
            assert velocity is not None and len(rows["row"]) == len(batch["row"])
            assert float(found[weight]["data"]) == pytest.approx(
                float((velocity - (rows["eps"] - rows["x0"])).square().mean()), rel=1e-4
            )
        run.conditions.close()
    gained = found[0.5]["loss"] - found[None]["loss"]
    assert float(gained) == pytest.approx(0.5 * float(found[0.5]["data"]), rel=1e-4)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"prompt": "a", "images": ["0_0.png"], "rewards": [1]}, "line 1: a group has 3 'images'"),
        ({"prompt": "a", "images": ["0_0.png"] * 3, "rewards": [1, 2, float("nan")]}, "must be finite numbers"),
        ({"prompt": "a"}, "groups of 3 images come from JSON lines"),
    ],
)
def test_groups_that_are_none(line: dict[str, Any], says: str, tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_text(json.dumps(line))
    with pytest.raises(UsageError, match=says):
        read_groups(tmp_path / "g.jsonl", 3)


def test_images_that_are_missing(family: Family, tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    path.write_text(json.dumps({"prompt": "a", "images": ["no.png", "none.png"], "rewards": [0, 1]}))
    config = small("dpo", family("sd3"), tmp_path / "run", rollout={"data": str(path), "group": 2})
    with pytest.raises(UsageError, match=r"cannot read the image .*no.png"):
        train_align(config)
    path.write_text(json.dumps({"prompt": "a"}))
    with pytest.raises(UsageError, match="line 1: an image of the anchor"):
        read_captioned(path)

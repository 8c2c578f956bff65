"""Damaged files and folders, and the commands that read them.

`python -m tests.robustness.damage --cases 300` runs them and prints how often what went wrong.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tests.data.pictures import bomb, broken_exif, encoded
from tests.robustness.trial import attempt

ODD: list[Any] = [None, "x", "", -1, 0, 3, 1.5, 1e308, 10**19, True, [], {}, [[[]]], {"a": 1}, "\u202e" * 9, "a" * 3000]
PROMPT = "a red star"


@dataclass(frozen=True)
class Case:
    """A command that reads something damaged.

    Attributes:
        kind: of what is damaged.
        how: the damage.
        words: the command.
        names: of which a refusal must say one.
        works: whether it must come to a result.
    """

    kind: str
    how: str
    words: list[str]
    names: tuple[str, ...]
    works: bool = False


# --- damage to bytes and to what JSON and YAML say ---


def truncated(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data))] if data else data


def flipped(data: bytes, rng: random.Random) -> bytes:
    """Some bits turned over, the more often in the first half kilobyte, where headers are."""
    damaged = bytearray(data)
    for _ in range(rng.choice([1, 3, 40])):
        place = rng.randrange(min(len(damaged), 512) if rng.random() < 0.6 else len(damaged))
        damaged[place] ^= 1 << rng.randrange(8)
    return bytes(damaged)


BYTES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "truncated": truncated,
    "bits flipped": flipped,
    "empty": lambda data, rng: b"",
    "noise": lambda data, rng: rng.randbytes(rng.choice([1, 100, 4000])),
    "another kind of file": lambda data, rng: rng.choice([encoded(1), b"prompt,seed\n1,2\n", b"[1, {2", b"\x80\x04N."]),
    "something behind": lambda data, rng: data + rng.choice([b"\0" * 64, b"}", b"\n\n{", data]),
    "a header of 2^60 bytes": lambda data, rng: (2**60).to_bytes(8, "little") + data[8:],
    "deep nesting": lambda data, rng: b"[" * 100_000,
    "another encoding": lambda data, rng: b"\xff\xfe" + "ä prompt".encode("utf-16-le"),
}


def spoil(path: Path, rng: random.Random) -> str:
    """Damage one file, and say how."""
    data = path.read_bytes()
    choices = [*BYTES, *BYTES, "removed", "a folder", "a loop of links", "a pipe"]
    if path.suffix == ".json":
        choices += ["a value"] * 16
    how = rng.choice(choices)
    path.unlink()
    if how == "a folder":
        path.mkdir()
    elif how == "a loop of links":
        path.symlink_to(path.name)
    elif how == "a pipe":
        os.mkfifo(path)
    elif how == "a value":
        return _other_value(path, json.loads(data), rng)
    elif how != "removed":
        path.write_bytes(BYTES[how](data, rng))
    return how


def _other_value(path: Path, data: Any, rng: random.Random) -> str:
    """Give one entry somewhere in a JSON file another value, or take it out."""
    here, place = data, ""
    while True:
        key = rng.choice(list(here) if isinstance(here, dict) else range(len(here)))
        place += f".{key}"
        if isinstance(here[key], dict | list) and here[key] and rng.random() < 0.8:
            here = here[key]
            continue
        if rng.random() < 0.2:
            del here[key]
            how = f"without {place[1:]}"
        else:
            here[key] = rng.choice(ODD)
            how = f"{place[1:]} = {str(here[key])[:20]}"
        path.write_text(json.dumps(data))
        return how


def copy(source: Path, target: Path) -> Path:
    """A copy of a folder whose files are links: only what is damaged takes space."""
    shutil.copytree(source, target, copy_function=os.link)
    return target


def spoil_one(folder: Path, rng: random.Random, pattern: str = "*") -> str:
    """Damage one file of a folder, or take a folder out of it, and say how."""
    if pattern == "*" and rng.random() < 0.05:
        folders = [p for p in sorted(folder.iterdir()) if p.is_dir()]
        if folders:
            gone = rng.choice(folders)
            shutil.rmtree(gone)
            return f"{gone.name} removed"
    files = [p for p in sorted(folder.rglob(pattern)) if p.is_file()]
    path = rng.choice(files)
    return f"{path.relative_to(folder)}: {spoil(path, rng)}"


# --- what is damaged ---


@dataclass(frozen=True)
class Sources:
    """Whole things, made once: folders of a tiny pipeline, the shapes model, its reward model and a training run, and files
    of a tree and of a comparison."""

    tiny: Path
    shapes: Path
    drm: Path
    run: Path
    tree: Path
    comparison: Path

    @staticmethod
    def make(folder: Path) -> "Sources":
        from rsm_guidance import shapes
        from tests.zoo import ZOO

        tiny = folder / "tiny"
        ZOO["sd15"].build().save_pretrained(tiny)
        model = shutil.copytree(shapes.model_path(), folder / "shapes")
        drm = shutil.copytree(shapes.drm_path(), folder / "drm")
        for words in (TRAIN, TREE, COMPARE):
            done = attempt(words, folder)
            assert done.code == 0, done
        return Sources(tiny, model, drm, folder / "run", folder / "tree.safetensors", folder / "comparison")


TRAIN = (
    "train reward --out run --prompts 4 --validation-prompts 4 --steps 2 --batch-groups 2 --evaluate-every 1 --blocks 2 "
    "--groups.steps 3 --groups.siblings 2 --groups.batch-size 4 --adaptation frozen"
).split()
TREE = ["sample", PROMPT, "--steps", "2", "--sampler", "tree-sampling:simulations=2:tree_file=tree.safetensors"]
TREE += ["--out", "tree.png"]
COMPARE = ["compare", PROMPT, "--samplers", "none,best-of-n", "--budget", "8", "--steps", "2", "--images", "2"]
COMPARE += ["--out", "comparison"]


def picture(folder: Path, rng: random.Random, sources: Sources) -> Case:
    """An image of an unusual kind, which must be scored, or a damaged one."""
    plain = Image.fromarray(np.random.default_rng(rng.randrange(99)).integers(0, 255, (40, 40, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = rng.randrange(1, 9)
    grey = plain.convert("L")
    text = PngInfo()
    text.add_itxt("parameters", "x" * 10**5)
    unusual: dict[str, Callable[[], None]] = {
        "16 bits.png": lambda: Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save("16 bits.png"),
        "cmyk.jpg": lambda: plain.convert("CMYK").save("cmyk.jpg"),
        "1x1.png": lambda: plain.resize((1, 1)).save("1x1.png"),
        "animated.gif": lambda: plain.save("animated.gif", save_all=True, append_images=[grey.convert("RGB")]),
        "animated.png": lambda: plain.save("animated.png", save_all=True, append_images=[plain.rotate(90)]),
        "turned.jpg": lambda: plain.save("turned.jpg", exif=exif),
        "palette.png": lambda: plain.convert("P").save("palette.png", transparency=3),
        "grey with alpha.png": lambda: plain.convert("LA").save("grey with alpha.png"),
        "one bit.png": lambda: plain.convert("1").save("one bit.png"),
        "float.tiff": lambda: Image.fromarray(np.asarray(grey, np.float32)).save("float.tiff"),
        "long text.png": lambda: plain.save("long text.png", pnginfo=text),
        "wide.png": lambda: plain.resize((3000, 1)).save("wide.png"),
        "misnamed.png": lambda: plain.save("misnamed.png", "JPEG"),
    }
    bad = {"bomb.png": bomb(), "exif.jpg": broken_exif(), "text.png": b"no image", "none.png": b""}
    whole = rng.random() < 0.5
    name = rng.choice([*unusual] if whole else [*unusual, *bad, *bad])
    here = os.getcwd()
    os.chdir(folder)
    try:
        how = "unusual"
        if name in bad:
            Path(name).write_bytes(bad[name])
        else:
            unusual[name]()
        if name not in bad and not whole:
            how = spoil(Path(name), rng)
    finally:
        os.chdir(here)
    return Case("image", f"{name}: {how}", ["score", name, "--prompt", PROMPT], (name,), works=whole)


def pipeline(folder: Path, rng: random.Random, sources: Sources) -> Case:
    """A model folder, under the commands that load one."""
    source = rng.choice([sources.tiny, sources.tiny, sources.shapes])
    model = copy(source, folder / "pipe-7f")
    how = spoil_one(model, rng)
    (folder / "p.txt").write_text(PROMPT)
    reward = "math:nan" if rng.random() < 0.02 else "shapes-verifier"
    small = ["--steps", "2", "--reward", reward]
    words = rng.choice(
        [
            ["sample", PROMPT, "--model", "pipe-7f", "--sampler", "best-of-n:candidates=2", *small],
            ["evaluate", "--pipeline", "pipe-7f", "--prompts", "p.txt", "--json", "e.json", *small],
            ["compare", PROMPT, "--model", "pipe-7f", "--samplers", "none", "--images", "1", *small],
            ["families", "pipe-7f"],
        ]
    )
    return Case("model folder", f"{source.name}/{how}", words, ("pipe-7f", reward))


def reward_model(folder: Path, rng: random.Random, sources: Sources) -> Case:
    model = copy(sources.drm, folder / "drm-7f")
    how = spoil_one(model, rng)
    (folder / "i.png").write_bytes(encoded(7, (32, 32)))
    words = rng.choice(
        [
            ["score", "i.png", "--prompt", PROMPT, "--reward", "drm-7f"],
            ["sample", PROMPT, "--steps", "2", "--reward", "drm-7f", "--sampler", "best-of-n:candidates=2"],
            ["sample", PROMPT, "--steps", "2", "--sampler", "stepwise:candidates=2", "--value", "drm-7f"],
        ]
    )
    return Case("reward model", how, words, ("drm-7f",))


def tree(folder: Path, rng: random.Random, sources: Sources) -> Case:
    shutil.copy(sources.tree, folder / "tree.safetensors")
    how = spoil(folder / "tree.safetensors", rng)
    return Case("tree file", how, TREE, ("tree.safetensors",))


def comparison(folder: Path, rng: random.Random, sources: Sources) -> Case:
    """What a comparison has kept: made anew where it is damaged."""
    kept = shutil.copytree(sources.comparison, folder / "comparison")
    how = spoil_one(kept / "runs", rng)
    return Case("comparison", how, COMPARE, ("comparison",))


def training(folder: Path, rng: random.Random, sources: Sources) -> Case:
    """Data, state or model of a training run that is gone on with."""
    run = shutil.copytree(sources.run, folder / "run")
    for path in (run / "report.json", run / "accuracy.png"):
        path.unlink()
    how = spoil_one(run, rng)
    words = [*TRAIN, "--steps", "3"]
    return Case("training run", how, words, ("run",))


def configuration(folder: Path, rng: random.Random, sources: Sources) -> Case:
    (folder / "c.yaml").write_text("out: run\nprompts: 4\nsteps: 1\ngroups: {siblings: 2, steps: 3}\nlr: 1e-3\n")
    if rng.random() < 0.5:
        how = spoil(folder / "c.yaml", rng)
    else:
        how = rng.choice(
            ["a: &a [*a]", "? {a: 1}\n: 2", "!!python/object:os.system x", "steps: 1\nsteps: [1]", "groups: 3", "1: 2"]
            + [
                f"{name}: {json.dumps(rng.choice(ODD))}"
                for name in ("out", "lr", "groups", "steps", "adaptation", "data")
            ]
        )
        if how.startswith(("lr", "out", "data")):
            how += "\nsteps: x"
        (folder / "c.yaml").write_text(how)
    words = ["train", "reward", "--config", "c.yaml", "--prompts", "-1"]  # a file that can be read is refused as well
    return Case("configuration", how, words, ("c.yaml", "prompts"))


def prompts(folder: Path, rng: random.Random, sources: Sources) -> Case:
    name = rng.choice(["p.txt", "p.jsonl", "p.csv"])
    rows = ['{"prompt": "a red star"}\n'] * 2 if name == "p.jsonl" else ["a red star\n"] * 2
    (folder / name).write_text("".join(rows))
    how = rng.choice(["damaged", "a row"])
    if how == "damaged":
        how = spoil(folder / name, rng)
    else:
        row = json.dumps({"prompt": rng.choice(ODD)}) if rng.random() < 0.7 else json.dumps(rng.choice(ODD))
        (folder / name).write_text("".join([*rows, row + "\n"]))
    out = ["--json", "e.json"] if rng.random() < 0.5 else ["--out", "report", "--samplers", "none", "--pairs", "1"]
    command = "evaluate" if "--json" in out else "compare"
    return Case("prompts", f"{name}: {how}", [command, "--prompts", name, "--steps", "1", *out], (name,))


def preferences(folder: Path, rng: random.Random, sources: Sources) -> Case:
    for number in range(2):
        (folder / f"{number}.png").write_bytes(encoded(number))
    name = rng.choice(["t.jsonl", "t.csv", "t.json", "t.tsv", "t.parquet"])
    columns = ("prompt", "chosen", "rejected")
    rows = [dict(zip(columns, ("a star", "0.png", "1.png"), strict=True))] * 3
    mark = "\t" if name == "t.tsv" else ","
    if name == "t.parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), folder / name)
    else:
        lines = {"t.jsonl": "\n".join(map(json.dumps, rows)), "t.json": json.dumps(rows)}
        (folder / name).write_text(
            lines.get(name, "\n".join(mark.join(values) for values in [columns, *(r.values() for r in rows)]))
        )
    spoilt = rng.choice([name, name, "0.png"])
    how = f"{spoilt}: {spoil(folder / spoilt, rng)}"
    return Case("preferences", how, ["data", "check", name, "--json", "report.json"], (name,))


def adapter(folder: Path, rng: random.Random, sources: Sources) -> Case:
    shutil.copy(sources.drm / "model.safetensors", folder / "l.safetensors")
    how = spoil(folder / "l.safetensors", rng)
    return Case("LoRA", how, ["sample", PROMPT, "--steps", "1", "--lora", "l.safetensors"], ("l.safetensors",))


KINDS: dict[Callable[[Path, random.Random, Sources], Case], int] = {
    picture: 6,
    pipeline: 8,
    reward_model: 5,
    tree: 2,
    comparison: 2,
    training: 3,
    configuration: 2,
    prompts: 3,
    preferences: 3,
    adapter: 1,
}
"""What is damaged, and how often."""


def case(number: int, folder: Path, sources: Sources) -> Case:
    """The case of a number, whose files are made in an empty folder."""
    rng = random.Random(f"damage {number}")
    [kind] = rng.choices(list(KINDS), list(KINDS.values()))
    return kind(folder, rng, sources)


def judged(number: int, folder: Path, sources: Sources) -> tuple[Case, list[str], str]:
    """One case: what it is, its faults, and what was said."""
    folder.mkdir()
    made = case(number, folder, sources)
    codes = (0,) if made.works else (0, 1, 2) if made.kind == "preferences" else (0, 2)
    trial = attempt(made.words, folder)
    faults = trial.faults(made.names, codes, "report.json" not in trial.after)
    shutil.rmtree(folder)
    return made, faults, trial.raised or f"{trial.code} {trial.said}"


def run() -> None:
    """The command."""
    import argparse
    import tempfile
    import warnings

    from tests.robustness.trial import counts

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    warnings.simplefilter("ignore")
    found = []
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place, "whole")
        whole.mkdir()
        sources = Sources.make(whole)
        for number in range(options.first, options.first + options.cases):
            made, faults, said = judged(number, Path(place, "case"), sources)
            found.append(faults)
            if faults or options.verbose:
                print(f"{number} {made.kind}, {made.how}: {faults}\n    {' '.join(made.words)[:200]}\n    {said[:700]}")
    print(f"{len(found)} damaged files and folders: {counts(found)}")


if __name__ == "__main__":
    run()

"""Damaged and strange files and folders of every kind that a command reads: `python -m tests.robustness.damage --count 300`."""

import argparse
import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from rsm_guidance import shapes
from rsm_guidance.shapes.packaged import drm_path
from tests.robustness.outcome import Outcome, outcome

STEPS = ["--steps", "2", "--guidance-scale", "1"]


@dataclass(frozen=True)
class Subject:
    """Good files, the command that reads them, and which one to damage.

    Attributes:
        name: of the kind of file.
        words: the command, run in the folder.
        lay: writes the good files into a folder.
        victims: names of those that may be damaged.
    """

    name: str
    words: list[str]
    lay: Callable[[Path], object]
    victims: tuple[str, ...]


# --- the good files ---


def _picture(mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def _linked(source: Path) -> Callable[[Path], None]:
    """A copy of a folder as `there`, whose files are links."""

    def lay(folder: Path) -> None:
        for file in source.rglob("*"):
            if file.is_file():
                there = folder / "there" / file.relative_to(source)
                there.parent.mkdir(parents=True, exist_ok=True)
                there.symlink_to(file.resolve())

    return lay


def _written(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def _pairs(name: str, text: str) -> Callable[[Path], None]:
    def lay(folder: Path) -> None:
        (folder / name).write_text(text)
        for image in ("a.png", "b.png"):
            _picture().rotate(90 if image == "b.png" else 0).save(folder / image)

    return lay


def subjects(made: Path) -> list[Subject]:
    """All kinds; what takes time to make (a tree, the state of a training run) is made once in the folder `made`."""
    lines = "".join(json.dumps({"prompt": p}) + "\n" for p in ("a red star", "two blue circles"))
    evaluate = ["evaluate", "--json", "e.json", "--reward", "shapes-verifier", *STEPS, "--prompts"]
    sample = ["sample", "a red star", "--out", "o.png", *STEPS]
    tree = [*sample, "--reward", "shapes-verifier", "--sampler", "tree-search:simulations=3:tree_file=t.safetensors"]
    train = ["train", "shapes-reward", "--config", "c.yaml", "--out", "run"]
    config = (
        "{{prompts: 4, validation_prompts: 2, steps: {}, batch_groups: 2, evaluate_every: 1, blocks: 1, head_width: 8, "
        "groups: {{steps: 3, siblings: 2}}}}\n"
    )
    pair = {"prompt": "a red star", "image_0": "a.png", "image_1": "b.png", "label": 1}
    if not made.is_dir():
        made.mkdir(parents=True)
        assert outcome(tree, made).code == 0
        (made / "c.yaml").write_text(config.format(1))
        assert outcome(train, made).code == 0
    state = tuple(str(p.relative_to(made)) for p in (made / "run").rglob("*") if p.is_file())
    parts = {name: _parts(Path(folder)) for name, folder in (("m", shapes.model_path()), ("d", drm_path()))}

    def trained(folder: Path) -> None:
        shutil.copytree(made / "run", folder / "run")
        (folder / "c.yaml").write_text(config.format(2))

    return [
        Subject("image", ["score", "i.png", "--prompt", "a red star", "--reward", "shapes-verifier"],
                lambda folder: _picture().save(folder / "i.png"), ("i.png",)),
        Subject("prompts", [*evaluate, "p.txt"], _written("p.txt", "a red star\ntwo blue circles\n"), ("p.txt",)),
        Subject("prompts as JSON", [*evaluate, "p.jsonl"], _written("p.jsonl", lines), ("p.jsonl",)),
        Subject("YAML", train, _written("c.yaml", config.format(1)), ("c.yaml",)),
        Subject("tree file", tree, lambda folder: shutil.copy(made / "t.safetensors", folder), ("t.safetensors",)),
        Subject("model", [*sample, "--model", "there"], _linked(Path(shapes.model_path())), parts["m"]),
        Subject("reward model", [*sample, "--sampler", "best-of-n", "--candidates", "2", "--reward", "there"],
                _linked(Path(drm_path())), parts["d"]),
        Subject("training state", train, trained, state),
        Subject("pairs as CSV", ["data", "check", "d.csv"],
                _pairs("d.csv", "prompt,image_0,image_1,label\na red star,a.png,b.png,1\n"), ("d.csv", "a.png")),
        Subject("pairs as JSON", ["data", "check", "d.jsonl"], _pairs("d.jsonl", json.dumps(pair)), ("d.jsonl", "b.png")),
        Subject("LoRA", [*sample, "--lora", "t.safetensors"],
                lambda folder: shutil.copy(made / "t.safetensors", folder), ("t.safetensors",)),
    ]  # fmt: skip


def _parts(folder: Path) -> tuple[str, ...]:
    return tuple(
        f"there/{p.relative_to(folder)}" for p in sorted(folder.rglob("*")) if p.is_file() and p.suffix != ".md"
    )


# --- the damage ---


def _cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def _flipped(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(rng.choice([1, 8, 200])):
        content[rng.randrange(min(len(content), rng.choice([64, 4096, len(content)])))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def _replaced(*contents: bytes) -> Callable[[Path, random.Random], None]:
    return lambda path, rng: path.write_bytes(rng.choice(contents)) and None


def _folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _numbers(path: Path, rng: random.Random) -> None:
    """Every number of a text is another one, or none."""
    text = path.read_bytes().decode("latin-1")
    other = rng.choice(["-1", "0", "1e400", "NaN", "null", '"x"', "[]", "{}", "0.5", "true"])
    digits = [i for i, c in enumerate(text) if c.isdigit()]
    for place in sorted(rng.sample(digits, min(len(digits), rng.choice([1, 3]))), reverse=True):
        text = text[:place] + other + text[place + 1 :]
    path.write_bytes(text.encode("latin-1"))


WAYS: dict[str, Callable[[Path, random.Random], None]] = {
    "cut": _cut,
    "flipped": _flipped,
    "emptied": _replaced(b""),
    "of another kind": _replaced(
        b"\x00" * 4096,
        b"hello\n",
        b"[]",
        b"1",
        b"null",
        b'{"a": NaN}',
        b"[" * 100_000,
        b"\xff\xfe\x00",
        b"{" * 9,
        b"\x80\x04.",
    ),
    "a folder": _folder,
    "missing": lambda path, rng: path.unlink(),
    "other numbers": _numbers,
}


def _oddity(save: Callable[[Path], None]) -> Callable[[Path, random.Random], None]:
    return lambda path, rng: save(path)


def _bomb(path: Path) -> None:
    """A header that promises 2.5 gigapixels."""
    _picture().save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = (50_000).to_bytes(4, "big") * 2
    path.write_bytes(content)


def _turned(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    _picture().save(path, format="JPEG", exif=exif)


def _sixteen(path: Path) -> None:
    Image.fromarray(np.asarray(_picture("L"), dtype=np.uint16) * 257).save(path)


ODD: dict[str, Callable[[Path, random.Random], None]] = {
    "16 bits": _oddity(_sixteen),
    "CMYK": _oddity(lambda path: _picture("CMYK").save(path, format="JPEG")),
    "1x1": _oddity(lambda path: _picture().resize((1, 1)).save(path)),
    "1x4000": _oddity(lambda path: _picture().resize((1, 4000)).save(path)),
    "animated": _oddity(lambda path: _picture().save(path, save_all=True, append_images=[_picture().rotate(90)])),
    "turned": _oddity(_turned),
    "palette": _oddity(lambda path: _picture("P").save(path)),
    "one bit": _oddity(lambda path: _picture("1").save(path)),
    "transparent": _oddity(lambda path: _picture("LA").save(path)),
    "bomb": _oddity(_bomb),
}


def damaged(count: int, made: Path) -> Iterator[tuple[str, Subject, Callable[[Path], None]]]:
    """`count` cases: what they are called, the subject, and what lays it damaged into a folder."""
    kinds = subjects(made)
    for number in range(count):
        rng = random.Random(number)
        subject = kinds[number % len(kinds)]
        victim = rng.choice(subject.victims)
        odd = victim.endswith("png") and rng.random() < 0.5
        way = rng.choice([*(ODD if odd else WAYS)])

        def lay(
            folder: Path, subject: Subject = subject, victim: str = victim, way: str = way, rng: random.Random = rng
        ) -> None:
            subject.lay(folder)
            path = folder / victim
            if path.is_symlink():
                content = path.read_bytes()
                path.unlink()
                path.write_bytes(content)
            (WAYS | ODD)[way](path, rng)

        yield f"{number}: {subject.name}, {victim} {way}", replace(subject), lay


def run(count: int, folder: Path) -> Iterator[tuple[str, Outcome]]:
    """Each case and how its command ended."""
    for name, subject, lay in damaged(count, folder / "made"):
        there = folder / name.partition(":")[0]
        there.mkdir()
        lay(there)
        yield name, outcome(subject.words, there)
        shutil.rmtree(there)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    ended: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as temporary:
        for name, end in run(parser.parse_args().count, Path(temporary)):
            ended[end.fault or f"exit {end.code}"] += 1
            if end.fault:
                sys.stdout.write(f"{name}: {end.fault}\n    {end.error[-300:]}\n")
    sys.stdout.write(f"{dict(ended)}\n")
    raise SystemExit(any(not kind.startswith("exit") for kind in ended))

"""Where the tables of a data set lie: a file, or a folder in one of the layouts that are published."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from rsm_guidance.core.errors import UsageError
from rsm_guidance.data.preferences.formats import FORMATS
from rsm_guidance.data.preferences.formats.folder import SIDES
from rsm_guidance.data.preferences.rows import TABLES

_PART = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}.*")  # train-00000-of-00010-<hash>.parquet
_SHARD = re.compile(r"(?P<split>.+)_\d+")  # of ImageRewardDB, and splits such as train_0001
_SPLITS = re.compile(r"(train|test|val|valid|validation|dev)(_.*)?")
_NOT_DATA = {"metadata", "dataset_infos", "config", "state"}


def tables_of(spec: str | Path) -> dict[str, list[Path]]:
    """The tables of a data set by published split; "" is the split of files that name none.

    Args:
        spec: a file, or a folder: of parquet files as on the hub (`data/train-00000-of-00010-....parquet`), of
            `train.json` and `test.json`, of ImageRewardDB's shards, or with one table.

    Raises:
        UsageError: if there is nothing, saying what to download where it is a hub id.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        return {"": [path]}
    if not path.is_dir():
        raise UsageError(_absent(str(spec)))
    for look in (_shards, _parquet, _by_name):
        found = look(path)
        if found:
            return found
    raise UsageError(
        f"{path} holds no preference data: neither w/ and l/, nor a table ({', '.join(TABLES)}), nor a published data set"
    )


def is_pair_folder(spec: str | Path) -> bool:
    """Whether a folder holds winners and losers, `w/` and `l/`."""
    return all((Path(spec).expanduser() / side).is_dir() for side in SIDES)


def choose_split(tables: Mapping[str, list[Path]], split: str | None, spec: str | Path) -> tuple[str, list[Path]]:
    """The published split that is read: the one asked for, else "train", else the only one.

    Raises:
        UsageError: if there is no such split.
    """
    wanted = split or ("train" if len(tables) > 1 else next(iter(tables)))
    names = [name for name in tables if name == wanted or re.fullmatch(re.escape(wanted) + r"_\d+", name)]
    if not names:
        raise UsageError(f"{spec} has no split {wanted!r}; choose one of {', '.join(tables)}")
    return wanted, [path for name in names for path in tables[name]]


def _shards(folder: Path) -> dict[str, list[Path]]:
    """ImageRewardDB: tables of the same name as their folder."""
    found: dict[str, list[Path]] = {}
    for path in _within(folder, "*_*/*.json", "*/*_*/*.json", "*/*/*_*/*.json"):
        shard = _SHARD.fullmatch(path.stem)
        if shard and path.parent.name == path.stem:
            found.setdefault(shard["split"], []).append(path)
    return {split: sorted(paths, key=_by_number) for split, paths in sorted(found.items())}


def _parquet(folder: Path) -> dict[str, list[Path]]:
    """Parquet files by the split in their names, or in the name of their folder."""
    found: dict[str, list[Path]] = {}
    for path in sorted(_within(folder, "*.parquet", "*/*.parquet", "*/*/*.parquet"), key=_by_number):
        named = _PART.fullmatch(path.stem)
        split = named["split"] if named else path.parent.name if path.stem.isdigit() else path.stem
        found.setdefault(split if named or _SPLITS.fullmatch(split) else "", []).append(path)
    return found


def _by_name(folder: Path) -> dict[str, list[Path]]:
    """Tables named after splits, also under data/; or the only table."""
    every = [p for place in (folder, folder / "data") for p in sorted(place.glob("*.*")) if p.suffix.lower() in TABLES]
    every = [p for p in every if p.stem not in _NOT_DATA]
    splits = {path.stem: [path] for path in every if _SPLITS.fullmatch(path.stem)}
    if splits or not every:
        return splits
    if len(every) > 1:
        raise UsageError(f"{folder} holds several tables; name one: {', '.join(p.name for p in every[:5])}")
    return {"": every}


def _within(folder: Path, *patterns: str) -> Iterator[Path]:
    """Files at a few depths; all depths would take minutes under a million images."""
    return (path for pattern in patterns for path in folder.glob(pattern))


def _by_number(path: Path) -> tuple[str, list[str | int]]:
    """Files in the order of the numbers in their names."""
    return str(path.parent.parent), [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", path.stem)]


def _absent(spec: str) -> str:
    if spec.count("/") != 1 or spec.startswith((".", "/", "~")):
        return f"there is no file or folder {spec}"
    known = next((f for f in FORMATS.values() if spec.lower() in map(str.lower, f.hub)), None)
    local = spec.partition("/")[2]
    then = "" if known is None else f"; {known.note}"
    return (
        f"there is no folder {spec}, and data sets of the hub are read from a copy on disk: "
        f"hf download {spec} --repo-type dataset --local-dir {local}{then}; then give {local}"
    )

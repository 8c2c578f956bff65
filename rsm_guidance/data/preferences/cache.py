"""Latents and prompt embeddings of preferences, on disk: encoded once, by as many processes as there are.

A shard holds what a run of consecutive preferences needs, under a name that is a hash of the encoder, the options and
those preferences with their files.  So a shard that is there is the right one, and what has changed gets another name.
Shards appear whole or not at all, each is checked against its own hash, and a damaged one is made anew.  A process that
finds a shard locked by another goes on to the next, and comes back at the end.
"""

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.data.buckets import Buckets
from rsm_guidance.data.preferences.data import Entry, PreferenceData, gathered, stack_images
from rsm_guidance.data.preferences.problems import Problem, Reason
from rsm_guidance.data.preferences.read import PreferenceFiles
from rsm_guidance.data.preferences.record import Preference
from rsm_guidance.data.preferences.usable import Decoded, decoded
from rsm_guidance.io.files import write_tensors

EncodeImages = Callable[[Tensor], Tensor]
EncodePrompts = Callable[[list[str]], Mapping[str, Tensor]]
_LAYOUT = "1"  # of shards; another one gives other names
_META = "preferences"


class Progress(Protocol):
    """Told of shards: how many are done, of those met so far."""

    def __call__(self, done: int, met: int, /) -> object: ...


@dataclass(frozen=True)
class Encoder:
    """What makes tensors of images and prompts.

    Attributes:
        name: says which models and settings they come from, such as fingerprints of the weights; another name means
            other tensors.
        images: RGB images [B, 3, H, W] in [0, 1] to latents [B, ...].
        prompts: texts to embeddings by name, each [B, ...]; None stores none.
        buckets: the sizes to which images are scaled.
        batch: images or prompts per call.
    """

    name: str
    images: EncodeImages
    prompts: EncodePrompts | None = None
    buckets: Buckets = Buckets()
    batch: int = 8


def cached_latents(
    preferences: PreferenceFiles | Sequence[Preference],
    encoder: Encoder,
    folder: Path,
    shard: int = 128,
    progress: Progress | None = None,
) -> PreferenceData:
    """Preferences as tensors, from the cache where they are in it, else encoded and put there.

    May be interrupted at any moment and called again, and by several processes at once; each returns all the data.
    Preferences whose images cannot be used are counted in `skipped`, and duplicates are dropped.

    Args:
        preferences: read several times.
        encoder: what makes the tensors.
        folder: of the cache; several data sets and encoders may share one.
        shard: preferences per file.
        progress: called after every shard.

    Raises:
        UsageError: if no preference can be used.
        OSError: if the folder cannot be written; shards that are complete stay.
    """
    if shard < 1 or encoder.batch < 1:
        raise UsageError(f"shards and batches need at least one item; got {shard} and {encoder.batch}")
    if iter(preferences) is preferences:
        raise UsageError(
            "preferences are read several times; give a list or what read_preferences returns, no generator"
        )
    folder.mkdir(parents=True, exist_ok=True)
    done: dict[int, _Shard] = {}
    for wait in (False, True):
        for number, records in enumerate(_runs(preferences, shard)):
            if number in done:
                continue
            found = _made(folder, encoder, records, wait)
            if found is not None:
                done[number] = found
            if progress is not None:
                progress(len(done), number + 1)
        if done and len(done) == number + 1:
            break
    ordered = [done[number] for number in sorted(done)]
    entries = [[Entry(i, **_tuples(e)) for e in found.entries] for i, found in enumerate(ordered)]
    problems = [Problem(p["place"], Reason(p["reason"]), p["detail"]) for s in ordered for p in s.problems]
    return gathered([found.path for found in ordered], entries, problems)


@dataclass(frozen=True)
class _Shard:
    path: Path
    entries: list[dict[str, Any]]
    problems: list[dict[str, str]]


def _runs(preferences: PreferenceFiles | Sequence[Preference], size: int) -> Iterator[list[Preference | Problem]]:
    records = iter(preferences.records() if isinstance(preferences, PreferenceFiles) else preferences)
    while run := list(islice(records, size)):
        yield run


def _made(folder: Path, encoder: Encoder, records: list[Preference | Problem], wait: bool) -> _Shard | None:
    """The shard of some records, read or made; None if another process makes it and we do not wait."""
    path = folder / f"{_name(encoder, records)}.safetensors"
    found = _read(path)
    if found is not None:
        return found
    with _locked(path.with_suffix(".lock"), wait) as ours:
        if not ours:
            return None
        found = _read(path)
        if found is None:
            _write(path, *_encoded(encoder, records))
            found = _read(path)
    if found is None:
        raise OSError(f"{path} was written and cannot be read back; is the disk damaged?")
    return found


def _name(encoder: Encoder, records: Iterable[Preference | Problem]) -> str:
    digest = hashlib.blake2b(repr((_LAYOUT, encoder.name, encoder.buckets)).encode(), digest_size=12)
    digest.update(str(encoder.prompts is not None).encode())
    for record in records:
        identity = repr(record) if isinstance(record, Problem) else f"{record.place} {record.identity()}"
        digest.update(identity.encode())
    return digest.hexdigest()


@contextmanager
def _locked(path: Path, wait: bool) -> Iterator[bool]:
    """Whether the lock is ours; the system frees it when its process ends, however it ends."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        else:
            yield True


def _read(path: Path) -> _Shard | None:
    """A shard that is whole; None for one that is not there or is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            meta = (file.metadata() or {}).get(_META, "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        said, digest = json.loads(meta[32:]), meta[:32]
    except (OSError, SafetensorError, ValueError):
        return None
    return _Shard(path, said["entries"], said["problems"]) if digest == _digest(tensors, meta[32:]) else None


def _write(path: Path, tensors: dict[str, Tensor], entries: list[Entry], problems: list[Problem]) -> None:
    told = [{name: value for name, value in asdict(entry).items() if name != "shard"} for entry in entries]
    said = json.dumps({"entries": told, "problems": [asdict(problem) for problem in problems]})
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_tensors(path, tensors, {_META: _digest(tensors, said) + said})


def _digest(tensors: Mapping[str, Tensor], said: str) -> str:
    digest = hashlib.blake2b(said.encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


@torch.no_grad()
def _encoded(
    encoder: Encoder, records: Iterable[Preference | Problem]
) -> tuple[dict[str, Tensor], list[Entry], list[Problem]]:
    """Latents of every image and embeddings of every prompt, once each, and what refers to them."""
    problems: list[Problem] = []
    images = _Images(encoder)
    found: list[tuple[Preference, int, tuple[str, ...]]] = []
    for pair in decoded(records, problems.append):
        bucket = encoder.buckets.of(*pair.images[:2])
        found.append((pair.preference, bucket, images.add(pair, bucket)))
    tensors, entries = images.latents(), []
    prompts = _embedded(encoder, dict.fromkeys(preference.prompt for preference, *_ in found))
    for preference, bucket, names in found:
        if any(not tensors[name].isfinite().all() for name in names):
            problems.append(Problem(preference.place, Reason.NOT_FINITE, "the encoder gave infinities or no numbers"))
            continue
        embeddings = {name: key for name, (key, _) in prompts.get(preference.prompt, {}).items()}
        entries.append(_entry(preference, bucket, names, embeddings))
    used = {name for entry in entries for name in (*entry.tensors, *entry.embeddings.values())}
    tensors |= {key: tensor for embedded in prompts.values() for key, tensor in embedded.values()}
    return {name: tensor for name, tensor in tensors.items() if name in used}, entries, problems


class _Images:
    """Images that are encoded in batches of one size, each once; only the batches that are not full are kept decoded."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        self._waiting: dict[int, dict[str, Image.Image]] = {}
        self._done: dict[str, Tensor] = {}

    def add(self, pair: Decoded, bucket: int) -> tuple[str, ...]:
        """The names of the latents that a pair's images will have."""
        names = tuple(f"{key}@{bucket}" for key in pair.keys)
        waiting = self._waiting.setdefault(bucket, {})
        for name, image in zip(names, pair.images, strict=True):
            if name not in self._done and name not in waiting:
                waiting[name] = self._encoder.buckets.fitted(image, bucket)
            if len(waiting) == self._encoder.batch:
                self._encode(waiting)
        return names

    def latents(self) -> dict[str, Tensor]:
        """All latents by name."""
        for waiting in self._waiting.values():
            if waiting:
                self._encode(waiting)
        return dict(self._done)

    def _encode(self, waiting: dict[str, Image.Image]) -> None:
        latents = self._encoder.images(stack_images(list(waiting.values())))
        if len(latents) != len(waiting):
            raise UsageError(f"the encoder gave {len(latents)} latents for {len(waiting)} images")
        self._done |= {name: own.cpu().clone() for name, own in zip(waiting, latents, strict=True)}
        waiting.clear()


def _embedded(encoder: Encoder, prompts: Iterable[str]) -> dict[str, dict[str, tuple[str, Tensor]]]:
    """By prompt and name of an embedding: its name in the shard, and the tensor."""
    found: dict[str, dict[str, tuple[str, Tensor]]] = {}
    if encoder.prompts is None:
        return found
    rest = iter(prompts)
    while batch := list(islice(rest, encoder.batch)):
        embeddings = encoder.prompts(batch)
        for row, prompt in enumerate(batch):
            key = hashlib.blake2b(prompt.encode(), digest_size=12).hexdigest()
            found[prompt] = {name: (f"{name}#{key}", rows[row].cpu().clone()) for name, rows in embeddings.items()}
    return found


def _entry(preference: Preference, bucket: int, names: tuple[str, ...], embeddings: Mapping[str, str]) -> Entry:
    p = preference
    return Entry(
        0,
        p.prompt,
        names,
        embeddings,
        p.probability,
        p.weight,
        bucket,
        p.place,
        p.source,
        p.category,
        p.models,
        p.scores,
    )


def _tuples(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry as it was before JSON made lists of its tuples."""
    scores = {name: tuple(pair) for name, pair in entry["scores"].items()}
    return {**entry, "tensors": tuple(entry["tensors"]), "models": tuple(entry["models"]), "scores": scores}

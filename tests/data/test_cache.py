"""The cache of latents: encoded once, whole or not at all, the same whoever builds it and however often it is cut short."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rsm_guidance.core.errors import UsageError
from rsm_guidance.data.preferences import Buckets, Encoder, PreferenceData, Reason, cached_latents, read_preferences
from rsm_guidance.data.preferences import cache as caches
from rsm_guidance.io.fingerprint import fingerprint
from rsm_guidance.training import Batches
from tests.data.layouts import images_in, pick, write_json, write_lines, write_parquet
from tests.data.pictures import BROKEN, put

BUCKETS = Buckets(16, 8, 4.0)


class Counting:
    """Encodes images as means of 8x8 blocks and prompts as their length, and counts both."""

    def __init__(self) -> None:
        self.images, self.prompts, self.calls = 0, 0, 0
        self.module = torch.nn.Linear(2, 2)

    def encode(self, images: Tensor) -> Tensor:
        assert images.shape[1] == 3 and 0 <= images.min() and images.max() <= 1
        self.images, self.calls = self.images + len(images), self.calls + 1
        return torch.nn.functional.avg_pool2d(images, 8).to(torch.bfloat16)

    def embed(self, prompts: list[str]) -> dict[str, Tensor]:
        self.prompts += len(prompts)
        lengths = torch.tensor([float(len(p)) for p in prompts])
        return {"prompt_embeds": lengths[:, None, None].expand(-1, 2, 3), "pooled_prompt_embeds": lengths[:, None]}

    def encoder(self, name: str | None = None) -> Encoder:
        return Encoder(name or fingerprint(self.module), self.encode, self.embed, BUCKETS, batch=3)


def table(folder: Path, count: int = 10) -> Path:
    images_in(folder, *(f"{i}.png" for i in range(2 * count)))
    rows = [
        {"prompt": "p" * (i // 2 + 1), "chosen": f"{2 * i}.png", "rejected": f"{2 * i + 1}.png"} for i in range(count)
    ]
    return write_lines(folder / "a.jsonl", rows)


def told(data: PreferenceData) -> list[Any]:
    return [{k: v.tolist() if isinstance(v, Tensor) else v for k, v in item.items()} for item in data]


def test_items_are_what_the_encoder_gave(tmp_path: Path) -> None:
    path, counting = table(tmp_path), Counting()
    data = cached_latents(read_preferences(path), counting.encoder(), tmp_path / "cache", shard=4)
    assert len(data) == 10 and counting.images == 20 and counting.prompts == 5
    for i, item in enumerate(data):
        better, worse = (item["first"], item["second"])[:: 1 if item["probability"] == 1 else -1]
        assert better[0, 0, 0] == torch.tensor((10 + 2 * i) / 255).bfloat16()
        assert worse[0, 0, 0] == torch.tensor((11 + 2 * i) / 255).bfloat16()
        assert item["prompt"] == "p" * (i // 2 + 1) and item["index"] == i
        assert item["prompt_embeds"].shape == (2, 3) and item["prompt_embeds"][0, 0] == i // 2 + 1
        assert item["weight"].dtype == item["probability"].dtype == torch.float32
    batch = next(iter(DataLoader(data, batch_size=4)))  # type: ignore[arg-type]
    assert batch["first"].shape == (4, 3, 2, 2) and batch["prompt"][3] == "pp"
    assert told(pickle.loads(pickle.dumps(data))) == told(data)


def test_nothing_is_encoded_twice_and_what_changed_is(tmp_path: Path) -> None:
    path, counting = table(tmp_path), Counting()

    def again(**other: Any) -> tuple[PreferenceData, int]:
        before = counting.images
        encoder = other.pop("encoder", counting.encoder())
        data = cached_latents(read_preferences(path), encoder, tmp_path / "cache", **{"shard": 4} | other)
        return data, counting.images - before

    first, count = again()
    assert count == 20
    same, count = again()
    assert count == 0 and told(same) == told(first)
    with path.open("a") as file:
        file.write('{"prompt": "new", "chosen": "3.png", "rejected": "0.png"}\n')
    more, count = again()
    assert count == 6 and told(more)[:10] == told(first) and more[10]["prompt"] == "new"
    put(tmp_path / "0.png", 200)
    os.utime(tmp_path / "0.png", ns=(1, 1))
    changed, count = again()
    assert count == 8 + 6 and changed[1]["first"].equal(first[1]["first"])
    assert 200 / 255 == pytest.approx(max(float(changed[0][k][0, 0, 0]) for k in ("first", "second")), abs=0.01)
    torch.nn.init.ones_(counting.module.weight)
    assert again()[1] == 22  # another model
    assert again(encoder=Encoder("x", counting.encode, None, BUCKETS))[1] == 22
    assert again(encoder=Encoder("x", counting.encode, None, Buckets(32, 8, 4.0)))[1] == 22


@pytest.mark.parametrize("damage", ["cut", "empty", "flip", "other"])
def test_a_damaged_shard_is_made_anew(tmp_path: Path, damage: str) -> None:
    path, counting = table(tmp_path), Counting()
    whole = told(cached_latents(read_preferences(path), counting.encoder(), tmp_path / "cache", shard=4))
    shards = sorted((tmp_path / "cache").glob("*.safetensors"))
    good = shards[1].read_bytes()
    flipped = bytearray(good)
    flipped[-3] ^= 1
    shards[1].write_bytes({"cut": good[:-7], "empty": b"", "flip": bytes(flipped), "other": b"\xff" * 100}[damage])
    before = counting.calls
    assert told(cached_latents(read_preferences(path), counting.encoder(), tmp_path / "cache", shard=4)) == whole
    assert counting.calls > before and shards[1].read_bytes() == good


def test_broken_images_are_counted_and_nothing_takes_their_place(tmp_path: Path) -> None:
    path, counting = table(tmp_path, 6), Counting()
    for name, data in BROKEN.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
    lines = path.read_text().splitlines()
    for i, name in enumerate(BROKEN):
        lines.insert(2 * i, f'{{"prompt": "broken", "chosen": "0.png", "rejected": "{name}"}}')
    lines += [lines[1], '{"prompt": "same", "chosen": "0.png", "rejected": "0.png"}', "{"]
    path.write_text("\n".join(lines))
    data = cached_latents(read_preferences(path), counting.encoder(), tmp_path / "cache", shard=4)
    assert [entry.prompt for entry in data.entries] == ["p", "p", "pp", "pp", "ppp", "ppp"]
    more = {Reason.IDENTICAL: 1, Reason.MALFORMED: 1, Reason.DUPLICATE: 1}
    assert data.skipped.counts == {Reason(name): 1 for name in BROKEN} | more
    again = cached_latents(read_preferences(path), counting.encoder(), tmp_path / "cache", shard=4)
    assert again.skipped.counts == data.skipped.counts and told(again) == told(data)
    for name in BROKEN:  # an image that is mended is read
        put(tmp_path / name, 99)
    mended = cached_latents(read_preferences(path), counting.encoder(), tmp_path / "cache", shard=4)
    assert len(mended) == 7 and mended.skipped.counts == more | {Reason.DUPLICATE: 5}  # five rows became equal


def test_latents_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    path = table(tmp_path, 4)

    def encode(images: Tensor) -> Tensor:
        latents = images[:, :, ::8, ::8].clone()
        latents[(images[:, 0, 0, 0] * 255).round() == 12] = torch.nan
        return latents

    data = cached_latents(read_preferences(path), Encoder("x", encode, None, BUCKETS), tmp_path / "cache")
    assert len(data) == 3 and data.skipped.counts == {Reason.NOT_FINITE: 1}
    everything = Encoder("y", lambda images: images * torch.nan, None, BUCKETS)
    with pytest.raises(UsageError, match="no preference to train on: 4 latents not finite; first: a.jsonl, line 1"):
        cached_latents(read_preferences(path), everything, tmp_path / "cache")


def test_images_of_ranked_lists_are_encoded_once_and_shapes_are_bucketed(tmp_path: Path) -> None:
    images_in(tmp_path / "test", *(f"{i}.png" for i in range(5)))
    for i in range(5, 8):
        put(tmp_path / "test" / f"{i}.png", 50 + i, size=(6, 24))
    names = [f"{i}.png" for i in range(8)]
    rows = [{"prompt": "p", "image_path": names[:5], "rank": [1, 2, 3, 4, 5]}]
    rows += [{"prompt": "q", "image_path": names[5:], "rank": [1, 2, 2]}]
    counting = Counting()
    path = write_json(tmp_path / "test.json", rows)
    data = cached_latents(read_preferences(path), counting.encoder(), tmp_path / "cache")
    assert counting.images == 8 and len(data) == 10 + 3
    assert len(set(data.groups)) == 2 and {tuple(i["first"].shape) for i in data} == {(3, 2, 2), (3, 4, 1)}
    assert sorted(float(i["weight"]) for i in data) == pytest.approx([0.1] * 10 + [1 / 3] * 3)
    seen: list[int] = []
    for batch in list(zip(range(8), Batches(data, 2, seed=0, groups=data.groups).start(0), strict=False)):
        assert batch[1]["first"].shape == batch[1]["second"].shape
        seen += batch[1]["index"].tolist()
    assert sorted(seen[:13]) == list(range(13))


def test_edits_have_latents_of_their_source(tmp_path: Path) -> None:
    images_in(tmp_path, "a.png", "b.png", "s.png")
    row = {"prompt": "p", "image_0": "a.png", "image_1": "b.png", "label": 0, "source_image": "s.png"}
    path = write_lines(tmp_path / "a.jsonl", [row])
    [item] = cached_latents(read_preferences(path), Counting().encoder(), tmp_path / "cache")
    assert item["source_latents"][0, 0, 0] == torch.tensor(12 / 255).bfloat16()


def test_pictures_inside_parquet_files_are_cached_too(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "train-00000-of-00001.parquet", [pick(i) for i in range(5)])
    counting = Counting()
    for _ in range(2):
        data = cached_latents(read_preferences(path), counting.encoder(), tmp_path / "cache", shard=2)
        assert len(data) == 5 and counting.images == 10
    assert data.sources == {"pick-a-pic": 5} and data.entries[0].models == ("a", "b")


def test_a_full_disk_leaves_the_complete_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, counting = table(tmp_path), Counting()
    written: list[Path] = []
    whole = caches.write_tensors

    def write(path: Path, *rest: Any) -> None:
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(path)
        whole(path, *rest)

    monkeypatch.setattr(caches, "write_tensors", write)
    with pytest.raises(OSError, match="No space left"):
        cached_latents(read_preferences(path), counting.encoder(), tmp_path / "cache", shard=4)
    monkeypatch.undo()
    assert sorted((tmp_path / "cache").glob("*.safetensors*")) == sorted(written)
    before = counting.images
    assert len(cached_latents(read_preferences(path), counting.encoder(), tmp_path / "cache", shard=4)) == 10
    assert counting.images == before + 4


def test_what_cannot_be_cached_is_refused(tmp_path: Path) -> None:
    path, counting = table(tmp_path, 2), Counting()
    with pytest.raises(UsageError, match="no generator"):
        cached_latents(iter(read_preferences(path)), counting.encoder(), tmp_path / "cache")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="there is no preference to train on"):
        cached_latents([], counting.encoder(), tmp_path / "cache")
    with pytest.raises(UsageError, match="at least one item"):
        cached_latents(read_preferences(path), counting.encoder(), tmp_path / "cache", shard=0)
    wrong = Encoder("x", lambda images: images[:1], None, BUCKETS)
    with pytest.raises(UsageError, match="the encoder gave 1 latents for 4 images"):
        cached_latents(read_preferences(path), wrong, tmp_path / "cache")


def slow(images: Tensor) -> Tensor:
    time.sleep(0.02)
    return images[:, :, ::8, ::8]


def build(path: Path, folder: Path, queue: Any) -> None:
    made: list[int] = []

    def encode(images: Tensor) -> Tensor:
        made.append(len(images))
        return slow(images)

    data = cached_latents(read_preferences(path), Encoder("x", encode, None, BUCKETS), folder, shard=2)
    queue.put((told(data), sum(made)))


def test_two_processes_share_the_work_and_get_the_same(tmp_path: Path) -> None:
    path = table(tmp_path, 20)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=build, args=(path, tmp_path / "cache", queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=60) for _ in workers]
    for worker in workers:
        worker.join()
    assert found[0][0] == found[1][0] and len(found[0][0]) == 20
    assert found[0][1] + found[1][1] == 40  # every image by one of them
    assert not list(tmp_path.rglob("*.partial*"))


KILLED = """
import sys
from pathlib import Path
from tests.data.test_cache import BUCKETS, slow
from rsm_guidance.data.preferences import Encoder, cached_latents, read_preferences
cached_latents(read_preferences(sys.argv[1]), Encoder("x", slow, None, BUCKETS), Path(sys.argv[2]), 2, print)
"""


def test_a_killed_process_loses_no_more_than_a_shard(tmp_path: Path) -> None:
    path = table(tmp_path, 20)
    command = [sys.executable, "-u", "-c", KILLED, str(path), str(tmp_path / "cache")]
    killed = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    assert killed.stdout is not None
    for _ in range(4):
        assert killed.stdout.readline()
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    counted: list[int] = []

    def encode(images: Tensor) -> Tensor:
        counted.append(len(images))
        return slow(images)

    data = cached_latents(read_preferences(path), Encoder("x", encode, None, BUCKETS), tmp_path / "cache", shard=2)
    fresh = cached_latents(read_preferences(path), Encoder("x", slow, None, BUCKETS), tmp_path / "fresh", shard=2)
    assert told(data) == told(fresh) and 0 < sum(counted) <= 40 - 4 * 4

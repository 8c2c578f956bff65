"""Reading prompts and images, and writing files and folders so that nothing is left half-written.

torch, numpy and Pillow are loaded by the functions that need them, so that the command line starts quickly.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rsm_guidance.io.reading import refusing

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor


_LARGEST_TEXT = 256 * 2**20


def require_writable(path: Path) -> Path:
    """The path itself, checked before long work: a file can be written there.  Nothing is made yet.

    Raises:
        ValueError: if not, saying why.
    """
    try:
        if path.is_dir():
            raise ValueError(f"cannot write {path}: it is a folder; name a file")
        if path.exists() and not path.is_file():
            raise ValueError(f"cannot write {path}: it is no regular file")
        there = path.resolve().parent
        while not there.exists():
            there = there.parent
        if not there.is_dir():
            raise ValueError(f"cannot write {path}: {there} is a file; name a folder")
        with tempfile.TemporaryFile(dir=there):
            pass
    except (OSError, RuntimeError) as error:  # loops of links, names that are too long
        raise ValueError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error
    return path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path` and move the result into place; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.stem + ".partial" + path.suffix)
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8"))


def write_json(path: Path, data: Any) -> None:
    """Write strict JSON atomically.

    Raises:
        ValueError: for NaN and infinities, which JSON does not have; says where they stand.
    """
    try:
        text = json.dumps(data, indent=1, allow_nan=False)
    except ValueError as error:
        where = _not_finite(data, "")
        if where is None:  # something else, such as a circle
            raise
        raise ValueError(f"cannot write {path}: JSON has no NaN or infinity, but {where} is one") from error
    write_text(path, text + "\n")


def _not_finite(data: Any, where: str) -> str | None:
    """The place of the first number that is not finite, such as "levels[3].ess"."""
    if isinstance(data, float):
        return None if math.isfinite(data) else where or "the number"
    entries: list[tuple[str, Any]] = []
    if isinstance(data, Mapping):
        entries = [(f"{where}.{key}" if where else str(key), value) for key, value in data.items()]
    elif isinstance(data, list | tuple):
        entries = [(f"{where}[{index}]", value) for index, value in enumerate(data)]
    return next((found for place, value in entries if (found := _not_finite(value, place)) is not None), None)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write tensors by name as safetensors, atomically, from any device and layout."""
    from safetensors.torch import save_file

    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_atomically(path, lambda p: save_file(own, p, metadata))


def replace_folder(folder: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with an empty folder beside `folder` and put it in its place.

    `folder` is whole at any moment; after a crash between the two moves `recover_folder` finds the old one.
    """
    write(begin_folder(folder))
    commit_folder(folder)


def begin_folder(folder: Path) -> Path:
    """An empty folder beside `folder`, to be filled and then put in its place by `commit_folder`."""
    fresh = _beside(folder, ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    return fresh


def commit_folder(folder: Path) -> None:
    """Put what `begin_folder` gave, and the caller filled, in the place of `folder`."""
    old = _beside(folder, ".old")
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(_beside(folder, ".new"), folder)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(folder: Path) -> bool:
    """Whether `folder` is there, after bringing back the old one of a `replace_folder` that was cut short."""
    old = _beside(folder, ".old")
    if not folder.exists() and old.exists():
        os.replace(old, folder)
    return folder.exists()


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def require_image_name(path: Path) -> Path:
    """The path itself, if its suffix names an image format that can be written; checked like `require_writable`."""
    from PIL import Image

    Image.init()
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; name a file")
    if Image.EXTENSION.get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"cannot write {path}: its ending names no image format; use .png")
    return require_writable(path)


def write_image(path: Path, image: Image.Image, **options: Any) -> None:
    """Write an image atomically, in the format its suffix names, with options of `Image.save`."""
    write_atomically(path, lambda partial: image.save(partial, **options))


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The text of a regular file; reading a device or a pipe might never end.

    Raises:
        OSError: if there is none, or it is another kind of file or too large.
        UnicodeDecodeError: if it is no text.
    """
    require_regular(path)
    if path.stat().st_size > _LARGEST_TEXT:
        raise OSError(errno.EFBIG, f"it has more than {_LARGEST_TEXT >> 20} MiB")
    return path.read_text(encoding=encoding)


def require_regular(path: Path) -> Path:
    """The path itself, if a regular file is there; else an OSError."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is a folder" if path.is_dir() else "it is no regular file")
    return path


def read_prompts(path: Path) -> list[str]:
    """Prompts of a UTF-8 file: one per line, or JSON lines with a "prompt" field (.jsonl).

    Raises:
        ValueError: if the file is missing, not UTF-8, empty, or a line has no prompt.
    """
    try:
        lines = [line.strip() for line in read_text(path, "utf-8-sig").splitlines()]
    except OSError as error:
        raise ValueError(f"cannot read the prompts file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompts file {path} is not UTF-8 text: {error}") from error
    lines = [line for line in lines if line]
    if path.suffix == ".jsonl":
        with refusing(f"every line of {path} must be a JSON object with a 'prompt'"):
            found = [json.loads(line)["prompt"] for line in lines]
        strange = next((p for p in found if not isinstance(p, str)), None)
        if strange is not None or None in found:
            raise ValueError(f"every 'prompt' of {path} must be a text; got {strange!r}")
        lines = [prompt.strip() for prompt in found]
    if not lines or not all(lines):
        raise ValueError(f"the prompts file {path} holds no prompts; write one per line")
    return lines


def _upright(file: Image.Image) -> Image.Image:
    """RGB, as a viewer shows it: turned as the camera was, 16 bits scaled to eight, what is transparent on white."""
    import numpy as np
    from PIL import Image, ImageOps

    image = ImageOps.exif_transpose(file)
    if image.mode.startswith(("I", "F")):
        numbers = np.asarray(image, dtype=np.float64)
        largest = 65535.0 if image.mode.startswith("I") and numbers.max() > 255 else 255.0
        image = Image.fromarray((numbers / largest * 255).clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """An image file as [1, 3, H, W] in [0, 1], resized to `size` (width, height) if given.

    Raises:
        ValueError: if the file cannot be read as an image.
    """
    import numpy as np
    import torch
    from PIL import Image

    with refusing(f"cannot read the image {path}"), Image.open(require_regular(path)) as file:
        image = _upright(file)
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255

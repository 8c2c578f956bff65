"""Reading prompts and images, and writing results so that nothing is left half-written."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor


def require_writable(path: Path) -> Path:
    """The path itself, checked before long work: its folder is made, and a file can be written there.

    Raises:
        ValueError: if not, saying why.
    """
    try:
        if path.parent.is_file():
            raise ValueError(f"cannot write {path}: {path.parent} is a file; name a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ValueError(f"cannot write {path}: it is a folder; name a file")
        probe = path.with_name(path.name + ".partial")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error
    return path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path` and move the result into place."""
    partial = path.with_name(path.stem + ".partial" + path.suffix)
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write JSON atomically."""
    write_atomically(path, lambda p: p.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8"))


def require_image_name(path: Path) -> Path:
    """The path itself, if its suffix names an image format that can be written; checked like `require_writable`."""
    Image.init()
    if path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; name a file")
    if Image.EXTENSION.get(path.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"cannot write {path}: its ending names no image format; use .png")
    return require_writable(path)


def write_image(path: Path, image: Image.Image) -> None:
    """Write an image atomically, in the format its suffix names."""
    write_atomically(path, image.save)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a UTF-8 file: one per line, or JSON lines with a "prompt" field (.jsonl).

    Raises:
        ValueError: if the file is missing, not UTF-8, empty, or a line has no prompt.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except OSError as error:
        raise ValueError(f"cannot read the prompts file {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompts file {path} is not UTF-8 text: {error}") from error
    lines = [line for line in lines if line]
    if path.suffix == ".jsonl":
        try:
            found = [json.loads(line)["prompt"] for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"every line of {path} must be a JSON object with a 'prompt': {error!r}") from error
        strange = next((p for p in found if not isinstance(p, str)), None)
        if strange is not None or None in found:
            raise ValueError(f"every 'prompt' of {path} must be a text; got {strange!r}")
        lines = [prompt.strip() for prompt in found]
    if not lines or not all(lines):
        raise ValueError(f"the prompts file {path} holds no prompts; write one per line")
    return lines


def read_image(path: Path, size: tuple[int, int] | None = None) -> Tensor:
    """An image file as [1, 3, H, W] in [0, 1], resized to `size` (width, height) if given.

    Raises:
        ValueError: if the file cannot be read as an image.
    """
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        raise ValueError(f"cannot read the image {path}: {error}") from error
    if size is not None and image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255

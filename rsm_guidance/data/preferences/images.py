"""Image files to upright RGB, with a reason for each that cannot be decoded."""

import hashlib
import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from rsm_guidance.data.preferences.problems import BadRow, Reason

MAX_PIXELS = 64_000_000
"""Larger images are refused before they are decoded: a small file can hold an image that fills the memory."""
_SHOWN = 120


def decode(path: Path, data: bytes | None = None) -> Image.Image:
    """An image as 8-bit RGB: turned upright as its EXIF says, transparency on white, 16 bits brought to 8.

    Args:
        path: the file, or a name for the bytes.
        data: the bytes of a file; None to read `path`.

    Raises:
        BadRow: for a file that is missing, unreadable, no image, damaged or too large, or whose EXIF is broken.
    """
    if data is None:
        data = _bytes(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's own warnings of size; ours is a limit
        try:
            image = Image.open(io.BytesIO(data))
        except Image.DecompressionBombError as error:
            raise BadRow(Reason.TOO_LARGE, f"{path}: {error}") from error
        except UnidentifiedImageError as error:
            raise BadRow(Reason.NO_IMAGE, str(path) if data else f"{path} is empty") from error
        except Exception as error:  # readers of formats raise what they like
            raise BadRow(Reason.DAMAGED, _why(path, error)) from error
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise BadRow(Reason.TOO_LARGE, f"{path}: {image.width} x {image.height} pixels")
            try:
                image.load()
            except Exception as error:
                raise BadRow(Reason.DAMAGED, _why(path, error)) from error
            return _rgb(path, _upright(path, image))


def content_key(image: Image.Image) -> str:
    """A hash of the pixels: equal for the same image, however its file was written."""
    digest = hashlib.blake2b(f"{image.mode} {image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BadRow(Reason.MISSING, str(path)) from error
    except (OSError, ValueError) as error:  # ValueError: a null character in the path
        raise BadRow(Reason.UNREADABLE, _why(path, error)) from error


def _upright(path: Path, image: Image.Image) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # Pillow warns of EXIF that is cut off, and reads what is left
            if image.info.get("exif"):
                Image.Exif().load(
                    image.info["exif"]
                )  # anew: `getexif` keeps what it could read when the file was opened
        return ImageOps.exif_transpose(image)
    except Exception as error:
        raise BadRow(Reason.EXIF, _why(path, error)) from error


def _rgb(path: Path, image: Image.Image) -> Image.Image:
    try:
        if image.mode.startswith("I;16"):
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ValueError(f"pixels of mode {image.mode} have no range")
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image.convert("RGB")
    except Exception as error:
        raise BadRow(Reason.DAMAGED, _why(path, error)) from error


def _why(path: Path, error: Exception) -> str:
    why = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"{path}: {why.splitlines()[0][:_SHOWN]}"

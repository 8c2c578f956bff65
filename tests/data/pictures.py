"""Small images whose colour tells which one they are, and files that are none."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def encoded(number: int, size: tuple[int, int] = (8, 6), format: str = "PNG", **options: object) -> bytes:
    """An image of one colour that tells its number."""
    out = io.BytesIO()
    Image.new("RGB", size, (number, 255 - number, 7)).save(out, format, **options)
    return out.getvalue()


def number_of(image: Image.Image) -> int:
    return int(image.getpixel((0, 0))[0])


def put(path: Path, number: int, **options: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encoded(number, **options))
    return path.name


def noise(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def noisy(seed: int, format: str, **options: object) -> bytes:
    out = io.BytesIO()
    noise(seed).save(out, format, **options)
    return out.getvalue()


def bomb(width: int = 60_000, height: int = 60_000) -> bytes:
    """A few bytes that say they are a huge image."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


def broken_exif() -> bytes:
    """A JPEG whose pixels are fine, and whose EXIF is none."""
    return noisy(1, "JPEG", exif=b"Exif\0\0" + b"MM\0*\0\0\0\x08\0\x09" + b"\xff" * 20)


BROKEN = {
    "missing file": None,
    "not an image": b"this is no image",
    "damaged image": noisy(0, "PNG")[:2000],
    "image too large": bomb(),
    "broken EXIF": broken_exif(),
}
"""Contents of files that cannot be decoded, by the reason they are counted under."""

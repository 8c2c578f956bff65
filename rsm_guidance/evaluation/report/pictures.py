"""Grids of images with captions under them."""

import bisect
import math

from PIL import Image, ImageDraw, ImageFont


def grid(rows: list[list[tuple[Image.Image, str]]], cell: int = 192, title: list[str] | None = None) -> Image.Image:
    """Rows of (image, label) as one picture; `title` labels the columns.

    Args:
        rows: equally long rows; a label of the first image alone is that of the whole row.
        cell: side of a cell in pixels; small images are enlarged smoothly.
        title: one heading per column.
    """
    font, small = ImageFont.load_default(15), ImageFont.load_default(13)
    label, head, gap = 22, 26 if title else 0, 10
    width = len(rows[0]) * (cell + gap) + gap
    height = head + len(rows) * (cell + label + gap) + gap
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    for column, text in enumerate(title or []):
        heading = _shorten(text, draw, font, cell)
        draw.text((gap + column * (cell + gap) + cell / 2, gap), heading, fill="black", font=font, anchor="ma")
    for r, row in enumerate(rows):
        whole = not any(text for _, text in row[1:])
        for c, (image, text) in enumerate(row):
            x, y = gap + c * (cell + gap), head + gap + r * (cell + label + gap)
            canvas.paste(image.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC), (x, y))
            draw.rectangle((x, y, x + cell - 1, y + cell - 1), outline="#cccccc")
            place, anchor, room = (x, "la", width - 2 * gap) if whole else (x + cell / 2, "ma", cell)
            draw.text(
                (place, y + cell + 4), _shorten(text, draw, small, room), fill="#444444", font=small, anchor=anchor
            )
    return canvas


def _shorten(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    if len(text) <= width and draw.textlength(text, font=font) <= width:  # a letter is at least a pixel wide
        return text
    lengths = range(min(len(text), width))
    fitting = bisect.bisect_right(
        lengths, width, key=lambda n: math.ceil(draw.textlength(text[: n + 1] + "…", font=font))
    )
    return text[:fitting] + "…"

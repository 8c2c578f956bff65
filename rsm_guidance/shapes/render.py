"""Renderer of the shapes world: scene specifications to 64x64 anti-aliased RGB images with known ground truth."""

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from rsm_guidance.shapes.scenes import COLORS, SHAPES, Group, SceneSpec

IMAGE_SIZE = 64
BACKGROUND = (244, 242, 238)
_SUPERSAMPLE = 4
_GAP = 3.0


@dataclass(frozen=True)
class Placed:
    """One drawn object: centre and radius in pixels of the 64x64 image, y downwards."""

    color: str
    shape: str
    x: float
    y: float
    radius: float


def outline(shape: str, x: float, y: float, radius: float) -> list[tuple[float, float]]:
    """The polygon of an object (a circle has 48 corners); all shapes fill about the same bounding box."""
    if shape == "circle":
        return [
            (x + radius * math.cos(a), y + radius * math.sin(a))
            for a in np.linspace(0, 2 * math.pi, 48, endpoint=False)
        ]
    if shape == "square":
        s = radius * 0.9
        return [(x - s, y - s), (x + s, y - s), (x + s, y + s), (x - s, y + s)]
    if shape == "triangle":
        return [(x, y - radius), (x + radius, y + 0.85 * radius), (x - radius, y + 0.85 * radius)]
    if shape == "star":
        points = []
        for k in range(10):
            r = radius * (1.12 if k % 2 == 0 else 0.46)
            a = math.pi * k / 5 - math.pi / 2
            points.append((x + r * math.cos(a), y + r * math.sin(a)))
        return points
    if shape == "cross":
        r, a = radius, radius * 0.34
        return [(x - a, y - r), (x + a, y - r), (x + a, y - a), (x + r, y - a), (x + r, y + a), (x + a, y + a),
                (x + a, y + r), (x - a, y + r), (x - a, y + a), (x - r, y + a), (x - r, y - a), (x - a, y - a)]  # fmt: skip
    raise ValueError(f"unknown shape {shape!r}; choose one of {', '.join(SHAPES)}")


def render(objects: list[Placed]) -> np.ndarray:
    """Draw objects on the plain background; uint8 [64, 64, 3]."""
    side = IMAGE_SIZE * _SUPERSAMPLE
    canvas = Image.new("RGB", (side, side), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for o in objects:
        points = outline(o.shape, o.x, o.y, o.radius)
        draw.polygon([(px * _SUPERSAMPLE, py * _SUPERSAMPLE) for px, py in points], fill=COLORS[o.color])
    return np.asarray(canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))


def _relation_holds(relation: str, first: Placed, second: Placed) -> bool:
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return along > first.radius + second.radius + _GAP and abs(across) < 0.6 * along


def place(spec: SceneSpec, rng: random.Random) -> list[Placed]:
    """Choose free attributes, sizes and places for a demand, so that an image of it states the demand and no other.

    Objects never overlap, and free colours of two kinds are drawn independently.
    """
    kinds: list[tuple[str, str]] = []
    for group in spec.groups:
        kinds += [(_color(group, rng), group.shape) for _ in range(group.count)]
    lo, hi = {1: (9.0, 15.0), 2: (8.0, 12.5)}.get(len(kinds), (6.5, 9.0))
    while True:
        objects: list[Placed] = []
        for color, shape in kinds:
            for _ in range(60):
                r = rng.uniform(lo, hi)
                edge = 1.2 * r + 1.0
                o = Placed(color, shape, rng.uniform(edge, IMAGE_SIZE - edge), rng.uniform(edge, IMAGE_SIZE - edge), r)
                if all(math.hypot(o.x - p.x, o.y - p.y) > 1.12 * (o.radius + p.radius) + _GAP for p in objects):
                    objects.append(o)
                    break
        complete = len(objects) == len(kinds)
        if complete and (spec.relation is None or _relation_holds(spec.relation, objects[0], objects[1])):
            return objects


def _color(group: Group, rng: random.Random) -> str:
    return group.color or rng.choice(list(COLORS))


def render_spec(spec: SceneSpec, rng: random.Random) -> np.ndarray:
    """A random image of a demand, uint8 [64, 64, 3]."""
    return render(place(spec, rng))

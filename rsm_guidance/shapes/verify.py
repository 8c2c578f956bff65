"""The verifier of the shapes world: parses an image into objects and checks a caption's demand against them.

A pixel belongs to the palette colour in whose direction from the background it lies; connected components of one
colour become objects, and each is named by the template it overlaps best (intersection over union).  Sloppy outlines
are tolerated; colour, count and relation are strict.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import scipy  # loads its parts when they are used
from PIL import Image, ImageDraw

from rsm_guidance.shapes.render import BACKGROUND, Placed, outline
from rsm_guidance.shapes.scenes import COLORS, SHAPES, SceneSpec, parse_caption

_TEMPLATE = 32
_MIN_AREA = 28  # pixels; the smallest object drawn, a star of radius 6.5, covers about 55
_MIN_IOU = 0.62


@dataclass(frozen=True)
class Seen:
    """One object found in an image: centre in pixels, `iou` in [0, 1] with the best template (shape None below 0.62)."""

    color: str
    shape: str | None
    x: float
    y: float
    area: int
    iou: float

    @property
    def radius(self) -> float:
        """Radius in pixels of a disc of the same area."""
        return math.sqrt(self.area / math.pi)


@dataclass(frozen=True)
class Verdict:
    """Graded `score` in [0, 1] and strict `correct` for one image and caption."""

    score: float
    correct: bool


@lru_cache(maxsize=1)
def _templates() -> list[tuple[str, np.ndarray]]:
    """Every shape sharp and with worn corners (blurred, thresholded), as a decoder leaves the small ones."""
    masks = []
    for shape in SHAPES:
        big = Image.new("L", (256, 256), 0)
        ImageDraw.Draw(big).polygon(outline(shape, 128, 128, 80), fill=255)
        for wear in (0.0, 0.07, 0.12):
            worn = scipy.ndimage.gaussian_filter(np.asarray(big, np.float32), wear * 160)
            masks.append((shape, _normalise(worn > 127)))
    return masks


def _normalise(mask: np.ndarray) -> np.ndarray:
    """Crop a mask to its bounding box and stretch that to the template size."""
    ys, xs = np.nonzero(mask)
    crop = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1].astype(np.uint8) * 255
    image = Image.fromarray(crop).resize((_TEMPLATE, _TEMPLATE), Image.Resampling.BILINEAR)
    return np.asarray(image) > 127


def _enlarge(coverage: np.ndarray) -> np.ndarray:
    """A sub-pixel outline from anti-aliased coverage in [0, 1], four times larger."""
    padded = Image.fromarray((np.pad(coverage, 2) * 255).astype(np.uint8))
    large = padded.resize((padded.width * 4, padded.height * 4), Image.Resampling.BILINEAR)
    return np.asarray(large) > 127


def see(image: np.ndarray) -> list[Seen]:
    """Parse an image (uint8 [H, W, 3]) into its objects."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"the verifier reads uint8 images [H, W, 3]; got {image.dtype} {list(image.shape)}")
    # A rim pixel is background mixed with a colour, so it lies on the ray from the background through that colour.
    rays = np.array([*COLORS.values()], np.float32) - BACKGROUND
    offset = image.astype(np.float32) - BACKGROUND
    along = offset @ (rays / (rays**2).sum(1, keepdims=True)).T  # 1 at the full colour
    cosine = offset @ (rays / np.linalg.norm(rays, axis=1, keepdims=True)).T
    nearest = cosine.argmax(-1)
    solid = np.take_along_axis(along, nearest[..., None], -1)[..., 0] > 0.45
    found = []
    for index, color in enumerate(COLORS):
        labels, _ = scipy.ndimage.label(solid & (nearest == index), structure=np.ones((3, 3)))
        for k, box in enumerate(scipy.ndimage.find_objects(labels), start=1):
            mask = labels[box] == k
            area = int(mask.sum())
            if area < _MIN_AREA or min(mask.shape) < 5:
                continue  # anti-aliased rims between two colours
            coverage = np.where(scipy.ndimage.binary_fill_holes(mask), np.clip(along[box][..., index], 0, 1), 0)
            normal = _normalise(_enlarge(coverage / coverage.max()))  # pale objects have outlines too
            iou, shape = max(((normal & t).sum() / (normal | t).sum(), name) for name, t in _templates())
            aspect = mask.shape[0] / mask.shape[1]
            named = iou >= _MIN_IOU and 0.6 < aspect < 1.67
            cy, cx = scipy.ndimage.center_of_mass(mask)
            found.append(
                Seen(
                    color,
                    shape if named else None,
                    float(cx + box[1].start),
                    float(cy + box[0].start),
                    area,
                    float(iou),
                )
            )
    return found


def _relation(relation: str, first: Seen | Placed, second: Seen | Placed) -> float:
    """1 when the relation clearly holds, falling to 0 when the opposite holds; strict correctness asks for 1."""
    dx, dy = second.x - first.x, second.y - first.y
    along, across = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    if along > 4 and along > abs(across):
        return 1.0
    return float(np.clip(0.5 + along / 64, 0.0, 0.9))


def judge(objects: Sequence[Seen | Placed], spec: SceneSpec) -> Verdict:
    """Check the objects seen in an image, or drawn in it, against a demand.

    The score is the mean credit of the best assignment of demanded to seen objects (half for the colour, half for the
    shape) over the larger of both counts, times a factor in [0.5, 1] for the relation.  Correct means: exactly the
    demanded objects, nothing else, and the relation holds.
    """
    wanted = [(g.color, g.shape) for g in spec.groups for _ in range(g.count)]
    if not objects:
        return Verdict(0.0, False)
    credit = np.array(
        [[0.5 * (c is None or c == o.color) + 0.5 * (s == o.shape) for o in objects] for c, s in wanted], np.float64
    )
    rows, columns = scipy.optimize.linear_sum_assignment(credit, maximize=True)
    score = float(credit[rows, columns].sum() / max(len(wanted), len(objects)))
    correct = score == 1.0
    if spec.relation:
        holds = 0.0
        if len(objects) >= 2:
            holds = _relation(spec.relation, objects[columns[0]], objects[columns[1]])
        correct = correct and holds == 1.0
        score *= 0.5 + 0.5 * holds
    return Verdict(score, correct)


def verify(image: np.ndarray, caption: str) -> Verdict:
    """Check one image (uint8 [H, W, 3]) against one caption of the grammar."""
    return judge(see(image), parse_caption(caption).spec)

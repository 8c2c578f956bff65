"""Aspect-ratio buckets: a few sizes of about one area, so that images of any shape make batches with little cropping."""

import math
from dataclasses import dataclass
from functools import cached_property

from PIL import Image

from rsm_guidance.core.errors import UsageError


@dataclass(frozen=True)
class Buckets:
    """Sizes with sides that are multiples of `step`, at most `side` squared in area, upright and lying.

    Attributes:
        side: of the square, in pixels; a multiple of `step`.
        step: of the sides, in pixels; a multiple of what the model's autoencoder and patches ask for.
        max_ratio: of the longer side to the shorter one, at least 1; 1 keeps the square alone.
    """

    side: int = 512
    step: int = 64
    max_ratio: float = 2.0

    def __post_init__(self) -> None:
        if self.step < 1 or self.side < self.step or self.side % self.step or not 1 <= self.max_ratio < math.inf:
            raise UsageError(
                "buckets need a side that is a positive multiple of the step, and a ratio of at least 1; "
                f"got side {self.side}, step {self.step}, ratio {self.max_ratio}"
            )

    @cached_property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """Widths and heights, from the tallest to the widest."""
        found = set()
        for long in range(self.side, int(self.side * self.max_ratio) + 1, self.step):
            short = self.side * self.side // long // self.step * self.step
            if short and long <= short * self.max_ratio:
                found |= {(long, short), (short, long)}
        return tuple(sorted(found, key=lambda size: (size[0] / size[1], size)))

    def of(self, *images: Image.Image) -> int:
        """The bucket whose shape is nearest to that of images, by the logarithm of the ratio; of several, to the mean."""
        wanted = sum(math.log(image.width / image.height) for image in images) / len(images)
        return min(range(len(self.sizes)), key=lambda i: abs(math.log(self.sizes[i][0] / self.sizes[i][1]) - wanted))

    def fitted(self, image: Image.Image, bucket: int) -> Image.Image:
        """An image scaled to cover the size of a bucket, and cropped in the middle."""
        width, height = self.sizes[bucket]
        scale = max(width / image.width, height / image.height)
        cut = width / scale, height / scale
        left, top = (image.width - cut[0]) / 2, (image.height - cut[1]) / 2
        box = max(left, 0.0), max(top, 0.0), min(left + cut[0], image.width), min(top + cut[1], image.height)
        return image.resize((width, height), Image.Resampling.BICUBIC, box)

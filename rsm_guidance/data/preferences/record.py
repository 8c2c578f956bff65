"""One preference: two images of a prompt, and how probable it is that the first is the better one."""

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from PIL import Image

from rsm_guidance.data.preferences.images import decode
from rsm_guidance.data.preferences.problems import BadRow, Reason


@dataclass(frozen=True)
class ImageSource:
    """An image that is decoded when it is asked for: a file, or the bytes of one.

    Attributes:
        path: the file, or a name for the bytes.
        data: the bytes of a file; None if they lie at `path`.
    """

    path: Path
    data: bytes | None = field(default=None, repr=False)

    def load(self) -> Image.Image:
        """The image as 8-bit RGB, upright.

        Raises:
            BadRow: saying why it cannot be decoded.
        """
        return decode(self.path, self.data)

    def identity(self) -> str:
        """A text that changes when the file does: a hash of the bytes, or path, size and time of change."""
        if self.data is not None:
            return self.content()
        try:
            status = self.path.stat()
            return f"{self.path} {status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):
            return f"{self.path} missing"

    def content(self) -> str:
        """A hash of the bytes, of an image that has them."""
        return hashlib.blake2b(self.data or b"", digest_size=16).hexdigest()


@dataclass(frozen=True)
class Preference:
    """Two images of a prompt, compared.

    Attributes:
        prompt: what both should show, or how both should change `source_image`.
        first: one image.
        second: the other.
        probability: that `first` is preferred, in [0, 1]; 0.5 is a tie.
        weight: in the loss, relative to other pairs; positive.
        place: where it was read, such as "choices.csv, line 7".
        source: what the images or votes come from.
        category: kind of prompt.
        models: what made the first and the second image; "" if unknown.
        source_image: what was edited; None for images made from the prompt alone.
        scores: of the first and second image by dimension, in the units of the data set, not normalised.
        ids: further names, such as those of images and users.
    """

    prompt: str
    first: ImageSource
    second: ImageSource
    probability: float
    weight: float = 1.0
    place: str = ""
    source: str = ""
    category: str = ""
    models: tuple[str, str] = ("", "")
    source_image: ImageSource | None = None
    scores: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    ids: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise BadRow(Reason.NO_PROMPT)
        if not 0 <= self.probability <= 1:
            raise BadRow(Reason.BAD_LABEL, f"the probability must lie in [0, 1]; got {self.probability}")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise BadRow(Reason.BAD_LABEL, f"the weight must be positive; got {self.weight}")

    @property
    def tie(self) -> bool:
        """Whether neither image is preferred."""
        return self.probability == 0.5

    def swapped(self) -> "Preference":
        """The same comparison with the images in the other order."""
        return replace(
            self,
            first=self.second,
            second=self.first,
            probability=1 - self.probability,
            models=self.models[::-1],
            scores={name: (b, a) for name, (a, b) in self.scores.items()},
        )

    def images(self) -> tuple[ImageSource, ...]:
        """The first, the second and, if there is one, the source image."""
        return (self.first, self.second) + (() if self.source_image is None else (self.source_image,))

    def identity(self) -> str:
        """A hash of all that training reads: the prompt, the numbers, and the files as they are now."""
        own = (self.prompt, self.probability, self.weight, self.source, self.category, self.models, dict(self.scores))
        parts = [repr(own), *(image.identity() for image in self.images())]
        return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()

"""Preferences whose images can be used: decoded, different, and met for the first time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from rsm_guidance.data.preferences.images import content_key
from rsm_guidance.data.preferences.problems import BadRow, Problem, Reason
from rsm_guidance.data.preferences.read import accepted
from rsm_guidance.data.preferences.record import ImageSource, Preference

_KEPT = 8


@dataclass(frozen=True)
class Decoded:
    """A preference with its images.

    Attributes:
        preference: as it was read.
        images: 8-bit RGB: the first, the second and, if there is one, the source image.
        keys: hashes of their pixels.
    """

    preference: Preference
    images: tuple[Image.Image, ...]
    keys: tuple[str, ...]


def decoded(
    records: Iterable[Preference | Problem], on_problem: Callable[[Problem], object] | None = None
) -> Iterator[Decoded]:
    """The preferences whose images can be decoded and differ, in their order.

    A preference that cannot be used is told to `on_problem` and left out; nothing takes its place.
    """
    kept: dict[Path, tuple[Image.Image, str] | BadRow] = {}  # ranked lists name a file several times
    for preference in accepted(records, on_problem):
        try:
            loaded = [_loaded(image, kept) for image in preference.images()]
            if loaded[0][1] == loaded[1][1]:
                raise BadRow(
                    Reason.IDENTICAL, " and ".join(dict.fromkeys(str(i.path) for i in preference.images()[:2]))
                )
        except BadRow as error:
            if on_problem is not None:
                on_problem(error.at(preference.place))
            continue
        yield Decoded(preference, tuple(image for image, _ in loaded), tuple(key for _, key in loaded))


class Duplicates:
    """Tells which comparisons have been met before: the same prompt, images and source image, in either order."""

    def __init__(self) -> None:
        self._met: dict[tuple[str, str, str, str], str] = {}

    def first(self, prompt: str, keys: tuple[str, ...], place: str) -> str | None:
        """Where the comparison was met first; None if that is here."""
        low, high = sorted(keys[:2])
        met = self._met.setdefault((prompt, low, high, "".join(keys[2:])), place)
        return None if met is place else met


def _loaded(source: ImageSource, kept: dict[Path, tuple[Image.Image, str] | BadRow]) -> tuple[Image.Image, str]:
    found = kept.pop(source.path, None) if source.data is None else None
    if found is None:
        try:
            image = source.load()
            found = image, content_key(image)
        except BadRow as error:
            found = error
    if source.data is None:
        kept[source.path] = found  # the latest is the last
        if len(kept) > _KEPT:
            del kept[next(iter(kept))]
    if isinstance(found, BadRow):
        raise found
    return found

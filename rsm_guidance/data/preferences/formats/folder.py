"""A folder of pairs: `w/NAME.png` is preferred to `l/NAME.png`, each with its prompt in a caption file, `w/NAME.txt`.

One caption of the two is enough; two must agree.  The images may differ in their ending.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from rsm_guidance.data.preferences.formats.base import Format, Reading, each, image, shuffled
from rsm_guidance.data.preferences.problems import BadRow, Problem, Reason
from rsm_guidance.data.preferences.record import Preference
from rsm_guidance.data.preferences.rows import Row

SIDES = ("w", "l")
_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")


def rows_of(folder: Path) -> Iterable[Row | Problem]:
    """One row a name, in the order of names: the files that have it, by side."""
    names: dict[str, dict[str, list[str]]] = {}
    for side in SIDES:
        for path in sorted((folder / side).iterdir()):
            ending = path.suffix.lower()
            if ending in _ENDINGS or ending == ".txt":
                kind = "caption" if ending == ".txt" else "image"
                names.setdefault(path.stem, {}).setdefault(f"{side} {kind}", []).append(f"{side}/{path.name}")
    for name in sorted(names):
        yield Row(folder / "pairs", f"{folder.name}, {name}", names[name])


def _pairs(row: Row, how: Reading) -> Iterator[Preference]:
    images = []
    for side in SIDES:
        found = row.values.get(f"{side} image", [])
        if len(found) != 1:
            raise BadRow(
                Reason.MISSING, f"one image of this name is needed in {side}/; got {', '.join(found) or 'none'}"
            )
        images.append(image(row, found[0]))
    captions = [row.file.parent / path for side in SIDES for path in row.values.get(f"{side} caption", [])]
    yield shuffled(Preference(_prompt(captions), images[0], images[1], 1.0, place=row.place), how)


def _prompt(captions: list[Path]) -> str:
    try:
        found = {path.read_text(encoding="utf-8-sig").strip() for path in captions}
    except UnicodeDecodeError as error:
        raise BadRow(Reason.NO_PROMPT, "a caption is not UTF-8") from error
    except OSError as error:
        raise BadRow(Reason.NO_PROMPT, str(error)) from error
    if len(found) != 1:
        raise BadRow(Reason.NO_PROMPT, "the captions differ" if found else "there is no caption file")
    return found.pop()


FORMAT = Format("a folder of winners (w/) and losers (l/) with captions", (), each(_pairs))

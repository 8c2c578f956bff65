"""Tables of one's own: JSON lines, CSV or parquet, with paths relative to the table's folder.

Two layouts: `prompt, chosen, rejected`, and `prompt, image_0, image_1, label`, where the label says which image is
preferred: 0, 1 or `tie`, or the probability in between that it is `image_1`; `image_0` and `image_1` are labels, too.
Optional columns: weight, source, category, source_image, and model_0, model_1, rating_0, rating_1 (or chosen_model,
rejected_model, chosen_rating, rejected_rating).
"""

from collections.abc import Iterator
from typing import Any

from rsm_guidance.data.preferences.formats.base import (
    Format,
    Reading,
    columns,
    each,
    image,
    number,
    optional,
    shuffled,
    text,
    value_of,
)
from rsm_guidance.data.preferences.problems import BadRow, Reason
from rsm_guidance.data.preferences.record import Preference
from rsm_guidance.data.preferences.rows import Row

_OPTIONAL = frozenset({"weight", "source", "category", "source_image"})
_LABELS = {"image_0": 0.0, "image_1": 1.0, "tie": 0.5}


def _chosen(row: Row, how: Reading) -> Iterator[Preference]:
    first, second = (image(row, value_of(row, name)) for name in ("chosen", "rejected"))
    models = (optional(row, "chosen_model"), optional(row, "rejected_model"))
    yield shuffled(
        Preference(
            text(row, "prompt", "caption"),
            first,
            second,
            1.0,
            models=models,
            **_common(row, "chosen_rating", "rejected_rating"),
        ),
        how,
    )


def _labelled(row: Row, how: Reading) -> Iterator[Preference]:
    first, second = (image(row, value_of(row, name)) for name in ("image_0", "image_1"))
    models = (optional(row, "model_0"), optional(row, "model_1"))
    label = 1 - _label(row.values.get("label"))
    yield Preference(
        text(row, "prompt", "caption"), first, second, label, models=models, **_common(row, "rating_0", "rating_1")
    )


def _common(row: Row, *ratings: str) -> dict[str, Any]:
    rated = [number(row.values[name], name) for name in ratings if row.values.get(name) not in (None, "")]
    if len(rated) == 1:
        raise BadRow(Reason.BAD_LABEL, f"one image alone is rated; give {' and '.join(ratings)}, or neither")
    weight, edited = row.values.get("weight"), row.values.get("source_image")
    return {
        "weight": 1.0 if weight in (None, "") else number(weight, "weight"),
        "place": row.place,
        "source": optional(row, "source"),
        "category": optional(row, "category"),
        "source_image": image(row, edited) if edited else None,
        "scores": {"rating": (rated[0], rated[1])} if rated else {},
    }


def _label(value: Any) -> float:
    """The probability that image_1 is preferred."""
    word = value.strip().lower() if isinstance(value, str) else value
    if word is None or word == "":
        raise BadRow(Reason.NO_LABEL)
    if isinstance(word, str) and word in _LABELS:
        return _LABELS[word]
    try:
        label = number(word, "label")
    except BadRow:
        label = -1.0
    if not 0 <= label <= 1:
        raise BadRow(Reason.BAD_LABEL, f"'label' must be 0, 1, tie or a number between; got {value!r}")
    return label


CHOSEN = Format(
    "a table of chosen and rejected images",
    columns("prompt chosen rejected", "caption chosen rejected"),
    each(_chosen),
    optional=_OPTIONAL | {"chosen_model", "rejected_model", "chosen_rating", "rejected_rating"},
)
LABELLED = Format(
    "a table of two images and a label",
    columns("prompt image_0 image_1 label", "caption image_0 image_1 label"),
    each(_labelled),
    optional=_OPTIONAL | {"model_0", "model_1", "rating_0", "rating_1"},
)

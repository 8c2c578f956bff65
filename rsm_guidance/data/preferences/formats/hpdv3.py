"""HPDv3 (Ma et al. 2025, arXiv:2508.03789), and what EditReward trains on: `path1` is always the preferred image.

So the order is left to chance.  The label is the share of annotators, max(`choice_dist`) / sum, where it is stated, else 1.
`path_src` names the image that was edited, `tie_case` marks ties.
"""

from collections.abc import Iterator

from rsm_guidance.data.preferences.formats.base import (
    Format,
    Reading,
    columns,
    each,
    image,
    number,
    optional,
    rated,
    share,
    shuffled,
    text,
    value_of,
)
from rsm_guidance.data.preferences.problems import BadRow, Reason
from rsm_guidance.data.preferences.record import Preference
from rsm_guidance.data.preferences.rows import Row

_SCORES = {"overall": "overall_score", "dimension 1": "dim1_score", "dimension 2": "dim2_score"}


def _pairs(row: Row, how: Reading) -> Iterator[Preference]:
    if how.min_confidence is not None:
        confidence = row.values.get("confidence")
        if confidence is None or number(confidence, "confidence") < how.min_confidence:
            raise BadRow(Reason.CONFIDENCE, f"{confidence}")
    edited = row.values.get("path_src")
    preference = Preference(
        text(row, "prompt"),
        image(row, value_of(row, "path1")),
        image(row, value_of(row, "path2")),
        _label(row),
        place=row.place,
        source=optional(row, "source"),
        models=(optional(row, "model1"), optional(row, "model2")),
        source_image=image(row, edited) if edited else None,
        scores=rated(row, {name: (f"model1_{c}", f"model2_{c}") for name, c in _SCORES.items()}),
    )
    yield shuffled(preference, how)


def _label(row: Row) -> float:
    if row.values.get("tie_case") in (True, 1, "true", "True"):
        return 0.5
    votes = row.values.get("choice_dist")
    if votes is None:
        return 1.0
    if not isinstance(votes, list) or len(votes) != 2:
        raise BadRow(Reason.BAD_LABEL, f"'choice_dist' must be two numbers of votes; got {votes!r}")
    first = share(votes[0], votes[1], "choice_dist")
    return max(first, 1 - first)


FORMAT = Format(
    "HPDv3: comparisons of image files, the preferred one first",
    columns("prompt path1 path2"),
    each(_pairs),
    ("MizzenAI/HPDv3",),
    "unpack the archives of images beside train.json",
)

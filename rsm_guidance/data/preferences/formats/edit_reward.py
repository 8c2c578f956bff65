"""EditReward-Data (Wu et al. 2025, arXiv:2509.26346): two edits of an image by one instruction, with scores by dimension."""

from collections.abc import Iterator

from rsm_guidance.data.preferences.formats.base import (
    Format,
    Reading,
    columns,
    each,
    image,
    optional,
    rated,
    text,
    value_of,
)
from rsm_guidance.data.preferences.problems import BadRow, Reason
from rsm_guidance.data.preferences.record import Preference
from rsm_guidance.data.preferences.rows import Row

_VOTES = {"leftvote": 1.0, "rightvote": 0.0, "tie": 0.5}
_SCORES = ("overall", "instruction_following", "quality_aesthetic")


def _pairs(row: Row, how: Reading) -> Iterator[Preference]:
    vote = row.values.get("vote_type")
    if vote not in _VOTES:
        raise BadRow(Reason.BAD_LABEL, f"'vote_type' must be one of {', '.join(_VOTES)}; got {vote!r}")
    yield Preference(
        text(row, "instruction"),
        image(row, value_of(row, "left_output_image")),
        image(row, value_of(row, "right_output_image")),
        _VOTES[vote],
        place=row.place,
        source="edit-reward",
        models=(optional(row, "left_model"), optional(row, "right_model")),
        source_image=image(row, value_of(row, "source_img")),
        scores=rated(row, {name: (f"left_{name}_score", f"right_{name}_score") for name in _SCORES}),
        ids={"key": optional(row, "unique_key")},
    )


FORMAT = Format(
    "EditReward: comparisons of edits with the images inside",
    columns("instruction source_img left_output_image right_output_image vote_type"),
    each(_pairs),
    ("TIGER-Lab/EditReward-Data",),
    "the parquet files can be read as they are",
)

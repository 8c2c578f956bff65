"""Pick-a-Pic, versions 1 and 2 (Kirstain et al. 2023, arXiv:2305.01569): parquet with the images inside.

`label_0` and `label_1` sum to 1; .5 is a tie.  A prompt with several comparisons weighs 1, as in PickScore's loss: each
comparison weighs 1/`num_example_per_prompt`.
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
    text,
    value_of,
)
from rsm_guidance.data.preferences.problems import BadRow, Reason
from rsm_guidance.data.preferences.record import Preference
from rsm_guidance.data.preferences.rows import Row


def _pairs(row: Row, how: Reading) -> Iterator[Preference]:
    if row.values.get("has_label") is False:
        raise BadRow(Reason.NO_LABEL)
    labels = [number(row.values.get(name), name) for name in ("label_0", "label_1")]
    if abs(sum(labels) - 1) > 1e-6:
        raise BadRow(Reason.BAD_LABEL, f"'label_0' and 'label_1' must sum to 1; got {labels}")
    count = row.values.get("num_example_per_prompt")
    yield Preference(
        text(row, "caption"),
        image(row, value_of(row, "jpg_0")),
        image(row, value_of(row, "jpg_1")),
        labels[0],
        weight=1 / number(count, "num_example_per_prompt") if count else 1.0,
        place=row.place,
        source="pick-a-pic",
        models=(optional(row, "model_0"), optional(row, "model_1")),
        ids={name: optional(row, name) for name in ("image_0_uid", "image_1_uid", "ranking_id", "user_id")},
    )


FORMAT = Format(
    "Pick-a-Pic: comparisons with the images inside",
    columns("caption label_0 label_1 jpg_0 jpg_1", "caption label_0 label_1 image_0_url image_1_url"),
    each(_pairs),
    ("yuvalkirstain/pickapic_v1", "yuvalkirstain/pickapic_v2"),
    "the parquet files can be read as they are",
)

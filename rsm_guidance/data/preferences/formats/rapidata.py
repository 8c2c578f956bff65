"""Votes collected by Rapidata, in the layout of 2024 (numbers of votes) and the later one (weighted results).

The label is the share of the votes; 50 : 50 is a tie.
"""

from collections.abc import Iterator

from rsm_guidance.data.preferences.formats.base import (
    Format,
    Reading,
    columns,
    each,
    image,
    optional,
    rated,
    share,
    text,
    value_of,
)
from rsm_guidance.data.preferences.record import Preference
from rsm_guidance.data.preferences.rows import Row

_VOTES = ("votes_image1", "votes_image2")
_WEIGHTED = ("weighted_results_image1_preference", "weighted_results_image2_preference")
_DIMENSIONS = ("preference", "coherence", "alignment")


def _pairs(row: Row, how: Reading) -> Iterator[Preference]:
    names = _WEIGHTED if _WEIGHTED[0] in row.values else _VOTES
    weighted = {d: (f"weighted_results_image1_{d}", f"weighted_results_image2_{d}") for d in _DIMENSIONS}
    yield Preference(
        text(row, "prompt"),
        image(row, value_of(row, "image1")),
        image(row, value_of(row, "image2")),
        share(row.values.get(names[0]), row.values.get(names[1]), " and ".join(names)),
        place=row.place,
        source="rapidata",
        models=(optional(row, "model1"), optional(row, "model2")),
        scores=rated(row, weighted),
    )


FORMAT = Format(
    "Rapidata: comparisons with votes and the images inside",
    columns(
        "prompt image1 image2 votes_image1 votes_image2",
        "prompt image1 image2 weighted_results_image1_preference weighted_results_image2_preference",
    ),
    each(_pairs),
    (
        "Rapidata/Flux_SD3_MJ_Dalle_Human_Preference_Dataset",
        "Rapidata/117k_human_alignment_flux1.0_V_flux1.1Pro",
        "Rapidata/HunyuanImage-2.1_t2i_human_preference",
    ),
    "the parquet files can be read as they are",
)

"""ImageRewardDB (Xu et al. 2023, arXiv:2304.05977): images of a prompt, ranked by experts, with ties and gaps.

Two layouts: one image a row (`images/<split>/<split>_N/<split>_N.json` beside the files; the paths in it may be out of date,
so that their base name counts), and one list a prompt (`generations`, `ranking`).
"""

from collections.abc import Iterable, Iterator
from itertools import groupby

from rsm_guidance.data.preferences.formats.base import (
    Format,
    Found,
    Reading,
    columns,
    each,
    image,
    number,
    optional,
    ranked,
    text,
    value_of,
)
from rsm_guidance.data.preferences.problems import BadRow, Problem, Reason
from rsm_guidance.data.preferences.record import Preference
from rsm_guidance.data.preferences.rows import Row

_RATINGS = {
    "overall": "overall_rating",
    "alignment": "image_text_alignment_rating",
    "fidelity": "fidelity_rating",
}


def _read(rows: Iterable[Row | Problem], how: Reading) -> Found:
    """One image a row: the rows of a prompt within a file make a list."""
    for _, of_file in groupby(rows, lambda row: None if isinstance(row, Problem) else row.file):
        prompts: dict[str, list[Row]] = {}
        for row in of_file:
            if isinstance(row, Problem):
                yield row
                continue
            try:
                number(value_of(row, "rank"), "rank")
                prompts.setdefault(f"{value_of(row, 'prompt_id')} {text(row, 'prompt')}", []).append(row)
            except BadRow as error:
                yield error.at(row.place)
        for group in prompts.values():
            try:
                yield from list(_list(group))
            except BadRow as error:
                yield error.at(group[0].place)


def _list(group: list[Row]) -> Iterator[Preference]:
    first = group[0]
    return ranked(
        first,
        text(first, "prompt"),
        [image(row, value_of(row, "image_path"), stale=True) for row in group],
        [number(row.values["rank"], "rank") for row in group],
        source="image-reward",
        category=optional(first, "classification"),
        ids={"prompt_id": optional(first, "prompt_id")},
        scores=[
            {name: float(row.values[c]) for name, c in _RATINGS.items() if isinstance(row.values.get(c), int | float)}
            for row in group
        ],
    )


def _lists(row: Row, how: Reading) -> Iterator[Preference]:
    generations, ranking = value_of(row, "generations"), value_of(row, "ranking")
    if not isinstance(generations, list) or not isinstance(ranking, list):
        raise BadRow(Reason.NO_FIELD, "'generations' and 'ranking' must be lists")
    images = [image(row, path, "images") for path in generations]
    ranks = [number(rank, "ranking") for rank in ranking]
    yield from ranked(
        row, text(row, "prompt"), images, ranks, source="image-reward", ids={"prompt_id": optional(row, "id")}
    )


HUB = ("THUDM/ImageRewardDB", "zai-org/ImageRewardDB")
IMAGES = Format(
    "ImageRewardDB: ranked images, one a row",
    columns("image_path prompt_id prompt rank"),
    _read,
    HUB,
    "unpack images/<split>/<split>_N.zip, each into a folder of its name",
)
LISTS = Format(
    "ImageReward: ranked lists, one a prompt",
    columns("prompt generations ranking"),
    each(_lists),
)

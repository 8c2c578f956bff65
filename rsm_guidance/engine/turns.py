"""Which rows go into which stock call."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Rows = tuple[int, ...]


@dataclass(frozen=True)
class Turn:
    """One stock call for some of the rows that were asked for.

    Attributes:
        rows: of the call.
        places: for each of these, which of the wanted rows it serves; -1 where it serves none.
        way: of asking for them; "" for the call itself.
    """

    rows: Rows
    places: tuple[int, ...]
    way: str

    def takes(self, x: Tensor) -> Tensor:
        """What of x [R, ...] the rows of the call are given; those that serve none get what another one gets."""
        return x if self.places == tuple(range(len(x))) else x[self.indices]

    @property
    def indices(self) -> list[int]:
        """Which of the wanted rows each row of the call is given."""
        return [max(self.places) if p < 0 else p for p in self.places]


def turns_of(rows: Rows, base: Rows, way: str) -> list[Turn]:
    """The calls that serve some rows together: one in a certain way, or, where that is "", the call of `base` several times."""
    if way:
        return [Turn(rows, tuple(range(len(rows))), way)]
    turns: list[dict[int, int]] = []
    seen = dict.fromkeys(base, 0)
    for place, row in enumerate(rows):
        if seen[row] == len(turns):
            turns.append({})
        turns[seen[row]][row] = place
        seen[row] += 1
    return [Turn(base, tuple(t.get(r, -1) for r in base), "") for t in turns]


def order_of(turns: Sequence[Turn], count: int) -> list[int]:
    """Where in the rows of all turns, one after the other, each of the wanted rows is."""
    places = [place for turn in turns for place in turn.places]
    return [places.index(i) for i in range(count)]


def for_places(generators: Sequence[torch.Generator], places: Sequence[int]) -> list[torch.Generator]:
    """Generators for the rows of a turn; one that serves twice is copied."""
    used: set[int] = set()
    chosen = []
    for place in places:
        generator = generators[place]
        if place in used:
            copy = torch.Generator(generator.device)
            copy.set_state(generator.get_state())
            generator = copy
        used.add(place)
        chosen.append(generator)
    return chosen

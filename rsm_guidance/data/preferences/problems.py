"""Why a row of preference data cannot be used: said with its place, counted by reason, never passed over in silence."""

from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum


class Reason(StrEnum):
    """What is wrong with a row or an image of it, in the words of reports."""

    MALFORMED = "malformed row"
    NO_FIELD = "missing field"
    NO_PROMPT = "no prompt"
    BAD_LABEL = "bad label"
    MISSING = "missing file"
    UNREADABLE = "unreadable file"
    NO_IMAGE = "not an image"
    DAMAGED = "damaged image"
    EXIF = "broken EXIF"
    TOO_LARGE = "image too large"
    IDENTICAL = "identical images"
    NOT_FINITE = "latents not finite"
    NO_LABEL = "no label"
    CONFIDENCE = "low confidence"
    DUPLICATE = "duplicate"

    @property
    def harmless(self) -> bool:
        """Whether the data are as they should be and the row is left out by rule."""
        return self in (Reason.NO_LABEL, Reason.CONFIDENCE, Reason.DUPLICATE)


@dataclass(frozen=True)
class Problem:
    """A row, or a pair of one, that cannot be used.

    Attributes:
        place: where it stands, such as "choices.csv, line 7".
        reason: what it is counted under.
        detail: the particulars, such as the path of a file.
    """

    place: str
    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}" + (f": {self.detail}" if self.detail else "")


class BadRow(ValueError):
    """Raised by readers for a row that is no preference; `at` makes the problem of it."""

    def __init__(self, reason: Reason, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail

    def at(self, place: str) -> Problem:
        """The problem that a row at this place has."""
        return Problem(place, self.reason, self.detail)


@dataclass
class Tally:
    """Counts problems by reason and keeps the first ones.

    Attributes:
        limit: how many are kept.
        counts: by reason.
        kept: the first ones; those left out by rule are counted only.
    """

    limit: int = 20
    counts: Counter[Reason] = field(default_factory=Counter)
    kept: list[Problem] = field(default_factory=list)

    def add(self, problem: Problem) -> None:
        """Count a problem."""
        self.counts[problem.reason] += 1
        if not problem.reason.harmless and len(self.kept) < self.limit:
            self.kept.append(problem)

    @property
    def unusable(self) -> int:
        """How many were counted, without those left out by rule."""
        return sum(count for reason, count in self.counts.items() if not reason.harmless)

    def __str__(self) -> str:
        return ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())

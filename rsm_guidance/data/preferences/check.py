"""A pass over preference data that says what is wrong with them, row by row, and what they hold."""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from rsm_guidance.data.preferences.problems import Problem, Reason, Tally
from rsm_guidance.data.preferences.read import PreferenceFiles
from rsm_guidance.data.preferences.record import Preference
from rsm_guidance.data.preferences.usable import Duplicates, decoded

CLIP_TOKENS = 77
_PIECE = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[^\W\d_]+|\d|(?:[^\s\w]|_)+", re.IGNORECASE)


@dataclass
class Report:
    """What `check_preferences` found.

    Attributes:
        data: what was read, in words.
        rows: rows read; of ranked images, one a prompt.
        unusable_rows: rows with at least one problem, without those left out by rule.
        usable: preferences that can be trained on.
        ties: those of them that prefer neither image.
        prompts: different prompts of them.
        images: different images of them.
        smallest: width and height of the smallest image, by area.
        largest: of the largest.
        problems: counted by reason, the first ones kept.
        too_long: prompts over the limit of tokens, and the place of the first.
        token_limit: that limit.
        labels: how often the first image, neither, and the second is preferred.
        unused: columns of one's own table that are not read.
    """

    data: str
    rows: int = 0
    unusable_rows: int = 0
    usable: int = 0
    ties: int = 0
    prompts: int = 0
    images: int = 0
    smallest: tuple[int, int] | None = None
    largest: tuple[int, int] | None = None
    problems: Tally = field(default_factory=Tally)
    too_long: tuple[int, str] | None = None
    token_limit: int = CLIP_TOKENS
    labels: Counter[str] = field(default_factory=Counter)
    unused: list[str] = field(default_factory=list)

    @property
    def exit_code(self) -> int:
        """0 if every row is usable or left out by rule, 1 if some are not, 2 if nothing is usable."""
        return 2 if not self.usable else 1 if self.problems.unusable else 0

    def notes(self) -> list[str]:
        """What is not wrong, and may surprise."""
        found = []
        if self.unused:
            found.append(f"columns that are not used: {', '.join(self.unused)}")
        if self.too_long is not None:
            count, place = self.too_long
            few = "1 prompt has" if count == 1 else f"{count} prompts have"
            found.append(
                f"{few} more than {self.token_limit} tokens, the first at {place}; the rest of them is cut off"
            )
        decided = sum(self.labels.values()) - self.labels["tie"]
        for label in ("first", "second"):
            if decided >= 20 and self.labels[label] == decided:
                found.append(f"the {label} image is preferred in every row; is that what the labels mean?")
        if self.usable and self.ties == self.usable:
            found.append("every preference is a tie; there is nothing to learn")
        return found


def check_preferences(
    data: PreferenceFiles,
    limit: int = 20,
    count_tokens: Callable[[str], int] | None = None,
    token_limit: int = CLIP_TOKENS,
    on_row: Callable[[], object] | None = None,
) -> Report:
    """Read all rows, decode all images, and count.

    Args:
        data: to be read.
        limit: problems to keep.
        count_tokens: tokens of a prompt with those that mark its ends; default: a lower bound for CLIP's tokenizer.
        token_limit: tokens that are read of a prompt.
        on_row: called for every row.
    """
    report = Report(str(data), problems=Tally(limit), token_limit=token_limit, unused=data.unused_columns())
    duplicates, prompts, images = Duplicates(), set[str](), set[str]()
    bad: str | None = None  # the last row with a problem: the pairs of a row share its place
    listed: set[tuple[str, str]] = set()

    def note(problem: Problem) -> None:
        nonlocal bad
        if not problem.reason.harmless and problem.place != bad:
            bad = problem.place
            report.unusable_rows += 1
            listed.clear()
        if (problem.reason, problem.detail) not in listed or problem.reason.harmless:
            report.problems.add(problem)
            listed.add((problem.reason, problem.detail))

    for found in decoded(_counted(data, report, on_row), note):
        p = found.preference
        met = duplicates.first(p.prompt, found.keys, p.place)
        if met is not None:
            note(Problem(p.place, Reason.DUPLICATE, f"of {met}"))
            continue
        report.usable += 1
        report.ties += p.tie
        report.labels["tie" if p.tie else "first" if p.probability > 0.5 else "second"] += 1
        if p.prompt not in prompts:
            prompts.add(p.prompt)
            if (count_tokens or fewest_tokens)(p.prompt) > token_limit:
                count, place = report.too_long or (0, p.place)
                report.too_long = count + 1, place
        images.update(found.keys)
        sizes = [image.size for image in found.images]
        report.smallest = min([*sizes, *([report.smallest] if report.smallest else [])], key=_area)
        report.largest = max([*sizes, *([report.largest] if report.largest else [])], key=_area)
    report.prompts, report.images = len(prompts), len(images)
    return report


def fewest_tokens(prompt: str) -> int:
    """The fewest tokens that CLIP's tokenizer can make of a prompt, with its two marks.

    It never joins words, digits and signs, so that each of them is a token at least.
    """
    return len(_PIECE.findall(prompt)) + 2


def _counted(
    data: PreferenceFiles, report: Report, on_row: Callable[[], object] | None
) -> Iterator[Preference | Problem]:
    """The records of the data; rows are counted as they pass."""
    place = None
    for record in data.records():
        if record.place != place:
            report.rows, place = report.rows + 1, record.place
            if on_row is not None:
                on_row()
        yield record


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]

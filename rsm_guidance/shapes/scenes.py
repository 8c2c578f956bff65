"""Scenes and captions of the shapes world: what can be asked for, in GenEval's six categories.

A *scene specification* says what a caption demands: groups of objects (how many, which colour, which shape) and at
most one spatial relation.  A colour or shape that is `None` is free.  Captions are drawn from a small grammar with
paraphrases, and `parse_caption` inverts it, so every caption of the grammar can be verified against an image.

The categories follow GenEval (Ghosh et al. 2023, arXiv 2310.11513): single object, two objects, counting, colours,
position, attribute binding.  The grammar, the colours and the shapes are ours.
"""

import hashlib
import itertools
import random
import re
from dataclasses import dataclass

from rsm_guidance.core.errors import UsageError

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (222, 45, 45),
    "green": (45, 165, 75),
    "blue": (55, 90, 225),
    "yellow": (240, 195, 30),
    "purple": (150, 60, 190),
    "cyan": (60, 200, 220),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross")
PLURALS: dict[str, str] = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
NUMBERS: tuple[str, ...] = ("one", "two", "three", "four")
RELATIONS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "on the right of"),
    "above": ("above", "on top of"),
    "below": ("below", "under"),
}
INVERSE: dict[str, str] = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PREFIXES: tuple[str, ...] = ("", "an image of ", "a picture of ", "a drawing of ", "there is ", "a photo of ")
CATEGORIES: tuple[str, ...] = ("single_object", "two_objects", "counting", "colors", "position", "attribute_binding")
MAX_OBJECTS = 5
HELD_OUT_PERCENT = 15
HELD_OUT_WORDING_PERCENT = 35  # single objects have few wordings


@dataclass(frozen=True)
class Group:
    """`count` objects (1 to 4) of one kind; `color` may be None, which leaves it free."""

    count: int
    color: str | None
    shape: str


@dataclass(frozen=True)
class SceneSpec:
    """What a caption demands: its groups, and `relation` between the first and the second group, if any."""

    groups: tuple[Group, ...]
    relation: str | None = None

    def canonical(self) -> "SceneSpec":
        """The same demand in one normal form, so that word order cannot leak a held-out composition."""
        if self.relation in ("right of", "below"):
            first, second = self.groups
            return SceneSpec((second, first), INVERSE[self.relation])
        if self.relation is None:
            return SceneSpec(tuple(sorted(self.groups, key=lambda g: (g.shape, g.color or "", g.count))))
        return self

    @property
    def category(self) -> str:
        """The GenEval category this demand belongs to."""
        if self.relation:
            return "position"
        if any(g.count > 1 for g in self.groups):
            return "counting"
        if len(self.groups) == 1:
            return "colors" if self.groups[0].color else "single_object"
        return "attribute_binding" if any(g.color for g in self.groups) else "two_objects"

    @property
    def total(self) -> int:
        return sum(g.count for g in self.groups)


@dataclass(frozen=True)
class Caption:
    """One sentence of the grammar and the demand it states."""

    text: str
    spec: SceneSpec

    @property
    def category(self) -> str:
        return self.spec.category


def _percent(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") % 100


def is_held_out(caption: Caption) -> bool:
    """Whether this caption belongs to the held-out split.

    The split is by *composition*: a held-out demand is never trained on in any wording.  A single object without a
    colour has no composition to hold out, so there the wording is split instead.
    """
    if caption.category == "single_object":
        return _percent("wording|" + caption.text) < HELD_OUT_WORDING_PERCENT
    spec = caption.spec.canonical()
    return _percent(f"composition|{spec.groups}|{spec.relation}") < HELD_OUT_PERCENT


# --- captions ---


def _noun_phrases(group: Group) -> list[str]:
    words = f"{group.color} " if group.color else ""
    if group.count > 1:
        return [f"{NUMBERS[group.count - 1]} {words}{PLURALS[group.shape]}"]
    return [f"{article} {words}{group.shape}" for article in ("a", "one")]


def wordings(spec: SceneSpec) -> list[str]:
    """Every sentence of the grammar that states `spec`, without prefixes doubling the list."""
    phrases = [_noun_phrases(g) for g in spec.groups]
    bodies: list[str] = []
    if len(phrases) == 1:
        bodies = list(phrases[0])
    elif spec.relation:
        for (first, second), (left, right, relation) in itertools.product(
            itertools.product(*phrases), ((0, 1, spec.relation), (1, 0, INVERSE[spec.relation]))
        ):
            pair = (first, second)
            bodies += [f"{pair[left]} {r} {pair[right]}" for r in RELATIONS[relation]]
    else:
        for first, second in itertools.product(*phrases):
            bodies += [f"{a} {joint} {b}" for a, b in ((first, second), (second, first)) for joint in ("and", "with")]
    return [prefix + body for prefix in PREFIXES for body in bodies]


_COUNT_WORDS = {"a": 1, "an": 1, **{word: i + 1 for i, word in enumerate(NUMBERS)}}
_SHAPE_WORDS = {shape: shape for shape in SHAPES} | {plural: shape for shape, plural in PLURALS.items()}
_RELATION_WORDS = {words: name for name, ways in RELATIONS.items() for words in ways}
_JOINT = re.compile(
    r"\s+(" + "|".join(sorted(map(re.escape, _RELATION_WORDS), key=len, reverse=True)) + r"|and|with)\s+"
)


def parse_caption(text: str) -> Caption:
    """The demand a caption states.

    Raises:
        ValueError: when the sentence is not of the grammar, naming the part that cannot be read.
    """
    body = re.sub(r"\s+", " ", text.strip().lower().rstrip("."))
    for prefix in PREFIXES[1:]:
        body = body.removeprefix(prefix.strip() + " ")
    parts = _JOINT.split(body)
    if len(parts) not in (1, 3):
        raise UsageError(
            f"cannot verify the caption {text!r}: at most two kinds of objects and one relation can be read"
        )
    groups = tuple(_parse_group(part, text) for part in parts[::2])
    spec = SceneSpec(groups, _RELATION_WORDS.get(parts[1]) if len(parts) == 3 else None)
    if spec.relation and any(g.count > 1 for g in groups):
        raise UsageError(f"cannot verify the caption {text!r}: a position is read between two single objects only")
    return Caption(text, spec)


def _parse_group(phrase: str, text: str) -> Group:
    words = phrase.split()
    count = _COUNT_WORDS.get(words[0]) if words else None
    shape = _SHAPE_WORDS.get(words[-1]) if words else None
    if count is None or shape is None or len(words) > 3 or (len(words) == 3 and words[1] not in COLORS):
        raise UsageError(
            f"cannot verify the caption {text!r}: {phrase!r} is not '<a|one|two|three|four> [colour] <shape>' "
            f"with a colour of {', '.join(COLORS)} and a shape of {', '.join(SHAPES)}"
        )
    return Group(count, words[1] if len(words) == 3 else None, shape)


# --- drawing specifications ---


def _other(rng: random.Random, options: tuple[str, ...] | list[str], taken: str | None) -> str:
    return rng.choice([o for o in options if o != taken])


def random_spec(category: str, rng: random.Random) -> SceneSpec:
    """A demand of one category, drawn with `rng`; objects of one scene always differ in shape."""
    colors = list(COLORS)
    shape = rng.choice(SHAPES)
    other = _other(rng, SHAPES, shape)
    if category == "single_object":
        return SceneSpec((Group(1, None, shape),))
    if category == "colors":
        return SceneSpec((Group(1, rng.choice(colors), shape),))
    if category == "two_objects":
        return SceneSpec((Group(1, None, shape), Group(1, None, other)))
    if category == "counting":
        count = rng.randint(2, 4)
        color = rng.choice(colors) if rng.random() < 0.8 else None
        if rng.random() < 0.5:
            return SceneSpec((Group(count, color, shape),))
        color = color or rng.choice(colors)
        second = rng.randint(1, MAX_OBJECTS - count) if count < 4 else 1
        return SceneSpec((Group(count, color, shape), Group(min(second, 2), _other(rng, colors, color), other)))
    color = rng.choice(colors)
    pair = (Group(1, color, shape), Group(1, _other(rng, colors, color), other))
    if category == "attribute_binding":
        return SceneSpec(pair)
    if category == "position":
        if rng.random() < 0.4:
            pair = (Group(1, None, shape), Group(1, None, other))
        return SceneSpec(pair, rng.choice(list(RELATIONS)))
    raise ValueError(f"unknown category {category!r}; choose one of {', '.join(CATEGORIES)}")


def random_caption(category: str, rng: random.Random, held_out: bool = False) -> Caption:
    """A caption of the training split (or of the held-out one), drawn with `rng`."""
    while True:
        spec = random_spec(category, rng)
        caption = Caption(rng.choice(wordings(spec)), spec)
        if is_held_out(caption) == held_out:
            return caption


def caption_set(
    size: int, seed: int = 0, held_out: bool = True, categories: tuple[str, ...] = CATEGORIES
) -> list[Caption]:
    """`size` *unique* captions, balanced over the categories as far as their vocabulary reaches, in a fixed order.

    A single object has few wordings; what it cannot fill goes to the other categories.

    Raises:
        ValueError: if so many unique captions do not exist.
    """
    rng = random.Random(f"captions|{seed}|{held_out}")
    chosen: dict[str, Caption] = {}
    drained: set[str] = set()
    while len(chosen) < size:
        for category in categories:
            if category in drained or len(chosen) >= size:
                continue
            for _ in range(400):
                caption = random_caption(category, rng, held_out)
                if caption.text not in chosen:
                    chosen[caption.text] = caption
                    break
            else:
                drained.add(category)
        if len(drained) == len(categories):
            raise ValueError(f"only {len(chosen)} unique captions exist in this split, {size} were asked for")
    return list(chosen.values())


def vocabulary() -> list[str]:
    """Every word of the grammar, sorted."""
    words = set(NUMBERS) | set(COLORS) | set(_SHAPE_WORDS) | {"a", "an", "and", "with"}
    for phrase in (*PREFIXES, *_RELATION_WORDS):
        words |= set(phrase.split())
    return sorted(words)

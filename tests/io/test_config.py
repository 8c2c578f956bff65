"""Text into dataclasses: what fits is taken with the right type, and what does not is named."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.transitions import CPS, ODE, Transition
from rsm_guidance.io.config import check_options, read_config, read_yaml


@dataclass(frozen=True)
class Inner:
    chains: int = 2
    rate: float = 1e-3

    def __post_init__(self) -> None:
        if self.chains < 1:
            raise ValueError(f"chains must be at least 1; got {self.chains}")


@dataclass(frozen=True)
class Outer:
    out: Path = Path("x")
    count: int = 1
    share: float = 1.0
    quick: bool = False
    name: str | None = None
    window: tuple[float, float] = (0.0, 1.0)
    names: tuple[str, ...] = ()
    kind: Literal["max", "sum"] = "max"
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    transition: Transition = CPS(0.9)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("out", "a/b", Path("a/b")),
        ("count", 3, 3),
        ("share", 1, 1.0),
        ("share", float("inf"), float("inf")),
        ("quick", True, True),
        ("name", None, None),
        ("window", [0, 1], (0.0, 1.0)),
        ("window", (0, 0.5), (0.0, 0.5)),
        ("names", ["a", "b"], ("a", "b")),
        ("kind", "sum", "sum"),
        ("inner", {"chains": 3}, Inner(3)),
        ("inner", Inner(4), Inner(4)),
        ("maybe", {"chains": 5, "rate": 1}, Inner(5, 1.0)),
        ("maybe", None, None),
        ("transition", "ode", ODE()),
        ("transition", "cps 0.5", CPS(0.5)),
        ("transition", CPS(0.1), CPS(0.1)),
    ],
)
def test_what_fits_is_taken_with_the_fields_type(option: str, value: Any, expected: Any) -> None:
    found = check_options(Outer, {option: value})[option]
    assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("count", "3", "cannot take count='3': it must be a whole number"),
        ("count", 1.0, "must be a whole number"),
        ("count", True, "must be a whole number"),
        ("count", float("inf"), "must be a whole number"),
        ("share", "1", "must be a number"),
        ("share", True, "must be a number"),
        ("quick", 1, "must be true or false"),
        ("name", 5, "must be a text or null"),
        ("window", [0, 1, 2], r"must be \[a number, a number\]"),
        ("window", [0, "a"], r"must be \[a number, a number\]"),
        ("names", "a", "must be a list, each a text"),
        ("kind", "mean", "must be one of 'max', 'sum'"),
        ("inner", 3, "must be an Inner"),
        ("maybe", "abc", "must be an Inner or null"),
        ("inner", {"chainz": 3}, "has no option 'inner.chainz'; it takes chains, rate"),
        ("inner", {"chains": "x"}, "cannot take inner.chains='x'"),
        ("inner", {"chains": 0}, "chains must be at least 1; got 0"),
        ("out", 3, "must be a path"),
        ("transition", "walk", "unknown transition 'walk'"),
        ("transition", 3, "must be a Transition"),
        ("other", 3, "has no option 'other'; it takes count, inner"),
    ],
)
def test_what_does_not_fit_is_named(option: str, value: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        check_options(Outer, {option: value}, "the sampler 'outer'")
    assert str(error.value).startswith("the sampler 'outer'")


def test_a_file_is_read_into_nested_dataclasses(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(
        "count: 3\nshare: 1e-3\ninner:\n  rate: 2\nnames: [a, b]\nout: somewhere\ntransition: flow_sde 0.7\n"
    )
    assert read_config(path, Outer) == Outer(
        Path("somewhere"), 3, 1e-3, names=("a", "b"), inner=Inner(rate=2.0), transition=Transition("flow_sde", 0.7)
    )
    for text, words in (
        ("[1]", "must be a mapping of options; got list"),
        ("", "must be a mapping of options; got NoneType"),
        ("a: {", "is not YAML"),
        ("inner:\n  chains: no\n", "cannot take inner.chains='no': it must be a whole number"),
        ("inner:\n  chains: -1\n", "chains must be at least 1; got -1"),
    ):
        path.write_text(text)
        with pytest.raises(UsageError, match=words) as error:
            read_config(path, Outer)
        assert str(path) in str(error.value)
    with pytest.raises(UsageError, match="cannot read the configuration"):
        read_config(tmp_path / "gone.yaml", Outer)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="is not YAML"):
        read_config(path, Outer)


def test_numbers_with_exponents_are_numbers() -> None:
    assert read_yaml("[1e-3, 1e3, .5e2, 1.e5, -2E+1]") == [1e-3, 1e3, 50.0, 1e5, -20.0]
    assert read_yaml("[1e, e3, 1.2.3, 12]") == ["1e", "e3", "1.2.3", 12]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1.e+3", 1e3), ("-.5E2", -50.0), ("12", 12), ("012", 12), ("0x1f", 31), (".inf", float("inf")),
        ("no", "no"), ("off", "off"), ("Yes", "Yes"), ("y", "y"), ("true", True), ("False", False), ("null", None), ("~", None),
        ("1:30", "1:30"), ("2024-01-02", "2024-01-02"), ("1_000", "1_000"), ("'5'", "5"), ("1.5", 1.5), ("e5", "e5"),
    ],
)  # fmt: skip
def test_words_are_words_and_numbers_numbers(text: str, value: Any) -> None:
    found = read_yaml(f"a: {text}")["a"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chains: 3", "no option 'chains'; did you mean 'inner.chains'?"),
        ("inner:\n  count: 3", "no option 'inner.count'; did you mean 'count'?"),
        ("inner:\n  chians: 3", "no option 'inner.chians'; did you mean 'inner.chains'?"),
        ("cuont: 3", "no option 'cuont'; did you mean 'count'?"),
        ("other:\n  count: 3", "no option 'other'; it takes count"),
        ("zzz: 3", "no option 'zzz'; it takes count, inner"),
    ],
)
def test_an_unknown_or_misplaced_option_is_named_with_the_nearest_path(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(UsageError) as error:
        read_config(tmp_path / "c.yaml", Outer)
    assert words in str(error.value)

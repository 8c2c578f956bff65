"""Configuration from text: YAML into frozen dataclasses, and options checked against the fields of one.

Types are strict, as YAML writes them: "5" is no number, 1.5 no whole number and `true` neither; lists are tuples, text is
a path or a transition where the field is one.
"""

import dataclasses
import difflib
import functools
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import ConfigDict, InstanceOf, TypeAdapter, ValidationError

from rsm_guidance.core.errors import UsageError
from rsm_guidance.io.files import read_text

T = TypeVar("T")

_TRANSITIONS = "rsm_guidance.core.transitions"
_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    Path: "a path",
    type(None): "null",
}


def read_config(path: Path, cls: type[T]) -> T:
    """The dataclass that a YAML file describes; options that it leaves out keep their defaults.

    Args:
        path: a mapping from the names of fields, with `-` or `_`, to their values; a nested dataclass is a mapping in it.
        cls: a dataclass.

    Raises:
        UsageError: if the file cannot be read, is no mapping, or holds an option or a value that the dataclass does not take.
    """
    return build_config(cls, read_mapping(path), f"the configuration {path}")


def read_mapping(path: Path) -> dict[str, Any]:
    """The options of a YAML file, unchecked.

    Raises:
        UsageError: if the file cannot be read or is no mapping.
    """
    subject = f"the configuration {path}"
    try:
        data = read_yaml(read_text(path))
    except RecursionError as error:
        raise UsageError(f"{subject} is nested too deeply") from error
    except OSError as error:
        raise UsageError(f"cannot read {subject}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{subject} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{subject} must be a mapping of options; got {type(data).__name__}")
    return data


def build_config(cls: type[T], options: Mapping[str, Any], subject: str) -> T:
    """The dataclass that nested options describe; `subject` is what errors call them.

    Raises:
        UsageError: for an option or a value that the dataclass does not take.
    """
    _require_known(cls, options, subject)
    return _built(cls, options, subject, "")


def _require_known(cls: type[Any], data: Mapping[str, Any], subject: str) -> None:
    """Raise a UsageError that names the first option which does not exist, and the one that is probably meant."""
    known = _paths(cls)
    for path in _given(data):
        if path in known or any(path.startswith(f"{other}.") for other, nested in known.items() if not nested):
            continue
        level = path.rpartition(".")[0]
        if level and level not in known:
            continue  # its parent has been named, or is no mapping
        leaf = path.rpartition(".")[2]
        meant = [other for other in known if other.rpartition(".")[2] == leaf] or difflib.get_close_matches(
            path, known, 1, 0.75
        )
        if not meant:
            similar = difflib.get_close_matches(leaf, [other.rpartition(".")[2] for other in known], 1, 0.75)
            meant = [other for other in known if other.rpartition(".")[2] in similar]
        hint = f"; did you mean {meant[0]!r}?" if meant else ""
        takes = sorted(n.rpartition(".")[2] for n in known if n.rpartition(".")[0] == level)
        raise UsageError(f"{subject} has no option {path!r}{hint or ';'} it takes {', '.join(takes)}")


def _paths(cls: type[Any], place: str = "") -> dict[str, bool]:
    """The options of a dataclass by dotted name, and whether each holds further ones."""
    found: dict[str, bool] = {}
    for name, hint in get_type_hints(cls).items():
        choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        nested = next((c for c in choices if dataclasses.is_dataclass(c)), None)
        found[place + name] = nested is not None
        if nested is not None:
            found |= _paths(nested, f"{place}{name}.")  # type: ignore[arg-type]
    return found


def _given(data: Mapping[str, Any], place: str = "") -> Iterator[str]:
    """Options by dotted name, the outer ones first."""
    named = [(place + str(name).replace("-", "_"), value) for name, value in data.items()]
    yield from (path for path, _ in named)
    for path, value in named:
        if isinstance(value, Mapping):
            yield from _given(value, f"{path}.")


def check_options(cls: type[Any], options: Mapping[str, Any], subject: str | None = None) -> dict[str, Any]:
    """The options with which a dataclass can be made, of the types that its fields ask for.

    Lists become tuples, whole numbers become numbers, mappings become nested dataclasses and text becomes a path or a
    transition, where the field is one.

    Args:
        cls: a dataclass.
        options: some of its fields, by name.
        subject: what is configured, as errors call it; default: the name of the class.

    Raises:
        UsageError: naming the field, the value and what is expected.
    """
    return _checked(cls, options, subject or cls.__name__, "")


def read_yaml(text: str) -> Any:
    """YAML with the numbers and words of YAML 1.2: `1e-3` is a number, `no`, `on` and `1:30` are words.

    Raises:
        yaml.YAMLError: if it is none.
    """
    return yaml.load(text, _Loader)  # noqa: S506 - a safe loader


def read_options(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of "name:field=value:field=value".

    Values are YAML.  A colon ends no field inside quotes or brackets, nor inside a value such as http://host:80 or cuda:1.

    Raises:
        UsageError: for text that sets nothing or cannot be read.
    """
    name, *settings = _parts(text)
    return name.strip(), dict(read_setting(setting, f" in {text!r}") for setting in settings)


def read_setting(text: str, where: str = "") -> tuple[str, Any]:
    """The field and the value, YAML, of "field=value".

    Raises:
        UsageError: for text that sets nothing or cannot be read; `where` ends its subject.
    """
    field, equals, value = text.partition("=")
    if not equals or not field.strip():
        raise UsageError(f"{text!r}{where} sets nothing; write field=value")
    try:
        return field.strip(), read_yaml(value)
    except yaml.YAMLError as error:
        raise UsageError(f"cannot read {value!r}{where or f' of {text!r}'}") from error


_INSIDE = re.compile(r":(//|\d+(?![^:/\s]))")
"""A colon of an address or a device: before `//`, or before a number that ends there."""


def _parts(text: str) -> list[str]:
    """Text between colons that end a field."""
    return split_outside(text, ":", lambda part, index: not ("=" in part and _INSIDE.match(text, index)))


def split_outside(text: str, separator: str, ends: Callable[[str, int], bool] = lambda part, index: True) -> list[str]:
    """Text between separators that stand neither in quotes nor in brackets; quotes that are never closed are letters.

    Args:
        text: any.
        separator: one or more letters.
        ends: of the part so far and the separator's place, whether the part ends there.
    """
    parts, depth, quote, index = [""], 0, "", 0
    while index < len(text):
        letter = text[index]
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "\"'" and letter in text[index + 1 :]:
            quote = letter
        elif letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        elif depth <= 0 and text.startswith(separator, index) and ends(parts[-1], index):
            parts.append("")
            index += len(separator)
            continue
        parts[-1] += letter
        index += 1
    return parts


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the truth values and numbers of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, Any] = {}


for _kind, _pattern, _starts in (
    ("bool", r"(true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"([-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", "-+0123456789"),
    (
        "float",
        r"([-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$",
        "-+.0123456789",
    ),
    ("null", r"(~|null|Null|NULL|)$", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(_pattern), list(_starts))


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    return int(text, 0 if text[:2] in ("0o", "0x") else 10)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)


def _built(cls: type[T], data: Mapping[str, Any], subject: str, place: str) -> T:
    """The dataclass with checked options; `place` is the dotted path to it, with a dot at its end."""
    options = _checked(cls, data, subject, place)
    try:
        return cls(**options)
    except UsageError:
        raise
    except (TypeError, ValueError) as error:
        raise UsageError(f"{subject}: {error}") from error


def _checked(cls: type[Any], options: Mapping[str, Any], subject: str, place: str) -> dict[str, Any]:
    known = {f.name for f in dataclasses.fields(cls) if f.init}
    given = {str(name).replace("-", "_"): value for name, value in options.items()}
    unknown = sorted(given.keys() - known)
    if unknown:
        raise UsageError(f"{subject} has no option {place + unknown[0]!r}; it takes {', '.join(sorted(known))}")
    hints = get_type_hints(cls)
    return {name: _value(hints[name], value, subject, place + name) for name, value in given.items()}


def _value(hint: Any, value: Any, subject: str, place: str) -> Any:
    """One option as its field asks for it."""
    choices = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, Mapping):
        nested: Any = next((c for c in choices if dataclasses.is_dataclass(c)), None)
        if nested is not None:
            return _built(nested, value, subject, place + ".")
    if isinstance(value, str) and any(getattr(c, "__module__", None) == _TRANSITIONS for c in choices):
        from rsm_guidance.core.transitions import parse_transition  # imports torch, which few configurations need

        try:
            value = parse_transition(value)
        except ValueError as error:
            raise UsageError(f"{subject}: {place}: {error}") from error
    try:
        return _adapted(hint, value)
    except ValidationError as error:
        raise UsageError(f"{subject} cannot take {place}={value!r}: it must be {described(hint)}") from error


def _adapted(hint: Any, value: Any) -> Any:
    """A value as it is, if it is of the type, else as JSON would write it: lists for tuples, text for paths."""
    adapter = _adapter(hint)
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError:
        try:
            text = json.dumps(value)
        except (TypeError, ValueError):
            text = None
        if text is None:
            raise
        return adapter.validate_json(text, strict=True)


@functools.cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    """pydantic's check of a type; classes that it does not know are checked by `isinstance`."""
    if dataclasses.is_dataclass(hint):  # made of mappings before this, and pydantic takes no configuration for them
        return TypeAdapter(InstanceOf[hint])  # type: ignore[valid-type]
    return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))


def described(hint: Any) -> str:
    """A type in words, as errors say it: "a whole number or null"."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(map(described, inside))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inside))
    if origin is tuple and len(inside) == 2 and inside[1] is ...:
        return f"a list, each {described(inside[0])}"
    if origin is tuple:
        return "[" + ", ".join(map(described, inside)) + "]"
    name = str(getattr(hint, "__name__", hint))
    return _WORDS.get(hint) or f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"

"""Configuration from text: YAML into frozen dataclasses, and options checked against the fields of one.

Types are strict, as YAML writes them: "5" is no number, 1.5 no whole number and `true` neither; lists are tuples, text is
a path or a transition where the field is one.
"""

import dataclasses
import functools
import json
import re
import types
from collections.abc import Mapping
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
    subject = f"the configuration {path}"
    try:
        data = read_yaml(read_text(path))
    except OSError as error:
        raise UsageError(f"cannot read {subject}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{subject} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise UsageError(f"{subject} must be a mapping of options; got {type(data).__name__}")
    return _built(cls, data, subject, "")


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
    """YAML in which `1e-3` is a number, as in YAML 1.2 and Python.

    Raises:
        yaml.YAMLError: if it is none.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 - a safe loader
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the numbers of YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


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

"""Reads configurations of `rsm-guidance train align`: a preset, a file, or a file over a preset.

A file may name a preset and change some of it:

    preset: ram
    form: {temperature: 0.5}
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from rsm_guidance.core.errors import UsageError
from rsm_guidance.io.config import build_config, read_mapping, read_yaml
from rsm_guidance.training.alignment.config import AlignConfig

BARE = {
    "beta": "form.nft_strength (NFT), form.implicit_strength (CRD, DGPO, DPO, GDRO, PRDP, LPO) or trust.reference_weight (the "
    "hold to the reference)",
    "kl": "trust.reference_weight with trust.reference (velocity or mean) and, for mean, trust.denominator",
    "eta": "rollout.transition (noise) or estimator.eta (the bonus of turning points)",
}
"""Names that published programs use for different things, and what they are called here."""

_ALIASES = {
    "kl_beta": "kl",
    "kl_coef": "kl",
    "kl_weight": "kl",
    "beta_kl": "kl",
    "nft_beta": "beta",
    "dpo_beta": "beta",
}


def presets() -> dict[str, str]:
    """The text of every preset by name."""
    folder = files("rsm_guidance.training.alignment").joinpath("presets")
    found = [f for f in folder.iterdir() if f.name.endswith(".yaml")]
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in sorted(found, key=lambda f: f.name)}


def preset(name: str) -> dict[str, Any]:
    """The options of a preset.

    Raises:
        UsageError: if there is none of that name.
    """
    known = presets()
    if not isinstance(name, str) or name not in known:
        raise UsageError(f"there is no preset {name!r}; choose one of {', '.join(known)}")
    return dict(read_yaml(known[name]))


def required_of(path: Path | None = None, name: str | None = None) -> tuple[str, ...]:
    """Settings, by dotted name, that a preset or file leaves open."""
    given = {} if path is None else read_mapping(path)
    chosen = name or given.get("preset")
    asked = (preset(chosen) if chosen else {}) | given
    found = asked.get("required") or ()
    return tuple(map(str, found)) if isinstance(found, list | tuple) else ()


def read_align(
    path: Path | None = None, name: str | None = None, options: Mapping[str, Any] | None = None
) -> AlignConfig:
    """The configuration of a file, over the preset that it or `name` names, with further options over both.

    Args:
        path: a YAML file.
        name: a preset; it wins over the file's.
        options: nested as in a file.

    Raises:
        UsageError: if a file or a setting cannot be read, has no meaning, or one that is required is missing.
    """
    subject, given = f"the preset {name!r}", {}
    if path is not None:
        subject, given = f"the configuration {path}", read_mapping(path)
    chosen = name or given.pop("preset", None)
    given.pop("preset", None)
    merged = merge(merge(preset(chosen) if chosen else {}, given), options or {})
    _refuse_bare(merged, subject)
    _require_given(merged, subject)
    return build_config(AlignConfig, merged, subject)


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `base`, with those of `over` in their place; mappings are merged, all else is replaced."""
    found = dict(base)
    for key, value in over.items():
        key, before = key.replace("-", "_"), base.get(key.replace("-", "_"))
        both = isinstance(value, Mapping) and isinstance(before, Mapping)
        found[key] = merge(before, value) if both else value  # type: ignore[arg-type]
    return found


def _refuse_bare(options: Mapping[str, Any], subject: str, place: str = "") -> None:
    for key, value in options.items():
        bare = _ALIASES.get(key, key)
        if bare in BARE and (place, key) != ("estimator.", "eta"):
            raise UsageError(
                f"{subject} sets {place + key!r}, which means different things in different methods: say {BARE[bare]}"
            )
        if isinstance(value, Mapping):
            _refuse_bare(value, subject, f"{place}{key}.")


def _require_given(options: Mapping[str, Any], subject: str) -> None:
    """Raise a UsageError that names all settings that are required and missing."""
    asked, missing = options.get("required"), []
    for path in asked if isinstance(asked, list | tuple) else ():
        value: Any = options
        for name in str(path).split("."):
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is None:
            missing.append(str(path))
    if missing:
        raise UsageError(
            f"{subject} needs {' and '.join(missing)}: the paper publishes no value, so it must be chosen for the reward at hand"
        )

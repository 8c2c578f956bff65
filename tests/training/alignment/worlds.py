"""Presets with a value for what they leave open."""

from typing import Any

from rsm_guidance.training.alignment.read import merge, preset

OPEN: dict[str, Any] = {
    "estimator.discount": 0.9,
    "advantage.absolute": 0.5,
    "reward_sign": "positive",
    "rollout.noise_slope": 0.5,
    "form.implicit_strength": 1.0,
    "form.temperature": 0.5,
    "form.levels": 4,
    "form.lowest": 0.5,
    "trust.clip": 0.1,
    "trust.gate": 0.1,
    "trust.gate_rewards": ["other"],
}
"""Values for what presets leave open."""


def nested(path: str, value: Any) -> dict[str, Any]:
    *outer, last = path.split(".")
    found: dict[str, Any] = {last: value}
    for name in reversed(outer):
        found = {name: found}
    return found


def chosen(name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for path in preset(name).get("required", ()):
        found = merge(found, nested(path, OPEN[path]))
    return found

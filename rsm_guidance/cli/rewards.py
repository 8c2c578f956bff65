"""The command `rewards`: what scores images here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from rsm_guidance.cli.options import say
from rsm_guidance.core.errors import UsageError

if TYPE_CHECKING:
    from rsm_guidance.rewards.builtin import BuiltInReward

_SHAPES = {
    "shapes-drm": "diffusion reward model of the embedded model; scores noisy latents too",
    "shapes-verifier": "share of a caption's demands that the image meets, by reading the finished image",
    "shapes-correct": "1 where the image meets all demands of the caption, else 0",
}
_FURTHER = """\
Options follow a name, as in hpsv2:version=v2.0:dtype=bfloat16:device=cuda:1; `rsm-guidance rewards NAME` lists them.
Besides these names, --reward takes the folder or hub id of a diffusion reward model, package.module:object for a function
(images [B, 3, H, W] in [0, 1], prompts) -> scores [B], and weighted sums such as "shapes-drm + 0.5 * my_module:sharpness"."""


@dataclass(frozen=True)
class Rewards:
    """List the rewards that have names, with what each needs.

    rsm-guidance rewards

    rsm-guidance rewards hpsv2
    """

    name: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[NAME]")] = None
    """One of them, for its options."""
    json: bool = False
    """Print one JSON object per reward."""

    def run(self) -> None:
        from rsm_guidance.rewards import REWARDS

        if self.name is not None and self.name not in REWARDS:
            raise UsageError(f"there is no reward {self.name!r}; choose one of {', '.join(REWARDS)}")
        found = [facts_of(name) for name in REWARDS if self.name in (None, name)]
        if self.json:
            for facts in found:
                say(facts)
            return
        width = max(len(facts["name"]) for facts in found)
        for facts in found:
            print(f"{facts['name']:{width}}  {facts['about']}")
            print(f"{'':{width}}  {_details(facts)}")
            for option, default in facts["options"].items() if self.name else ():
                print(f"{'':{width}}    {option}={default}")
        if self.name is None:
            print("\n" + _FURTHER)


def facts_of(name: str) -> dict[str, Any]:
    """What a reward says of itself; JSON, with null where a range has no bound."""
    from rsm_guidance.rewards import built_in

    reward: BuiltInReward | None = built_in(name)
    if reward is None:
        drm = name == "shapes-drm"
        return {
            "name": name,
            "about": _SHAPES[name],
            "range": [None, None] if drm else [0.0, 1.0],
            "differentiable": drm,
            "reads_prompt": True,
            "requires": [],
            "needs": "nothing",
            "options": {},
        }
    return {
        "name": name,
        "about": reward.about,
        "range": [bound if math.isfinite(bound) else None for bound in reward.range],
        "differentiable": reward.differentiable,
        "reads_prompt": reward.reads_prompt,
        "requires": list(reward.requires),
        "needs": reward.needs,
        "options": {f.name: getattr(reward, f.name) for f in dataclasses.fields(reward)},
    }


def _details(facts: dict[str, Any]) -> str:
    """Range, gradient, what it reads and needs, in one line."""
    low, high = (
        sign if bound is None else f"{bound:g}" for sign, bound in zip(("-inf", "inf"), facts["range"], strict=True)
    )
    parts = [
        f"range {low} to {high}",
        "differentiable" if facts["differentiable"] else "no gradient",
        "reads the prompt" if facts["reads_prompt"] else "reads no prompt",
        *(f"column {column!r}" for column in facts["requires"]),
        f"needs {facts['needs']}",
    ]
    return "; ".join(parts)

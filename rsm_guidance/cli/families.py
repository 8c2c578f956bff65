"""The command `families`: what is supported, and whether a given pipeline is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from diffusers import SchedulerMixin


@dataclass(frozen=True)
class Families:
    """List the documented pipeline families, or say what a given pipeline can do.

    rsm-guidance families

    rsm-guidance families path/to/pipeline

    rsm-guidance families stabilityai/stable-diffusion-3.5-medium
    """

    pipeline: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[MODEL]")] = None
    """Folder or hub id to probe; only its configuration is read."""

    def run(self) -> None:
        from rsm_guidance.pipelines.catalog import FAMILIES

        if self.pipeline is None:
            width = max(map(len, FAMILIES))
            print("\n".join(f"{name:{width}}  {f.title} ({f.pipeline})" for name, f in FAMILIES.items()))
        else:
            print("\n".join(probe(self.pipeline)))


def probe(model: str) -> list[str]:
    """What a pipeline folder, hub repository or packaged model can do here, line by line.

    Raises:
        UsageError: if it is no pipeline, or one that diffusers does not export.
    """
    from rsm_guidance.engine.families import why_not
    from rsm_guidance.engine.schedulers import refusal
    from rsm_guidance.io.names import model_location
    from rsm_guidance.pipelines.auto import stock_class
    from rsm_guidance.pipelines.catalog import FAMILIES

    location = model_location(model)
    cls, config = stock_class(location)
    name = cls.__name__
    reason = why_not(cls)
    if reason is not None:
        return [f"{name}: cannot be guided: {reason}"]
    shims = [f"custom_pipeline({n!r})" for n, f in FAMILIES.items() if f.pipeline == name]
    lines = [f"{name}: can be guided, as {' or '.join(shims) if shims else f'reward_guided({name})'}"]
    scheduler = _scheduler(location, config.get("scheduler"))
    if scheduler is not None:
        why = refusal(scheduler)
        every = "every sampler" if why is None else "none and best-of-n with the transition 'scheduler'"
        lines.append(f"{type(scheduler).__name__}: {every}" + ("" if why is None else f" ({why})"))
    return lines


def _scheduler(model: str, entry: list[str] | None) -> SchedulerMixin | None:
    import diffusers

    cls = getattr(diffusers, str(entry[1]), None) if entry else None
    if cls is None:
        return None
    loaded: SchedulerMixin = cls.from_pretrained(model, subfolder="scheduler")
    return loaded

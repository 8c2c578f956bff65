"""The command `families`: what is supported, and whether a given pipeline is."""

from dataclasses import dataclass

import diffusers
import tyro
from diffusers import SchedulerMixin

from rsm_guidance.engine.families import why_not
from rsm_guidance.engine.schedulers import refusal
from rsm_guidance.pipelines.auto import stock_class
from rsm_guidance.pipelines.families import FAMILIES


@dataclass(frozen=True)
class Families:
    """List the documented pipeline families, or say what a given pipeline can do.

    rsm-guidance families

    rsm-guidance families path/to/pipeline

    rsm-guidance families stabilityai/stable-diffusion-3.5-medium
    """

    pipeline: tyro.conf.Positional[str | None] = None
    """Folder or hub id to probe; only its configuration is read."""

    def run(self) -> None:
        if self.pipeline is None:
            width = max(map(len, FAMILIES))
            print("\n".join(f"{name:{width}}  {f.title} ({f.pipeline})" for name, f in FAMILIES.items()))
        else:
            print("\n".join(probe(self.pipeline)))


def probe(model: str) -> list[str]:
    """What a pipeline folder or hub repository can do here, line by line.

    Raises:
        ValueError: if it is no pipeline, or one that diffusers does not export.
    """
    cls, config = stock_class(model)
    name = cls.__name__
    reason = why_not(cls)
    if reason is not None:
        return [f"{name}: cannot be guided: {reason}"]
    shims = [f"custom_pipeline({n!r})" for n, f in FAMILIES.items() if f.pipeline == name]
    lines = [f"{name}: can be guided, as {' or '.join(shims) if shims else f'reward_guided({name})'}"]
    scheduler = _scheduler(model, config.get("scheduler"))
    if scheduler is not None:
        why = refusal(scheduler)
        every = "every sampler" if why is None else "none and best-of-n with the transition 'scheduler'"
        lines.append(f"{type(scheduler).__name__}: {every}" + ("" if why is None else f" ({why})"))
    return lines


def _scheduler(model: str, entry: list[str] | None) -> SchedulerMixin | None:
    cls = getattr(diffusers, str(entry[1]), None) if entry else None
    if cls is None:
        return None
    loaded: SchedulerMixin = cls.from_pretrained(model, subfolder="scheduler")
    return loaded

"""The command `families`: what is supported, and whether a given pipeline is."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rsm_guidance.core.errors import UsageError

if TYPE_CHECKING:
    from diffusers import SchedulerMixin

    from rsm_guidance.engine.probe import Findings


@dataclass(frozen=True)
class Families:
    """List the documented pipeline families, or say what a given pipeline can do.

    rsm-guidance families

    rsm-guidance families path/to/pipeline

    rsm-guidance families stabilityai/stable-diffusion-3.5-medium
    """

    pipeline: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="[MODEL]")] = None
    """Folder or hub id to probe; of a hub id only the configuration is read."""

    def run(self) -> None:
        from rsm_guidance.pipelines.catalog import FAMILIES

        if self.pipeline is None:
            width = max(map(len, FAMILIES))
            print("\n".join(f"{name:{width}}  {f.title} ({f.pipeline})" for name, f in FAMILIES.items()))
        else:
            print("\n".join(probe(self.pipeline)))


def probe(model: str) -> list[str]:
    """What a pipeline folder, hub repository or packaged model can do here, line by line.

    A folder with weights is loaded and tried (`engine.probe`); of others only class and scheduler are known, which is said.

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
    reason = why_not(cls)  # type: ignore[arg-type]
    if reason is not None:
        return [f"{name}: cannot be guided: {reason}"]
    found, untried = _tried(location)
    if found is not None and found.runs is not None:
        return [f"{name}: cannot be guided: {found.runs}"]
    shims = [f"custom_pipeline({n!r})" for n, f in FAMILIES.items() if f.pipeline == name]
    how = " or ".join(shims) if shims else f"reward_guided({name})"
    lines = [f"{name}: can be guided, as {how}" + (f", as far as its class tells ({untried})" if found is None else "")]
    scheduler = _scheduler(location, config.get("scheduler"))
    if scheduler is not None:
        why = refusal(scheduler) or (found and found.levels)
        every = "every sampler" if why is None else "none and best-of-n with the transition 'scheduler'"
        lines.append(f"{type(scheduler).__name__}: {every}" + ("" if why is None else f" ({why})"))
    if found is not None:
        if found.images is not None:
            lines.append(f"rewards see no images: {found.images}")
        elif found.gradients is not None:
            lines.append(f"no gradients: {found.gradients}")
        lines += found.notes
    return lines


def _tried(location: str) -> tuple[Findings | None, str]:
    """What a pipeline in a folder was found to do; None, and why, if it was not tried."""
    from rsm_guidance.engine.probe import probe as trial
    from rsm_guidance.pipelines.load import load_pipeline

    folder = Path(location)
    if not any(folder.glob("*/*.safetensors")) and not any(folder.glob("*/*.bin")):
        return None, "no weights are here to try it with"
    try:
        found = trial(load_pipeline(location))
    except (UsageError, ImportError, TypeError, ValueError, AttributeError) as error:  # whatever loading raises
        return None, f"it could not be loaded here: {str(error).partition(chr(10))[0]}"
    return (found, "") if found.tried is None else (None, f"it could not be tried: {found.tried}")


def _scheduler(model: str, entry: list[str] | None) -> SchedulerMixin | None:
    import diffusers

    cls = getattr(diffusers, str(entry[1]), None) if entry else None
    if cls is None:
        return None
    loaded: SchedulerMixin = cls.from_pretrained(model, subfolder="scheduler")
    return loaded

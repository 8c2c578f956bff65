"""Options that several commands share, and how they are loaded."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from rsm_guidance.core.errors import UsageError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from rsm_guidance.core.contracts import Reward
    from rsm_guidance.core.ledger import Budget
    from rsm_guidance.core.transitions import Transition
    from rsm_guidance.evaluation.generate import Generation
    from rsm_guidance.samplers import Sampler


class Model(NamedTuple):
    """A loaded pipeline, its reward, and the arguments of its call."""

    pipe: DiffusionPipeline
    reward: Reward
    generation: Generation


@dataclass(frozen=True)
class ModelOptions:
    """What makes the images, and what scores them."""

    model: Annotated[str, tyro.conf.arg(aliases=["--pipeline"])] = "shapes"
    """Hub id or folder of a diffusers pipeline; "shapes" is the embedded one."""
    reward: str = "shapes-drm"
    """A name (see `rsm-guidance rewards`), folder or hub id of a reward model, package.module:object, or "A + 0.5 * B"."""
    steps: int | None = None
    """Denoising steps; default: the model's own."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; default: the model's own."""
    negative_prompt: str | None = None
    """What to keep away from, where the pipeline takes it."""
    height: int | None = None
    """Height in pixels; default: the model's own."""
    width: int | None = None
    """Width in pixels; default: the model's own."""
    frames: int | None = None
    """Frames of a video; default: the model's own."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the pipeline."""
    device: str | None = None
    """Where it runs (cpu, cuda, cuda:1, mps); default: an accelerator where there is one."""
    offload: Literal["none", "model", "sequential"] = "none"
    """Keep weights in main memory and move one model, or one layer, at a time to the accelerator."""
    scheduler: str | None = None
    """Class of another diffusers scheduler, such as EulerAncestralDiscreteScheduler."""
    lora: tuple[str, ...] = ()
    """LoRA adapters, each as PATH or PATH:SCALE: .safetensors files, folders or hub ids."""

    def load(self) -> Model:
        """Load the pipeline, and the reward onto it: a diffusion reward model shares its modules.

        Raises:
            UsageError: if either cannot be found or loaded.
        """
        from rsm_guidance.evaluation.generate import Generation
        from rsm_guidance.pipelines.load import load_pipeline, require_device, require_loras

        quiet_libraries()
        loras = require_loras(self.lora)
        require_device(self.device, self.offload)
        check_reward(self.reward)
        sizes = {"height": self.height, "width": self.width, "frames": self.frames}
        generation = Generation.for_model(
            self.model, self.steps, self.guidance_scale, negative_prompt=self.negative_prompt, **sizes
        )
        pipe = load_pipeline(self.model, self.dtype, self.device, self.offload, self.scheduler, loras)
        require_arguments(pipe, generation.call())
        return Model(pipe, load_reward(self.reward, pipe), generation)


@contextmanager
def running(model: str) -> Iterator[None]:
    """Say of what a model's folder holds that it cannot be run, where that shows only in the run.

    An error of a packaged model, or of a reward, is somebody's programming error and passes.
    """
    from rsm_guidance.io.names import packaged_model
    from rsm_guidance.io.reading import refusing
    from rsm_guidance.rewards import crashed_in_reward

    try:
        with contextlib.nullcontext() if packaged_model(model) else refusing(f"the model {model!r} cannot be run"):
            yield
    except UsageError as error:
        cause = error.__cause__
        if isinstance(cause, Exception) and crashed_in_reward(cause):
            raise cause from None
        raise


def require_arguments(pipe: DiffusionPipeline, call: dict[str, Any]) -> None:
    """Raise a UsageError for an option that the pipeline's call does not take."""
    import inspect

    taken = inspect.signature(type(pipe).__call__).parameters
    for name in call:
        if name not in taken:
            option = {"num_frames": "frames", "num_inference_steps": "steps"}.get(name, name).replace("_", "-")
            raise UsageError(f"{type(pipe).__name__} takes no {name}; leave --{option} out")


ModelGroup = Annotated[ModelOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="model and reward", help="")]


@dataclass(frozen=True)
class SamplerOptions:
    """How candidates are made; what is left out keeps the sampler's default."""

    candidates: int | None = None
    """Candidates of samplers that count them so: samples (best-of-n), children of a step (stepwise), ..."""
    transition: str | None = None
    """How to step, as in "cps 0.9": ode, ddim, cps, flow_sde, glass, or the pipeline's own, scheduler."""
    noise: float | None = None
    """Noise level of the transition: eta in [0, 1] of ddim and cps, a of flow_sde."""
    set: tuple[str, ...] = ()
    """Any option of the sampler, as FIELD=VALUE."""

    def build(self, name: str) -> Sampler:
        """The sampler of a name, which may carry options of its own, as in "stepwise:trajectories=2".

        Raises:
            UsageError: if there is no such sampler, or it does not have an option that was given.
        """
        from rsm_guidance.samplers import parse_sampler

        given: dict[str, Any] = {} if self.candidates is None else {"candidates": self.candidates}
        if self.transition is not None or self.noise is not None:
            given["transition"] = self._transition(name)
        return parse_sampler(":".join([name, *self.set]), **given)

    def _transition(self, name: str) -> Transition:
        from rsm_guidance.core.transitions import ODE, parse_transition
        from rsm_guidance.samplers import SAMPLERS

        if self.transition is None:
            transition = getattr(SAMPLERS.get(name.partition(":")[0]), "transition", ODE())
        else:
            transition = parse_transition(self.transition)
        if self.noise is None:
            return transition
        if not fields(transition):
            raise UsageError(f"the transition {transition.name!r} takes no noise level; leave --noise out")
        return parse_transition(f"{transition.name} {self.noise!r}")


SamplerGroup = Annotated[SamplerOptions, tyro.conf.OmitArgPrefixes, tyro.conf.arg(name="sampler", help="")]


def check_reward(text: str) -> None:
    """Refuse a reward that cannot be found whatever the pipeline is, before a pipeline is loaded."""
    from rsm_guidance.rewards import REWARDS, resolve_reward

    if ":" in text and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # so that my_module:function is found in this folder, behind all that is installed
    composed = " + " in text or " * " in text
    needs_pipe = text in REWARDS or Path(text).is_dir() or (text.count("/") == 1 and ":" not in text)
    if not composed and not needs_pipe:
        resolve_reward(text)


def load_reward(text: str, pipe: DiffusionPipeline | None = None) -> Reward:
    """A reward by its specification; a diffusion reward model shares the modules of the pipeline."""
    from rsm_guidance.rewards import resolve_reward

    check_reward(text)
    return resolve_reward(text, pipe)


def budget_of(evaluations: float | None, seconds: float | None = None) -> Budget | None:
    """A budget from command-line numbers, or None."""
    from rsm_guidance.core.ledger import Budget

    return None if evaluations is None and seconds is None else Budget(evaluations=evaluations, seconds=seconds)


def listed(text: str) -> list[str]:
    """Entries between commas that stand in no brackets."""
    return [n.strip() for n in re.split(r",(?![^\[({]*[\])}])", text) if n.strip()]


def numbers(text: str, option: str) -> tuple[float, ...]:
    """Numbers between commas.

    Raises:
        UsageError: if one is none.
    """
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError as error:
        raise UsageError(f"{option} takes numbers, separated by commas; got {text!r}") from error


def say(data: dict[str, Any]) -> None:
    """Print one JSON object on a line of its own."""
    print(json.dumps(data), flush=True)


def quiet_libraries() -> None:
    """Keep the warnings and loading bars of transformers and diffusers out of a command's output."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()

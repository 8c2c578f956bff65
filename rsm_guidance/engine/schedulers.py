"""Reads diffusers schedulers: the levels of a call, and what its model outputs say.

Schedulers keep x_i = alpha_i x0 + sigma_i eps in one of a few conventions.  Which one a scheduler follows is found by trying:
a reading is right if the scheduler's own step goes to alpha' x0 + c eps + noise, with c in 0..sigma', for the x0 and eps that it
reads and the alpha' and sigma' of the next level.  That holds for all deterministic and ancestral steps, and for the first step
of multi-step solvers.  It costs a few steps over tensors of 256 numbers, once for each class and configuration.

The last level is clean here, alpha = 1 and sigma = 0, also where a scheduler would stop a little short of it.
"""

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from rsm_guidance.core.rows import per_row
from rsm_guidance.core.schedule import (
    NoiseSchedule,
    Prediction,
    PredictionType,
    times_rows,
    to_prediction,
    to_prediction_rows,
)

Stepper = Callable[[Tensor, Tensor], Tensor]
"""A scheduler's step, always the same one: (model output, latents) to the next latents."""

_KINDS: dict[str, PredictionType] = {
    "epsilon": "epsilon", "sample": "sample", "v_prediction": "v_prediction", "flow_prediction": "flow"
}  # fmt: skip
_TRIED_STEPS = 6


@dataclass(frozen=True)
class Reading:
    """What a scheduler's numbers and its model outputs mean.

    Attributes:
        convention: "flow" (alpha = 1 - sigma), "rising" (the same with sigma = 1 - the number listed), "exploding" (alpha = 1; the
            model is asked, and answers, about x / |(1, sigma)|), "ratio" (sigma / alpha is listed) or "cumulative" (alpha^2 is
            kept for every training step); the last two preserve the variance.
        kind: what model outputs are.
        sign: -1 where they are negated.
        clip: the largest |x0|, where the scheduler clips it.
        implied: whether eps is what x and the clipped x0 imply, and not the model's.
    """

    convention: str
    kind: PredictionType
    sign: int = 1
    clip: float | None = None
    implied: bool = False


@dataclass(frozen=True)
class Levels:
    """The levels of one call and how to read the denoiser at them.

    Attributes:
        schedule: noise schedule, level by level.
        reading: how.
    """

    schedule: NoiseSchedule
    reading: Reading

    @property
    def kind(self) -> PredictionType:
        """What the model outputs are."""
        return self.reading.kind

    def read(self, x: Tensor, output: Tensor, level: int) -> Prediction:
        """The prediction that a model output [B, ...] for latents x [B, ...] at a level makes."""
        alpha, sigma = self.schedule.coefficients(level)
        output = -output if self.reading.sign < 0 else output
        if self.reading.convention == "exploding":
            scale = (1 + sigma**2) ** -0.5
            p = to_prediction(scale * x, output, scale, scale * sigma, self.kind)
            p = Prediction(x, p.x0, p.eps)
        else:
            p = to_prediction(x, output, alpha, sigma, self.kind)
        if self.reading.clip is None:
            return p
        x0 = p.x0.clamp(-self.reading.clip, self.reading.clip)
        return Prediction(x, x0, (x - alpha * x0) / sigma if self.reading.implied else p.eps)

    def read_rows(self, x: Tensor, output: Tensor, levels: Tensor) -> Prediction:
        """The prediction of a model output [R, ...] for latents x [R, ...] at a level each [R]."""
        index = levels.cpu()
        alpha, sigma = self.schedule.alpha[index], self.schedule.sigma[index]
        output = -output if self.reading.sign < 0 else output
        if self.reading.convention == "exploding":
            scale = (1 + sigma**2) ** -0.5
            p = to_prediction_rows(times_rows(x, scale), output, scale, scale * sigma, self.kind)
            p = Prediction(x, p.x0, p.eps)
        else:
            p = to_prediction_rows(x, output, alpha, sigma, self.kind)
        if self.reading.clip is None:
            return p
        x0 = p.x0.clamp(-self.reading.clip, self.reading.clip)
        if not self.reading.implied:
            return Prediction(x, x0, p.eps)
        return Prediction(x, x0, (x - times_rows(x0, alpha)) / per_row(sigma.to(x.dtype), x))

    def negated(self) -> "Levels":
        """The same, with model outputs of the other sign."""
        return replace(self, reading=replace(self.reading, sign=-self.reading.sign))

    def difference(self, step: Stepper, x: Tensor, output: Tensor, level: int) -> str | None:
        """How a scheduler's step from a level differs from what is read there; None where it does not.

        Args:
            step: the scheduler's own step, with the same noise each time.
            x, output: latents and model output [B, ...] with which it is tried; and with these shifted by one place.
            level: not the last one, from which schedulers may stop short of the clean latents.
        """
        alpha, sigma = self.schedule.coefficients(level + 1)
        first, second = (x, output), (x.roll(1, -1), output.roll(1, -1))
        told = [self.read(*pair, level) for pair in (first, second)]
        went = [step(m, s) for s, m in (first, second)]
        shown = (went[0] - went[1]).double() - alpha * (told[0].x0 - told[1].x0).double()
        eps = (told[0].eps - told[1].eps).double()
        kept = float((shown * eps).sum() / (eps * eps).sum().clamp_min(1e-30))
        size = float(torch.stack([went[0].double().norm(), went[1].double().norm(), shown.norm()]).max())
        missed = float((shown - kept * eps).norm()) / max(size, 1e-30)
        close = 2e-3 if min(x.dtype.itemsize, output.dtype.itemsize) >= 4 else 5e-2
        if not missed <= close:  # also where it is no number
            return (
                f"it moves the latents by something else than their estimated clean image and noise (by {missed:.2g})"
            )
        if not -close <= kept <= sigma + close * (1 + sigma):
            return f"it keeps {kept:.3g} of the estimated noise, where the next level has {sigma:.3g}"
        return None


def refusal(scheduler: SchedulerMixin) -> str | None:
    """Why one-step transitions cannot follow this scheduler; None if they can."""
    found = _found(scheduler)
    return found if isinstance(found, str) else None


def read_levels(scheduler: SchedulerMixin, state: dict[str, Any], steps: int, idle: int = 0) -> Levels:
    """The last `steps` levels that a scheduler was set to, and the clean one.

    Args:
        scheduler: for its class and configuration.
        state: its attributes inside the call (timesteps, sigmas).
        steps: how many of its levels the call visits (fewer than all in img2img, which starts later).
        idle: how many of these, at the end, are clean already, and left out.

    Raises:
        ValueError: if one-step transitions cannot follow it, with the alternative.
    """
    found = _found(scheduler)
    if isinstance(found, str):
        raise ValueError(
            f"this sampler steps from level to level by itself, which {type(scheduler).__name__} does not allow: {found}; "
            "set pipe.scheduler to DDIMScheduler or EulerDiscreteScheduler (FlowMatchEulerDiscreteScheduler on a flow "
            "model), or use 'none', 'best-of-n' or 'noise-search' with the transition 'scheduler'"
        )
    return levels_of(found, state, steps, idle)


def idle_steps(state: dict[str, Any]) -> int:
    """How many steps at the end of a call are made from latents that are clean already (custom sigmas that end in 0)."""
    listed = state.get("sigmas")
    if not isinstance(listed, Tensor):
        return 0
    listed = listed[: len(state["timesteps"])]
    return int((listed.flip(0) == 0).long().cumprod(0).sum()) if len(listed) > 1 and listed[0] > listed[-1] else 0


def levels_of(reading: Reading, state: dict[str, Any], steps: int, idle: int = 0) -> Levels:
    """The last `steps` levels of a scheduler's attributes, without `idle` ones at the end, and the clean one."""
    part = slice(-steps, len(state["timesteps"]) - idle)
    timesteps = state["timesteps"].double().cpu()[part]
    if reading.convention == "cumulative":
        kept = state["alphas_cumprod"].double().cpu()[timesteps.long()]
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    else:
        listed = state["sigmas"].double().cpu()[: len(state["timesteps"])][part]
        alpha, sigma = {
            "flow": lambda: (1 - listed, listed),
            "rising": lambda: (listed, 1 - listed),
            "exploding": lambda: (torch.ones_like(listed), listed),
            "ratio": lambda: ((1 + listed**2).rsqrt(), listed * (1 + listed**2).rsqrt()),
        }[reading.convention]()
    end = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    parts = zip((alpha, sigma, timesteps), end, strict=True)
    return Levels(NoiseSchedule(*(torch.cat([values, last[None]]) for values, last in parts)), reading)


# --- which convention a scheduler follows ---


def _found(scheduler: SchedulerMixin) -> Reading | str:
    """The reading of a scheduler, or why there is none."""
    return _tried(type(scheduler), json.dumps(dict(scheduler.config), sort_keys=True, default=str))  # type: ignore[arg-type]


@functools.lru_cache(maxsize=256)
def _tried(cls: type[SchedulerMixin], configuration: str) -> Reading | str:
    config = json.loads(configuration)
    if not hasattr(cls, "step"):
        return "it has no step"
    try:
        scheduler: Any = cls.from_config({k: v for k, v in config.items() if not k.startswith("_")})
        _set(scheduler)
    except Exception as error:  # of any scheduler, also one that is no part of diffusers
        return f"it could not be tried ({type(error).__name__}: {str(error).partition(chr(10))[0]})"
    steps = len(scheduler.timesteps)
    told = {float(t) for t in scheduler.timesteps}
    if getattr(scheduler, "order", 1) > 1 or len(told) < steps:
        return "it calls the denoiser more than once per level"
    if not {"model_output", "timestep", "sample"} >= {
        p.name for p in inspect.signature(scheduler.step).parameters.values() if p.default is p.empty and p.kind < 2
    }:
        return "its step asks for more than a model output, a timestep and latents"
    if config.get("thresholding"):
        return "it clips its estimates at a quantile of their own (thresholding)"
    found = next((r for r in _readings(scheduler, config) if _fits(scheduler, r, steps)), None)
    return found or "its noise levels cannot be read: its step fits none of the known noise schedules"


def _set(scheduler: Any) -> None:
    parameters = inspect.signature(scheduler.set_timesteps).parameters
    shift = {"mu": 1.0} if "mu" in parameters and scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(_TRIED_STEPS, **shift)
    scheduler.is_scale_input_called = True  # else some warn that model inputs are to be scaled


def _readings(scheduler: Any, config: dict[str, Any]) -> Iterator[Reading]:
    """Readings that a scheduler's attributes allow, the likely ones first."""
    told = config.get("prediction_type")
    kinds = [_KINDS[told]] if told in _KINDS else ["flow", "epsilon"] if told is None else []
    clips: list[tuple[float | None, bool]] = [(None, False)]
    if config.get("clip_sample"):
        limit = float(config.get("clip_sample_range") or 1.0)
        clips = [(limit, False), (limit, True), *clips]  # some have the setting and do not heed it
    conventions = []
    if isinstance(getattr(scheduler, "sigmas", None), Tensor):
        conventions += ["flow", "exploding", "ratio", "rising"]
    if isinstance(getattr(scheduler, "alphas_cumprod", None), Tensor):
        conventions.append("cumulative")
    for convention in conventions:
        for kind in kinds:
            if (kind == "flow") == (convention in ("flow", "rising")):
                for clip, implied in clips:
                    yield Reading(convention, kind, -1 if convention == "rising" else 1, clip, implied)  # type: ignore[arg-type]


def _fits(scheduler: Any, reading: Reading, steps: int) -> bool:
    """Whether a reading fits a scheduler that has been set."""
    random = torch.Generator().manual_seed(0)
    x, output = (torch.randn(1, 4, 8, 8, generator=random) for _ in range(2))
    try:
        levels = levels_of(reading, vars(scheduler), steps)
        for level in range(min(3, steps - 1)):
            scale = max(levels.schedule.coefficients(level))
            step = stepper(scheduler, (output, scheduler.timesteps[level], x), {})
            if levels.difference(step, scale * x, output, level) is not None:
                return False
    except Exception:  # whatever a scheduler that is read wrongly raises
        return False
    return True


def stepper(scheduler: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Stepper:
    """A scheduler's step as it stands, for other model outputs and latents, always with the same noise.

    Neither the scheduler nor any generator notices.  `args` and `kwargs` are those of the step.
    """
    function = type(scheduler).step
    signature = inspect.signature(function)
    held = snapshot(scheduler)

    def step(output: Tensor, x: Tensor) -> Tensor:
        fresh = object.__new__(type(scheduler))
        vars(fresh).update(snapshot_of(held))
        bound = signature.bind(fresh, *args, **kwargs)
        bound.arguments |= {"model_output": output, "sample": x, "return_dict": False}
        if "generator" in signature.parameters:
            bound.arguments["generator"] = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
            torch.manual_seed(0)
            following: Tensor = function(*bound.args, **bound.kwargs)[0]
        return following

    return step


def snapshot(scheduler: Any) -> dict[str, Any]:
    """A scheduler's attributes as they are now, without what was put in place of its methods."""
    return snapshot_of({n: v for n, v in vars(scheduler).items() if n != "step"})


def snapshot_of(attributes: dict[str, Any]) -> dict[str, Any]:
    """Attributes, whose lists and tensors are copies."""
    return {
        n: v.clone() if isinstance(v, Tensor) else list(v) if isinstance(v, list) else v for n, v in attributes.items()
    }

"""Reads diffusers schedulers: the levels of a call, and what its model outputs say.

Schedulers keep x_i = alpha_i x0 + sigma_i eps in one of three conventions: flow (alpha = 1 - sigma), variance preserving
(alpha^2 + sigma^2 = 1) or variance exploding (alpha = 1).  The last level is clean here, alpha = 1 and sigma = 0, also
where a scheduler would stop a little short of it.  `clip_sample` and `thresholding`, which are for pixel models, are
not applied.
"""

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin
from torch import Tensor

from rsm_guidance.core.schedule import (
    NoiseSchedule,
    Prediction,
    PredictionType,
    times_rows,
    to_prediction,
    to_prediction_rows,
)

_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler", "LTXEulerAncestralRFScheduler")
_CUMULATIVE = ("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler", "LCMScheduler",
               "TCDScheduler")  # fmt: skip
_RATIO = ("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler",
          "DEISMultistepScheduler", "SASolverScheduler")  # fmt: skip
_EXPLODING = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler")
_REFUSED = {
    ("HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "KDPM2DiscreteScheduler",
     "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler", "PNDMScheduler"):
        "it calls the denoiser more than once per level",
    ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler", "SCMScheduler"):
        "its model outputs follow a preconditioning of their own",
}  # fmt: skip
_KINDS: dict[str, PredictionType] = {
    "epsilon": "epsilon", "sample": "sample", "v_prediction": "v_prediction", "flow_prediction": "flow"
}  # fmt: skip


def _is(scheduler: SchedulerMixin, names: tuple[str, ...]) -> bool:
    return isinstance(scheduler, tuple(getattr(diffusers, n) for n in names if hasattr(diffusers, n)))


@dataclass(frozen=True)
class Levels:
    """The levels of one call and how to read the denoiser at them.

    Attributes:
        schedule: noise schedule, level by level.
        kind: what the model outputs are.
    """

    schedule: NoiseSchedule
    kind: PredictionType

    def read(self, x: Tensor, output: Tensor, level: int) -> Prediction:
        """The prediction that a model output [B, ...] for latents x [B, ...] at a level makes."""
        alpha, sigma = self.schedule.coefficients(level)
        if self.kind != "flow" and alpha == 1:  # exploding: the model is asked, and answers, about x / |(1, sigma)|
            scale = (1 + sigma**2) ** -0.5
            p = to_prediction(scale * x, output, scale, scale * sigma, self.kind)
            return Prediction(x, p.x0, p.eps)
        return to_prediction(x, output, alpha, sigma, self.kind)

    def read_rows(self, x: Tensor, output: Tensor, levels: Tensor) -> Prediction:
        """The prediction of a model output [R, ...] for latents x [R, ...] at a level each [R]."""
        index = levels.cpu()
        alpha, sigma = self.schedule.alpha[index], self.schedule.sigma[index]
        if self.kind != "flow" and bool((self.schedule.alpha == 1).all()):  # exploding, as in `read`
            scale = (1 + sigma**2) ** -0.5
            p = to_prediction_rows(times_rows(x, scale), output, scale, scale * sigma, self.kind)
            return Prediction(x, p.x0, p.eps)
        return to_prediction_rows(x, output, alpha, sigma, self.kind)


def _prediction_type(scheduler: SchedulerMixin) -> str:
    if _is(scheduler, _FLOW):
        return "flow_prediction"
    return str(scheduler.config.get("prediction_type", "epsilon"))


def refusal(scheduler: SchedulerMixin) -> str | None:
    """Why one-step transitions cannot follow this scheduler; None if they can."""
    for names, reason in _REFUSED.items():
        if _is(scheduler, names):
            return reason
    if not _is(scheduler, (*_FLOW, *_CUMULATIVE, *_RATIO, *_EXPLODING)):
        return "its noise levels cannot be read"
    if _prediction_type(scheduler) not in _KINDS:
        return f"its prediction type {_prediction_type(scheduler)!r} cannot be read"
    if scheduler.config.get("invert_sigmas"):
        return "its noise levels rise"
    return None


def read_levels(scheduler: SchedulerMixin, state: dict[str, Any], steps: int) -> Levels:
    """The last `steps` levels that a scheduler was set to, and the clean one.

    Args:
        scheduler: for its class and configuration.
        state: its attributes inside the call (timesteps, sigmas).
        steps: how many of its levels the call visits (fewer than all in img2img, which starts later).

    Raises:
        ValueError: if one-step transitions cannot follow it, with the alternative.
    """
    reason = refusal(scheduler)
    if reason is not None:
        raise ValueError(
            f"this sampler steps from level to level by itself, which {type(scheduler).__name__} does not allow: {reason}; "
            "set pipe.scheduler to DDIMScheduler or EulerDiscreteScheduler (FlowMatchEulerDiscreteScheduler on a flow "
            "model), or use 'none', 'best-of-n' or 'noise-search' with the transition 'scheduler'"
        )
    timesteps = state["timesteps"].double().cpu()[-steps:]
    flow = _is(scheduler, _FLOW) or bool(scheduler.config.get("use_flow_sigmas"))
    if _is(scheduler, _CUMULATIVE):
        kept = state["alphas_cumprod"].double().cpu()[timesteps.long()]
        alpha, sigma = kept.sqrt(), (1 - kept).sqrt()
    else:
        listed = state["sigmas"].double().cpu()[: len(state["timesteps"])][-steps:]
        if flow:
            alpha, sigma = 1 - listed, listed
        elif _is(scheduler, _EXPLODING):
            alpha, sigma = torch.ones_like(listed), listed
        else:
            alpha = (1 + listed**2).rsqrt()
            sigma = listed * alpha
    end = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    parts = zip((alpha, sigma, timesteps), end, strict=True)
    kind = _prediction_type(scheduler)
    return Levels(NoiseSchedule(*(torch.cat([values, last[None]]) for values, last in parts)), _KINDS[kind])

"""How a pipeline is called in a training: steps, guidance, and the noise of its stochastic steps."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from diffusers import DiffusionPipeline

from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import GaussianTransition, parse_transition
from rsm_guidance.engine.families import stock_call_of
from rsm_guidance.io.names import packaged_model
from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.noise_levels import LeveledSDE, depth_level
from rsm_guidance.training.alignment.settings import RolloutConfig


def call_of(
    pipe: DiffusionPipeline, config: AlignConfig, steps: int | None = None, guidance: float | None = None
) -> dict[str, Any]:
    """Arguments of a pipeline's call; None leaves the pipeline's own, of a packaged model those with which it was measured.

    The guidance scale is `true_cfg_scale` where that is what guides by default, else `guidance_scale`.

    Raises:
        UsageError: for an argument that the pipeline does not take.
    """
    packaged = packaged_model(config.pipeline)
    call: dict[str, Any] = {} if packaged is None else dict(packaged.call)
    call |= {name: value for name, value in asdict(config.call).items() if value is not None}
    if steps is not None:
        call["num_inference_steps"] = steps
    parameters = inspect.signature(stock_call_of(type(pipe))).parameters
    strange = next((name for name in call if name not in parameters), None)
    if strange is not None:
        raise UsageError(f"{type(pipe).__name__} takes no {strange}; leave call.{strange} out")
    if guidance is None:
        return call
    true = parameters.get("true_cfg_scale")
    guided = true is not None and isinstance(true.default, int | float) and true.default > 1
    name = "true_cfg_scale" if guided else "guidance_scale"
    if name not in parameters:
        raise UsageError(
            f"{type(pipe).__name__} takes no guidance scale; leave rollout.guidance and evaluation.guidance out"
        )
    if guided and guidance > 1 and "negative_prompt" in parameters:
        call.setdefault("negative_prompt", " ")  # without one these pipelines do not guide
    return call | {name: guidance}


def transition_of(config: RolloutConfig, levels: Mapping[int, float] | None = None) -> GaussianTransition:
    """How noisy steps are drawn; `levels` are noise levels of the flow SDE found by calibration.

    The noise of a tree grows with every level at which trajectories part (Dynamic-TreeRPO).
    """
    if levels:
        return LeveledSDE(config.noise_level, levels)
    if config.noise_slope is not None:
        parting = [level for level, k in enumerate(config.children) if k > 1]
        depths = {level: sum(p <= level for p in parting) - 1 for level in range(config.steps)}
        return LeveledSDE(
            config.noise_level,
            {
                level: depth_level(config.noise_level, config.noise_slope, max(depth, 0), len(parting))
                for level, depth in depths.items()
            },
        )
    found = parse_transition(config.transition)
    assert isinstance(found, GaussianTransition)
    return found


def require_levels(config: AlignConfig, schedule: NoiseSchedule) -> None:
    """Raise a UsageError where a pipeline's levels are not those that a configuration is about."""
    if schedule.steps != config.rollout.steps:
        raise UsageError(
            f"this pipeline's scheduler makes {schedule.steps} steps of {config.rollout.steps}; set rollout.steps so that both agree"
        )
    noisy = config.rollout.kind not in ("ode", "data")
    if noisy and config.rollout.noise == "flow_sde" and not schedule.is_flow:
        raise UsageError(
            f"rollout.transition={config.rollout.transition!r} is for flow models, and this scheduler's levels are no flow: "
            "set it to 'ddim 1.0' (its trust.denominator is then 'variance')"
        )

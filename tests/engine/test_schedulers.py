"""How schedulers are read is found by trying; each reading against the scheduler's own steps."""

from contextlib import closing
from typing import Any

import diffusers as df
import numpy as np
import pytest
import torch

import rsm_guidance as rg
from rsm_guidance.core.transitions import ODE
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.engine.schedulers import Reading, read_levels, refusal, stepper
from tests.zoo import ZOO, parts
from tests.zoo.more import MORE

V = {"prediction_type": "v_prediction"}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


class Renamed(df.EulerDiscreteScheduler):
    """A scheduler under a name of its own."""


class Backwards(df.DDIMScheduler):
    """A scheduler that subtracts what it should add."""

    def step(self, model_output: Any, timestep: Any, sample: Any, **kwargs: Any) -> Any:
        return super().step(-model_output, timestep, sample, **kwargs)


@pytest.mark.parametrize(
    ("scheduler", "reading"),
    [
        (df.DDIMScheduler(clip_sample=False), Reading("cumulative", "epsilon")),
        (df.DDIMScheduler(**V), Reading("cumulative", "v_prediction", clip=1.0)),
        (df.DDPMScheduler(clip_sample_range=2.0), Reading("cumulative", "epsilon", clip=2.0, implied=True)),
        (df.LCMScheduler(), Reading("cumulative", "epsilon")),
        (df.TCDScheduler(), Reading("cumulative", "epsilon")),
        (df.CogVideoXDDIMScheduler(**V, rescale_betas_zero_snr=True), Reading("cumulative", "v_prediction")),
        (df.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"), Reading("ratio", "epsilon")),
        (df.DPMSolverSinglestepScheduler(), Reading("ratio", "epsilon")),
        (df.UniPCMultistepScheduler(**V), Reading("ratio", "v_prediction")),
        (df.UniPCMultistepScheduler(**FLOW, flow_shift=3.0), Reading("flow", "flow")),
        (df.DEISMultistepScheduler(), Reading("ratio", "epsilon")),
        (df.SASolverScheduler(), Reading("ratio", "epsilon")),
        (df.EulerDiscreteScheduler(**V), Reading("exploding", "v_prediction")),
        (df.EulerAncestralDiscreteScheduler(), Reading("exploding", "epsilon")),
        (df.LMSDiscreteScheduler(), Reading("exploding", "epsilon")),
        (Renamed(**V), Reading("exploding", "v_prediction")),
        (df.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), Reading("flow", "flow")),
        (df.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True), Reading("flow", "flow")),
        (df.FlowMatchEulerDiscreteScheduler(invert_sigmas=True), Reading("rising", "flow", sign=-1)),
        (df.FlowMatchLCMScheduler(), Reading("flow", "flow")),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_reading_says_what_the_scheduler_does(scheduler: Any, reading: Reading) -> None:
    assert refusal(scheduler) is None
    shift = {"mu": 0.8} if scheduler.config.get("use_dynamic_shifting") else {}
    scheduler.set_timesteps(9, **shift)
    levels = read_levels(scheduler, vars(scheduler), 9)
    assert levels.reading == reading
    before = {n: v for n, v in vars(scheduler).items() if not isinstance(v, torch.Tensor | list)}
    x, output = torch.randn(2, 2, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    for level in (0, 4):
        step = stepper(scheduler, (output, scheduler.timesteps[level], x), {})
        x = max(levels.schedule.coefficients(level)) * x
        assert levels.difference(step, x, output, level) is None
        assert levels.negated().difference(step, x, output, level) is not None
    assert {n: vars(scheduler)[n] for n in before} == before, "the scheduler must not notice"


@pytest.mark.parametrize(
    ("scheduler", "reason"),
    [
        (df.HeunDiscreteScheduler(), "more than once per level"),
        (df.KDPM2AncestralDiscreteScheduler(), "more than once per level"),
        (df.PNDMScheduler(skip_prk_steps=True), "more than once per level"),
        (df.CogVideoXDPMScheduler(), "asks for more than a model output"),
        (df.EDMEulerScheduler(), "fits none of the known noise schedules"),
        (df.DDPMWuerstchenScheduler(), "noise levels cannot be read"),
        (df.DDIMScheduler(thresholding=True), "at a quantile of their own"),
        (df.DDIMInverseScheduler(), "fits none of the known"),
        (Backwards(clip_sample=False), "fits none of the known"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_single_steps_cannot_follow_is_refused_with_the_reason(scheduler: Any, reason: str) -> None:
    assert reason in str(refusal(scheduler))


@torch.no_grad()
def test_clipped_estimates_are_the_schedulers() -> None:
    pipe = MORE["pixart_clipped"].build()
    with closing(
        PipelineDenoiser(pipe, MORE["pixart_clipped"].call() | {"generator": torch.Generator().manual_seed(0)})
    ) as d:
        prediction = d.predict(d.initial(), 1)
        assert prediction.x0.abs().max() == 1, "it clips"
        alpha, sigma = d.schedule.coefficients(1)
        assert torch.allclose(alpha * prediction.x0 + sigma * prediction.eps, prediction.x, atol=1e-5)
        output = d._driver._paused[(0,), 0].step.model_output
        read = d.levels.read_rows(prediction.x, output, torch.tensor([1]))
        assert torch.allclose(read.x0, prediction.x0) and torch.allclose(read.eps, prediction.eps, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("transition", ["scheduler", "ode"])
def test_custom_sigmas_may_end_in_zero(transition: str) -> None:
    """diffusers appends a zero to them, so that its last step starts from clean latents and goes nowhere."""
    pipe = rg.RewardGuidedPipeline.from_pipe(ZOO["flux_schnell"].build())
    pipe.set_progress_bar_config(disable=True)
    call = ZOO["flux_schnell"].call() | {"sigmas": [1.0, 0.6, 0.3, 0.0], "output_type": "np"}
    stock = pipe(**call, generator=torch.Generator().manual_seed(0)).images
    found = pipe(**call, generator=torch.Generator().manual_seed(0), sampler=f"none:transition={transition}")
    assert found.trace["steps"] == 3 and np.array_equal(found.images, stock)
    assert np.isfinite(pipe(**call, seed=0, sampler="stepwise:candidates=2", reward=_red).images).all()


def _red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images[:, 0].mean((1, 2))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("sana", df.SCMScheduler()),  # N + 1 timesteps, of which the last is no step
        ("pixart_sigma", df.DPMSolverMultistepScheduler(**parts.betas(), algorithm_type="sde-dpmsolver++")),
        ("sd15", df.HeunDiscreteScheduler(**parts.betas())),
        ("sd15", df.PNDMScheduler(**parts.betas(), skip_prk_steps=True)),
        ("wan", df.UniPCMultistepScheduler(**FLOW)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_whole_runs_follow_any_scheduler(name: str, scheduler: Any) -> None:
    pipe = ZOO[name].build()
    if isinstance(scheduler, df.SCMScheduler):
        pipe = df.SanaSprintPipeline(**pipe.components | {"transformer": _sprint(), "scheduler": scheduler})
        pipe.set_progress_bar_config(disable=True)
        call = ZOO[name].call() | {"num_inference_steps": 2}
    else:
        pipe.scheduler, call = scheduler, ZOO[name].call()
    call |= {"output_type": "np"}
    stock = np.asarray(pipe(**call, generator=[torch.Generator().manual_seed(0)])[0])
    guided = rg.RewardGuidedPipeline.from_pipe(pipe)
    found = guided(**call, generator=[torch.Generator().manual_seed(0)], sampler="none", reward=_mean)
    assert np.array_equal(np.asarray(found.images), stock)
    assert found.rewards[0] == pytest.approx(float(stock.mean()), abs=1e-5)


def _mean(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return images.flatten(1).mean(1)


def _sprint() -> df.SanaTransformer2DModel:
    """Sana's transformer, told its guidance scale."""
    own = dict(ZOO["sana"].build().transformer.config) | {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return df.SanaTransformer2DModel(**{k: v for k, v in own.items() if not k.startswith("_")}).eval()


@torch.no_grad()
def test_our_ode_goes_where_rising_levels_go() -> None:
    """Mochi's sigmas rise; its scheduler's steps are ours, read the other way round."""
    scheduler = df.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(6)
    levels = read_levels(scheduler, vars(scheduler), 6)
    x, output = torch.randn(2, 1, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    for level, t in enumerate(scheduler.timesteps):
        mine = ODE()(levels.read(x, output, level), levels.schedule, level, level + 1).mean
        x = scheduler.step(output, t, x).prev_sample
        assert torch.allclose(mine, x, atol=1e-5)

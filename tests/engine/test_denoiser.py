"""The engine against the stock pipeline: bitwise identity, jumps, gradients, clean-up."""

from contextlib import closing

import numpy as np
import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler, StableDiffusion3Pipeline

from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.meter import MeteredDenoiser
from rsm_guidance.core.transitions import ODE
from rsm_guidance.engine import PipelineDenoiser, encode_images, require_drivable

PROMPTS = ["two red circles and a blue square", "a red star"]
CALL = {"prompt": PROMPTS, "num_inference_steps": 5, "guidance_scale": 3.0, "num_images_per_prompt": 2}


def call(**extra: object) -> dict[str, object]:
    return CALL | {"generator": torch.Generator().manual_seed(3), "output_type": "np"} | extra


def run(denoiser: PipelineDenoiser) -> list[torch.Tensor]:
    states = [denoiser.initial()]
    for level in range(denoiser.schedule.steps):
        prediction = denoiser.predict(states[-1], level)
        states.append(ODE()(prediction, denoiser.schedule, level, level + 1).mean)
    return states


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_driven_call_is_bitwise_the_stock_call(stock: StableDiffusion3Pipeline, guidance: float) -> None:
    reference = stock(**call(guidance_scale=guidance)).images
    with closing(PipelineDenoiser(stock, call(guidance_scale=guidance))) as denoiser:
        states = run(denoiser)
        assert np.array_equal(denoiser.finish(states[-1]).images, reference)
        assert denoiser.evaluations == 5 * 4 * (2 if guidance > 1 else 1)
        assert denoiser.evaluations_per_row == (2 if guidance > 1 else 1)


@torch.no_grad()
def test_jump_to_any_level_in_any_order(stock: StableDiffusion3Pipeline) -> None:
    with closing(PipelineDenoiser(stock, call())) as denoiser:
        states = run(denoiser)
        for level in (4, 0, 2, 2, 3):
            again = denoiser.predict(states[level], level)
            assert torch.equal(ODE()(again, denoiser.schedule, level, level + 1).mean, states[level + 1])


@torch.no_grad()
def test_other_rows_keep_their_prompts(stock: StableDiffusion3Pipeline) -> None:
    with closing(PipelineDenoiser(stock, call())) as denoiser:
        states = run(denoiser)
        rows = torch.tensor([3, 0, 0])
        there = denoiser.predict(states[2][rows], 2, rows)
        assert torch.allclose(ODE()(there, denoiser.schedule, 2, 3).mean, states[3][rows], atol=1e-5)
        other = denoiser.predict(states[2][rows], 2, torch.tensor([0, 3, 3]))
        assert not torch.allclose(other.x0, there.x0, atol=1e-3)


def test_decode_is_the_stock_decode_and_differentiable(stock: StableDiffusion3Pipeline) -> None:
    latents = stock(**call(output_type="latent")).images
    reference = stock(**call()).images
    with closing(PipelineDenoiser(stock, call())) as denoiser:
        x0 = latents.clone().requires_grad_()
        images = denoiser.decode(x0)
        assert np.array_equal(images.detach().permute(0, 2, 3, 1).numpy(), reference)
        (gradient,) = torch.autograd.grad(images.sum(), x0)
        assert gradient.abs().amax((1, 2, 3)).min() > 0
        ledger = Ledger()
        assert torch.equal(MeteredDenoiser(denoiser, ledger).decode(latents), images) and ledger.decodes == 4


def test_gradient_flows_through_predict_and_follows_the_callers_mode(stock: StableDiffusion3Pipeline) -> None:
    with closing(PipelineDenoiser(stock, call())) as denoiser:
        x = denoiser.initial().clone().requires_grad_()
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        prediction = denoiser.predict(x, 0)
        (gradient,) = torch.autograd.grad((prediction.x0 * direction).sum(), x)
        step = 1e-2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            up, down = (denoiser.predict(x + s * step, 0).x0 for s in (1, -1))
            assert not up.requires_grad
        change = ((up - down) * direction).sum() / 2
        assert torch.allclose(change, (gradient * step).sum(), rtol=2e-2, atol=1e-3)
        assert torch.is_grad_enabled()


@torch.no_grad()
def test_abandoned_loop_leaves_no_trace(stock: StableDiffusion3Pipeline) -> None:
    reference = stock(**call()).images
    pipe_state, scheduler_state = dict(vars(stock)), dict(vars(stock.scheduler))
    denoiser = PipelineDenoiser(stock, call(guidance_scale=5.0))
    denoiser.predict(denoiser.initial(), 0)
    assert vars(stock) == pipe_state, "the pipeline must look untouched while a loop is paused"
    assert vars(stock.scheduler).keys() == scheduler_state.keys()
    assert all(vars(stock.scheduler)[k] is v for k, v in scheduler_state.items())
    assert np.array_equal(stock(**call()).images, reference), "another call in between must be undisturbed"
    denoiser.close()
    assert np.array_equal(stock(**call()).images, reference)


@torch.no_grad()
def test_exception_inside_the_stock_loop_comes_through_and_cleans_up(stock: StableDiffusion3Pipeline) -> None:
    reference = stock(**call()).images

    def explode(*args: object) -> dict[str, object]:
        raise RuntimeError("callback failed")

    denoiser = PipelineDenoiser(stock, call(callback_on_step_end=explode))
    first = denoiser.predict(denoiser.initial(), 0)
    with pytest.raises(RuntimeError, match="callback failed"):
        denoiser.predict(ODE()(first, denoiser.schedule, 0, 1).mean, 1)
    denoiser.close()
    assert np.array_equal(stock(**call()).images, reference)


@torch.no_grad()
def test_prompts_are_encoded_once(stock: StableDiffusion3Pipeline) -> None:
    with closing(PipelineDenoiser(stock, call())) as denoiser:
        denoiser.initial()  # the first time, a prompt is encoded alone, too, and compared
    seen: list[int] = []
    handle = stock.text_encoder.register_forward_hook(lambda *_: seen.append(1))
    try:
        with closing(PipelineDenoiser(stock, call())) as denoiser:
            states = run(denoiser)
            denoiser.predict(states[1], 1)
            denoiser.decode(states[-1])
            denoiser.finish(states[-1])
    finally:
        handle.remove()
    assert len(seen) == 2, "one pass for the prompts and one for the empty prompt of guidance"


def test_two_denoisers_on_one_pipeline_do_not_disturb_each_other(stock: StableDiffusion3Pipeline) -> None:
    with torch.no_grad(), closing(PipelineDenoiser(stock, call())) as a:
        alone = run(a)[-1]
    with (
        torch.no_grad(),
        closing(PipelineDenoiser(stock, call())) as a,
        closing(PipelineDenoiser(stock, call(guidance_scale=1.0, num_inference_steps=7))) as b,
    ):
        x, y = a.initial(), b.initial()
        for level in range(5):
            x = ODE()(a.predict(x, level), a.schedule, level, level + 1).mean
            y = ODE()(b.predict(y, level), b.schedule, level, level + 1).mean
    assert torch.equal(x, alone)


def test_encode_inverts_decode_roughly(stock: StableDiffusion3Pipeline) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.85
    latents = encode_images(stock, images)
    assert latents.shape == (2, 4, 16, 16)
    with torch.no_grad(), closing(PipelineDenoiser(stock, call())) as denoiser:
        assert (denoiser.decode(latents) - images).abs().mean() < 0.05
    with pytest.raises(ValueError, match=r"\[B, 3, H, W\]"):
        encode_images(stock, images[0])


def test_pipelines_that_cannot_be_driven_are_refused_with_the_reason(stock: StableDiffusion3Pipeline) -> None:
    with pytest.raises(ValueError, match="a diffusers pipeline is needed"):
        require_drivable(object())  # type: ignore[arg-type]
    held = stock.scheduler
    stock.scheduler = FlowMatchHeunDiscreteScheduler()
    try:
        with (
            closing(PipelineDenoiser(stock, call())) as denoiser,
            pytest.raises(ValueError, match="FlowMatchHeunDiscreteScheduler.*more than once per level.*best-of-n"),
        ):
            denoiser.predict(denoiser.initial(), 0)
    finally:
        stock.scheduler = held
    with closing(PipelineDenoiser(stock, call())) as denoiser, pytest.raises(ValueError, match="level 5 is clean"):
        denoiser.predict(denoiser.initial(), 5)

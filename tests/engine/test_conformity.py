"""Every family of the zoo through the engine: identity with stock, jumps, rows, gradients, decoding, cleaning up."""

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import ImageOps
from torch import Tensor

import rsm_guidance as rg
from rsm_guidance.core.transitions import DDIM, ODE
from rsm_guidance.engine import PipelineDenoiser
from tests.zoo import ZOO

NAMES = list(ZOO)


@pytest.fixture(scope="module")
def zoo() -> dict[str, DiffusionPipeline]:
    """Pipelines by name, built when first asked for."""
    return {}


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def pipe(zoo: dict[str, DiffusionPipeline], name: str) -> Iterator[DiffusionPipeline]:
    if name not in zoo:
        zoo[name] = ZOO[name].build()
    yield zoo[name]


def call(name: str, seed: int = 0, **extra: Any) -> dict[str, Any]:
    return ZOO[name].call() | {"generator": torch.Generator().manual_seed(seed), "output_type": "np"} | extra


def images_of(pipe: DiffusionPipeline, **arguments: Any) -> np.ndarray:
    return np.asarray(pipe(**arguments)[0])


def drive(denoiser: PipelineDenoiser, levels: int | None = None) -> list[Tensor]:
    """The states of an ode run, by our own steps."""
    states = [denoiser.initial()]
    for level in range(denoiser.steps if levels is None else levels):
        prediction = denoiser.predict(states[-1], level)
        states.append(ODE()(prediction, denoiser.schedule, level, level + 1).mean)
    return states


@torch.no_grad()
def test_the_schedulers_own_steps_are_bitwise_the_stock_call(pipe: DiffusionPipeline, name: str) -> None:
    reference = images_of(pipe, **call(name))
    with closing(PipelineDenoiser(pipe, call(name))) as denoiser:
        *_, (_, x) = denoiser.follow()
        assert np.array_equal(np.asarray(denoiser.finish(x)[0]), reference)
        spent = denoiser.evaluations
        assert spent == denoiser.steps * denoiser.evaluations_per_row * len(denoiser.prompts)


@torch.no_grad()
def test_our_ode_steps_are_the_stock_call_on_flow_models(pipe: DiffusionPipeline, name: str) -> None:
    if type(pipe.scheduler).__name__ != "FlowMatchEulerDiscreteScheduler":
        pytest.skip("other schedulers round their steps, or stop short of the clean level, in ways of their own")
    reference = images_of(pipe, **call(name))
    with closing(PipelineDenoiser(pipe, call(name))) as denoiser:
        assert np.array_equal(np.asarray(denoiser.finish(drive(denoiser)[-1])[0]), reference)


@torch.no_grad()
def test_a_jump_to_any_level_equals_arriving_there(pipe: DiffusionPipeline, name: str) -> None:
    with closing(PipelineDenoiser(pipe, call(name))) as denoiser:
        states = drive(denoiser)
        for level in (len(states) - 2, 0, 1):
            again = denoiser.predict(states[level].clone(), level)
            there = ODE()(again, denoiser.schedule, level, level + 1).mean
            assert torch.equal(there, states[level + 1]), level


@torch.no_grad()
def test_rows_in_any_number_and_order(pipe: DiffusionPipeline, name: str) -> None:
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    two = call(name, generator=generators, prompt=["a cat", "a red dog on a tree"])
    if two.get("negative_prompt") is not None:
        two["negative_prompt"] = ["bad", "worse"]
    with closing(PipelineDenoiser(pipe, two)) as denoiser:
        x = denoiser.initial()
        level = min(1, denoiser.steps - 1)
        together = denoiser.predict(x, level).x0
        rows = torch.tensor([1, 0, 1])
        picked = denoiser.predict(x[rows], level, rows).x0
        assert torch.allclose(picked, together[rows], atol=2e-4, rtol=1e-3)
        other = denoiser.predict(x[rows], level, 1 - rows).x0
        assert not torch.allclose(other, picked, atol=1e-6), "each row must keep its own prompt"


def test_gradients_flow_through_predict_and_decode(pipe: DiffusionPipeline, name: str) -> None:
    with closing(PipelineDenoiser(pipe, call(name))) as denoiser:
        x = denoiser.initial().detach().clone().requires_grad_()
        prediction = denoiser.predict(x, 0)
        (gradient,) = torch.autograd.grad(prediction.x0.float().square().sum(), x)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
        x0 = prediction.x0.detach().requires_grad_()
        images = denoiser.decode(x0)
        (gradient,) = torch.autograd.grad(images.square().sum(), x0)
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert torch.is_grad_enabled()


@torch.no_grad()
def test_decode_is_the_stock_decode(pipe: DiffusionPipeline, name: str) -> None:
    reference = images_of(pipe, **call(name))
    with closing(PipelineDenoiser(pipe, call(name))) as denoiser:
        *_, (_, x) = denoiser.follow()
        images = denoiser.decode(x)
        assert images.shape[-3] == 3 and 0 <= images.min() and images.max() <= 1
        assert np.allclose(images.movedim(-3, -1).numpy(), reference, atol=1e-6)


@torch.no_grad()
def test_abandoned_and_failing_calls_leave_no_trace(pipe: DiffusionPipeline, name: str) -> None:
    reference = images_of(pipe, **call(name))
    before, scheduler = dict(vars(pipe)), dict(vars(pipe.scheduler))
    denoiser = PipelineDenoiser(pipe, call(name, seed=1))
    drive(denoiser, 1)
    assert vars(pipe) == before, "a paused pipeline must look untouched"
    assert all(vars(pipe.scheduler)[k] is v for k, v in scheduler.items())
    denoiser.close()
    assert np.array_equal(images_of(pipe, **call(name)), reference)
    module = pipe.transformer if getattr(pipe, "transformer", None) is not None else pipe.unet
    handle = module.register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="out of memory"), closing(PipelineDenoiser(pipe, call(name))) as denoiser:
        drive(denoiser)
    handle.remove()
    assert np.array_equal(images_of(pipe, **call(name)), reference)


def _fail(*_: object) -> None:
    raise RuntimeError("out of memory")


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    """A toy reward: mean red minus mean blue, in [-1, 1]; videos by all their frames."""
    return (images[..., 0, :, :] - images[..., 2, :, :]).flatten(1).mean(1)


def guided_of(pipe: DiffusionPipeline) -> DiffusionPipeline:
    guided = rg.reward_guided(type(pipe))(**pipe.components)
    guided.set_progress_bar_config(disable=True)
    return guided


def test_samplers_improve_a_toy_reward(pipe: DiffusionPipeline, name: str) -> None:
    guided, common = guided_of(pipe), ZOO[name].call() | {"output_type": "np", "reward": redness}

    def reward(sampler: Any, seed: int = 0) -> float:
        return guided(**common, seed=seed, sampler=sampler).rewards[0]

    assert reward(rg.BestOfN(candidates=3)) >= reward("none") - 1e-6
    plain, stepwise = rg.Unguided(DDIM(1.0)), rg.StepwiseSampling(candidates=4, transition=DDIM(1.0))
    gains = [reward(stepwise, seed) - reward(plain, seed) for seed in (0, 1)]  # greedy steps may lose a single run
    assert max(gains) >= -1e-6


@torch.no_grad()
def test_same_seed_same_image_in_any_batch(pipe: DiffusionPipeline, name: str) -> None:
    guided, arguments = guided_of(pipe), ZOO[name].call() | {"seed": 3, "output_type": "np", "sampler": "none"}
    prompts = ["a cat", "a red dog on a tree"]
    both = arguments | {"prompt": prompts}
    alone = arguments | {"prompt": prompts[1]}
    if both.get("negative_prompt") is not None:
        both["negative_prompt"] = ["bad", "bad"]
        alone["negative_prompt"] = "bad"
    assert np.allclose(np.asarray(guided(**both).images)[1], np.asarray(guided(**alone).images)[0], atol=2e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "own",
    [
        "sd15_img2img",
        "sd15_inpaint",
        "sdxl_inpaint",
        "sd3_inpaint",
        "flux_kontext",
        "sd15_controlnet",
        "qwenimage_edit",
    ],
)
def test_every_row_keeps_its_own_input_image_and_mask(own: str) -> None:
    pipe, base = ZOO[own].build(), ZOO[own].call()
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    pictures = [base["image"], ImageOps.invert(base["image"])]
    arguments = base | {"prompt": ["a cat", "a cat"], "image": pictures, "generator": generators}
    if "mask_image" in base:
        arguments["mask_image"] = [base["mask_image"], ImageOps.invert(base["mask_image"])]
    if arguments.get("negative_prompt") is not None:
        arguments["negative_prompt"] = ["bad", "bad"]
    with closing(PipelineDenoiser(pipe, arguments)) as denoiser:
        x = denoiser.initial()
        together = denoiser.predict(x, 0).x0
        rows = torch.tensor([1, 0, 1])
        assert torch.allclose(denoiser.predict(x[rows], 0, rows).x0, together[rows], atol=2e-4, rtol=1e-3)
        same = together[:1].expand(3, *together.shape[1:])
        decoded = denoiser.decode(same, rows)
        assert torch.allclose(decoded[0], decoded[2], atol=1e-5)
        if "inpaint" in own:
            assert (decoded[0] - decoded[1]).abs().mean() > 1e-3, "the known regions differ"


def test_arguments_that_cannot_be_guided_are_refused() -> None:
    pipe, base = ZOO["sd15_inpaint"].build(), ZOO["sd15_inpaint"].call()
    with pytest.raises(ValueError, match="padding_mask_crop cannot be guided"):
        PipelineDenoiser(pipe, base | {"padding_mask_crop": 8})
    stub = object.__new__(type(pipe))
    stub.scheduler = pipe.scheduler
    with pytest.raises(ValueError, match="no denoiser under a name"):
        PipelineDenoiser(stub, base)

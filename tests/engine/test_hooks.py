"""Offload hooks move a denoiser at most once per level; what a stock call puts back at its end is put back by an abandoned one."""

from contextlib import closing
from typing import Any

import accelerate.hooks
import diffusers as df
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rsm_guidance as rg
from rsm_guidance.engine import PipelineDenoiser
from tests.zoo import ZOO, families
from tests.zoo.more import MORE


def red(images: Tensor, prompts: list[str]) -> Tensor:
    return (images[..., 0, :, :] - images[..., 2, :, :]).flatten(1).mean(1)


class Trips:
    """Counts how often a module goes to the device, under hooks that would move it there if there were one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: nn.Module) -> None:
        self.count, self._there = 0, False
        enter, leave = accelerate.hooks.CpuOffload.pre_forward, accelerate.hooks.CpuOffload.init_hook

        def pre_forward(hook: Any, moved: nn.Module, *args: Any, **kwargs: Any) -> Any:
            before = getattr(hook.prev_module_hook, "model", None)
            if moved is module and not self._there:
                self.count, self._there = self.count + 1, True
            if before is module:  # which accelerate sends away only where it is not on the CPU already
                self._there = False
            return enter(hook, moved, *args, **kwargs)

        def init_hook(hook: Any, moved: nn.Module) -> Any:
            self._there = self._there and moved is not module
            return leave(hook, moved)

        monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", pre_forward)
        monkeypatch.setattr(accelerate.hooks.CpuOffload, "init_hook", init_hook)


@pytest.mark.parametrize("name", ["sd3", "sd15_controlnet_img2img", "kandinsky22_img2img"])
@pytest.mark.parametrize("sampler", ["stepwise:candidates=3", "fk-steering:particles=3", "best-of-n:candidates=3"])
def test_the_denoiser_goes_to_the_device_once_per_level(
    name: str, sampler: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    specimen = (ZOO | MORE)[name]
    pipe = rg.RewardGuidedPipeline.from_pipe(specimen.build())
    pipe.set_progress_bar_config(disable=True)
    call = specimen.call() | {"seed": 0, "output_type": "np", "sampler": sampler, "reward": red}
    expected = pipe(**call)
    pipe.enable_model_cpu_offload(device="cpu")
    module = getattr(pipe, "transformer", None) or pipe.unet
    trips = Trips(monkeypatch, module)
    found = pipe(**call)
    assert np.array_equal(found.images, expected.images)
    # Stepwise sampling scores children of the last level, too, and a run begins with a trip.
    assert 1 <= trips.count <= found.trace["steps"] + 1
    assert hasattr(module, "_hf_hook"), "and is offloaded at the end"
    assert not trips._there


@pytest.mark.parametrize("name", ["sdxl_pag_img2img", "sd3_pag_img2img", "sd15_controlnet_pag"])
def test_attention_processors_are_the_modules_own_outside_of_a_call(name: str) -> None:
    specimen = MORE[name]
    pipe = specimen.build()
    module = getattr(pipe, "transformer", None) or pipe.unet
    own = list(module.attn_processors.values())
    reference = pipe(**specimen.call(), generator=torch.Generator().manual_seed(0), output_type="np").images
    guided = rg.RewardGuidedPipeline.from_pipe(pipe)
    guided.set_progress_bar_config(disable=True)
    denoisers = [PipelineDenoiser(guided, specimen.call()) for _ in range(2)]
    with torch.no_grad():
        for denoiser in denoisers:
            denoiser.predict(denoiser.initial(), 0)
            assert list(module.attn_processors.values()) == own, "while it is paused"
    guided(**specimen.call(), seed=0, sampler="stepwise:candidates=2", reward=red)
    with pytest.raises(ZeroDivisionError):
        guided(**specimen.call(), seed=0, sampler="stepwise:candidates=2", reward=lambda images, prompts: 1 / 0)
    denoisers[0].close()
    with torch.no_grad():
        x = denoisers[1].initial().clone()
        perturbed = denoisers[1].predict(x, 0)
    denoisers[1].close()
    assert list(module.attn_processors.values()) == own and perturbed.x0.isfinite().all()
    again = pipe(**specimen.call(), generator=torch.Generator().manual_seed(0), output_type="np").images
    assert np.array_equal(again, reference)


def test_settings_that_are_in_no_configuration_are_shared() -> None:
    pipe = df.StableDiffusion3PAGPipeline(**families.sd3(), pag_applied_layers="blocks.0")
    assert rg.RewardGuidedPipeline.from_pipe(pipe).pag_applied_layers == pipe.pag_applied_layers == ["blocks.0"]


@torch.no_grad()
def test_a_scheduler_that_two_pipelines_share_is_the_others_own() -> None:
    pipe = ZOO["sdxl"].build()
    other = df.StableDiffusionXLImg2ImgPipeline(**{n: c for n, c in pipe.components.items() if c is not None})
    other.set_progress_bar_config(disable=True)
    call = ZOO["sdxl_img2img"].call() | {"output_type": "np"}
    reference = other(**call, generator=torch.Generator().manual_seed(0)).images
    with closing(PipelineDenoiser(pipe, ZOO["sdxl"].call())) as denoiser:
        first = denoiser.predict(denoiser.initial(), 0)
        assert np.array_equal(other(**call, generator=torch.Generator().manual_seed(0)).images, reference)
        denoiser.predict(first.x, 1)
    assert np.array_equal(other(**call, generator=torch.Generator().manual_seed(0)).images, reference)

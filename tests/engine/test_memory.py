"""Memory that runs out, and gradients that recompute."""

from contextlib import closing
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import SD3CFGCutoffCallback
from torch import Tensor

from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.engine.memory import MicroBatch
from rsm_guidance.samplers import RewardGradient, TwistedSMC
from tests.zoo import ZOO

PROMPTS = ["a red star", "two blue circles", "a green cross"]
CALL = {"num_inference_steps": 5, "guidance_scale": 3.0}


def test_pieces_halve_until_they_fit_and_the_size_is_remembered() -> None:
    tried: list[int] = []

    def call(piece: slice) -> list[int]:
        rows = list(range(10))[piece]
        tried.append(len(rows))
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return rows

    batch = MicroBatch(1000)
    assert sum(batch(call, 10), []) == list(range(10))
    assert tried == [10, 5, 2, 2, 2, 2, 2] and batch.size == 2
    assert batch(call, 0) == [[]]
    with pytest.raises(MemoryError, match="one latent alone does not fit"):
        MicroBatch(4)(lambda piece: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory")), 1)
    with pytest.raises(ZeroDivisionError):
        MicroBatch(4)(lambda piece: 1 / 0, 4)


@pytest.mark.parametrize("cutoff", [False, True], ids=["plain", "under a callback"])
def test_a_denoiser_that_runs_out_of_memory_goes_on_in_smaller_batches(
    guided: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch, cutoff: bool
) -> None:
    call = {"prompt": PROMPTS, **CALL, "generator": [torch.Generator().manual_seed(i) for i in range(3)]}
    if cutoff:
        call["callback_on_step_end"] = SD3CFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=0)
    with torch.no_grad(), closing(PipelineDenoiser(guided, call)) as d:
        rows = torch.arange(3).repeat(3)
        x = torch.randn(9, *d.initial().shape[1:], generator=torch.Generator().manual_seed(9))
        whole, images = d.predict(x, 2, rows), d.decode(x, rows)
        forward, decode = guided.transformer.forward, guided.vae.decode

        def small(hidden_states: Tensor, *args: object, **kwargs: object) -> object:
            if len(hidden_states) > 8:  # four latents, twice for guidance
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(hidden_states, *args, **kwargs)

        def few(z: Tensor, *args: object, **kwargs: object) -> object:
            if len(z) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return decode(z, *args, **kwargs)

        monkeypatch.setattr(guided.transformer, "forward", small)
        monkeypatch.setattr(guided.vae, "decode", few)
        again, before = x.clone(), d.evaluations  # other latents, or the answer is known already
        pieces = d.predict(again, 2, rows)
        tried = 9 if cutoff else 18  # then pieces of 4, 4 and 1; or of 8 at most without guidance
        spent = 9 if cutoff else 18
        assert d.evaluations - before == tried + spent
        assert torch.allclose(pieces.x0, whole.x0, atol=1e-4) and pieces.x is again
        assert pieces.velocity is not None and torch.allclose(pieces.velocity, whole.velocity, atol=1e-4)
        assert torch.allclose(d.decode(x, rows), images, atol=1e-5)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux"])
def test_checkpointed_gradients_are_the_same_and_the_models_are_left_as_they_were(name: str) -> None:
    pipe = ZOO[name].build()
    call = ZOO[name].call() | {"generator": torch.Generator().manual_seed(0)}
    gradients = []
    for checkpointing in (False, True):
        with closing(PipelineDenoiser(pipe, call | {"generator": torch.Generator().manual_seed(0)})) as denoiser:
            denoiser.checkpointing = checkpointing
            x = denoiser.initial().detach().requires_grad_()
            with torch.enable_grad():
                prediction = denoiser.predict(x, 0)
                loss = denoiser.decode(prediction.x0).square().mean()
                (gradient,) = torch.autograd.grad(loss, x)
            gradients.append(gradient)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-8) and gradients[0].abs().max() > 0
    denoiser_module = getattr(pipe, "transformer", None) or pipe.unet
    assert not denoiser_module.is_gradient_checkpointing and not pipe.vae.is_gradient_checkpointing


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux"])
def test_denoiser_and_decoder_run_again_on_the_way_back(name: str) -> None:
    pipe, counts = ZOO[name].build(), []
    block = pipe.unet.down_blocks[0].resnets[0] if name == "sd15" else pipe.transformer.transformer_blocks[0]
    for checkpointing in (False, True):
        calls: list[str] = []
        hooks = [
            module.register_forward_pre_hook(lambda *_, which=which, calls=calls: calls.append(which))
            for which, module in (("decoder", pipe.vae.decoder.mid_block.resnets[0]), ("denoiser", block))
        ]
        with closing(PipelineDenoiser(pipe, ZOO[name].call() | {"generator": torch.Generator().manual_seed(0)})) as d:
            d.decode(d.initial())  # it sees what tensors the decoder gives
            calls.clear()
            d.checkpointing = checkpointing
            x = d.initial().detach().requires_grad_()
            torch.autograd.grad(d.decode(d.predict(x, 0).x0).sum(), x)
        for hook in hooks:
            hook.remove()
        counts.append([calls.count(which) for which in ("decoder", "denoiser")])
    assert counts[1] == [2 * n for n in counts[0]] and min(counts[0]) > 0


@pytest.mark.parametrize("kind", [RewardGradient, TwistedSMC])
def test_checkpointing_recomputes(guided: DiffusionPipeline, kind: Any) -> None:
    """The denoiser's blocks run again on the way back, and the reward with the decoder before it."""
    counts = []
    block = guided.transformer.transformer_blocks[0]

    def redness(images: Tensor, prompts: list[str]) -> Tensor:
        return (images[:, 0] - images[:, 2]).mean((1, 2))

    for checkpointing in (False, True):
        calls: list[int] = []
        hook = block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        sampler = kind(0.2 if kind is RewardGradient else 2, checkpoint=checkpointing)
        out = guided(PROMPTS[:1], sampler=sampler, seed=0, reward=redness, **CALL)
        hook.remove()
        assert out.rewards is not None
        counts.append(len(calls))
    assert counts[1] > 1.4 * counts[0]

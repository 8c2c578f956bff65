"""Every head, output and adaptation: shapes, what is trained and saved, and the same scores after loading."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.reward_models import DiffusionRewardModel
from rsm_guidance.reward_models.heads import HEADS
from rsm_guidance.reward_models.outputs import KINDS
from tests.zoo import ZOO

PROMPTS = ["a red circle", "two blue stars"]


def latents(pipe: Any = None, count: int = 2) -> Tensor:
    return torch.randn(count, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def made(pipe: DiffusionPipeline, **options: Any) -> DiffusionRewardModel:
    torch.manual_seed(0)
    return DiffusionRewardModel.from_pipeline(pipe, backbone="shapes", head_width=16, **({"blocks": 3} | options))


@pytest.mark.parametrize("output", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_saved_and_loaded_scores_are_the_same(
    stock: StableDiffusion3Pipeline, head: Any, output: Any, tmp_path: Path
) -> None:
    drm = made(stock, head=head, output=output, grades=5, adaptation="frozen")
    with torch.no_grad():
        for tensor in drm.own_tensors().values():
            tensor.copy_(tensor.half().float())  # as it is saved
        scores = drm.score(latents(), 300.0, PROMPTS)
    assert scores.shape == (2,) and scores.isfinite().all() and scores[0] != scores[1]
    drm.save_pretrained(tmp_path)
    again = DiffusionRewardModel.from_pretrained(tmp_path, pipe=stock)
    with torch.no_grad():
        assert torch.equal(again.score(latents(), 300.0, PROMPTS), scores)
    assert again.drm_config == drm.drm_config


@pytest.mark.parametrize("adaptation", ["frozen", "lora", "last-blocks", "full"])
@pytest.mark.parametrize("head", HEADS)
def test_gradients_reach_what_is_adapted_and_nothing_else(
    stock: StableDiffusion3Pipeline, head: Any, adaptation: Any
) -> None:
    stock.transformer.requires_grad_(False)  # as a trainer does
    drm = made(stock, head=head, adaptation=adaptation, lora_rank=2)
    drm.score(latents(), 300.0, PROMPTS).sum().backward()
    stock.transformer.requires_grad_(True)
    reached = {name for name, p in drm.named_parameters() if p.grad is not None and bool(p.grad.any())}
    trunk = {name for name in reached if "trunk" in name}
    assert any("head" in name for name in reached)
    assert all(p.grad is None for p in stock.transformer.parameters())
    wanted = {
        "frozen": lambda n: False,
        "lora": lambda n: "lora_" in n,
        "last-blocks": lambda n: "transformer_blocks.2." in n,
        "full": lambda n: True,
    }[adaptation]
    assert bool(trunk) == (adaptation != "frozen") and all(map(wanted, trunk))
    saved = {name for name in drm.own_tensors() if name.startswith("trunk.")}
    assert all(any(s.removeprefix("trunk.") in n for s in saved) for n in trunk)


def test_the_papers_head_reads_what_the_cut_denoiser_predicts(stock: StableDiffusion3Pipeline) -> None:
    """With all blocks kept that is the denoiser's own prediction, to the bit."""
    drm = made(stock, head="drm", blocks=6, adaptation="full")
    with torch.no_grad():
        arguments, grid = drm.inputs(latents(), 300.0, PROMPTS)
        tokens, rows = drm.scorer.features(arguments, grid)
        predicted = stock.transformer(**{**arguments, "return_dict": False})[0]
    assert rows == (16, 16) and torch.equal(tokens.transpose(1, 2).unflatten(2, rows), predicted)


def test_the_papers_head_has_the_size_of_the_papers() -> None:
    count = sum(p.numel() for p in HEADS["drm"](16, 512).parameters())
    assert count == pytest.approx(3.8e6, rel=0.02)


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "pixart_sigma", "qwenimage", "wan"])
@pytest.mark.parametrize("head", ["drm", "query"])
def test_heads_on_other_families(name: str, head: Any) -> None:
    pipe = ZOO[name].build()
    torch.manual_seed(0)
    drm = DiffusionRewardModel.from_pipeline(
        pipe, head=head, head_width=16, blocks=None if head == "query" else _all(pipe)
    )
    out = pipe(**ZOO[name].call() | {"output_type": "latent", "num_inference_steps": 2})[0]
    x = out[:1].detach().requires_grad_(True)
    score = drm.score(x, 100.0, ["a cat"])
    (slope,) = torch.autograd.grad(score.sum(), x)
    assert score.shape == (1,) and slope.isfinite().all() and bool(slope.any())


def _all(pipe: DiffusionPipeline) -> int:
    from rsm_guidance.reward_models.backbone import denoiser_of
    from rsm_guidance.reward_models.blocks import block_names

    return len(block_names(denoiser_of(pipe)))


def test_what_cannot_be_made_is_refused(stock: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown head 'mlp'; choose conv, drm, query, pool"):
        made(stock, head="mlp")
    with pytest.raises(UsageError, match="reads what the cut backbone predicts, and no taps"):
        made(stock, head="drm", taps=("transformer_blocks.1",))
    with pytest.raises(UsageError, match="at most the 3 kept ones; got 4"):
        made(stock, adaptation="last-blocks", tuned_blocks=4)
    with pytest.raises(UsageError, match="output layers of a UNet read all of its blocks"):
        DiffusionRewardModel.from_pipeline(ZOO["sd15"].build(), head="drm", blocks=3)
    made(stock, head="pool", adaptation="frozen").save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(config.replace('"pool"', '"query"'))
    with pytest.raises(UsageError, match="do not fit"):
        DiffusionRewardModel.from_pretrained(tmp_path, pipe=stock)

"""The policy and its LoRA files: roles, what is trained, and what stock pipelines make of a file."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.io.files import read_tensors
from rsm_guidance.training.alignment.lora_file import FILE, load_lora, lora_tensors, save_lora
from rsm_guidance.training.alignment.policy import Policy
from tests.zoo import ZOO

FAMILIES = ("sd15", "sdxl", "sd3", "flux", "qwenimage", "wan")


def moved(pipe: Any, seed: int = 1, **settings: Any) -> Policy:
    """A policy that has left the base model."""
    policy = Policy(pipe, rank=2, **settings)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.trained.values():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draw))
    return policy


def image(name: str, pipe: Any) -> Tensor:
    call = ZOO[name].call() | {"output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    with torch.no_grad():
        out = pipe(**call)
    return next(iter(out.values()))


def flags(module: torch.nn.Module) -> dict[str, bool]:
    return {name: p.requires_grad for name, p in module.named_parameters()}


@pytest.mark.parametrize("name", FAMILIES)
def test_roles_leave_no_trace(name: str) -> None:
    pipe = ZOO[name].build()
    base = image(name, pipe)
    policy = moved(pipe)
    before, ours = flags(pipe.components[policy.part]), image(name, pipe)
    assert [n for n, on in before.items() if on] == list(policy.trained), "the LoRA alone is trained"
    assert not torch.equal(ours, base)
    with policy.acting("reference"):
        assert torch.equal(image(name, pipe), base), "the reference is the base model, to the bit"
        assert flags(policy.denoiser) == before
    with policy.acting("old"):
        assert torch.equal(image(name, pipe), base), "old weights are those of the beginning"
    policy.advance("old")
    with policy.acting("old"):
        assert torch.equal(image(name, pipe), ours) and flags(policy.denoiser) == before
    assert torch.equal(image(name, pipe), ours) and flags(policy.denoiser) == before
    assert len({id(p) for p in policy.parameters()}) == len(list(policy.parameters()))


def test_old_weights_follow_by_their_decay() -> None:
    policy = moved(ZOO["sd3"].build())
    start = {n: t.clone() for n, t in policy.weights("old").items()}
    policy.advance("old", 0.75)
    for name, tensor in policy.weights("old").items():
        assert torch.allclose(tensor, 0.75 * start[name] + 0.25 * policy.trained[name]), name
    assert {n.removeprefix("policy.") for n, b in policy.named_buffers() if "old_" in n}, "they are part of a state"


def test_other_weights_do_not_spoil_a_graph() -> None:
    pipe = ZOO["sd3"].build()
    policy = moved(pipe)
    layer = next(m for n, m in policy.denoiser.named_modules() if n.endswith("attn.to_q"))
    x = torch.randn(3, layer.in_features)

    def gradient(switch: bool) -> list[Tensor]:
        loss = layer(x).square().sum()
        if switch:
            with policy.acting("reference"):
                layer(x)
        return list(torch.autograd.grad(loss, [p for n, p in layer.named_parameters() if "lora_" in n]))

    assert all(torch.equal(a, b) for a, b in zip(gradient(False), gradient(True), strict=True))
    with pytest.raises(RuntimeError, match="stop"), policy.acting("old"):
        raise RuntimeError("stop")
    assert all(torch.equal(a, b) for a, b in zip(gradient(False), gradient(True), strict=True))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("alpha", [0.0, 8.0])
def test_a_stock_pipeline_draws_the_trainers_image(name: str, alpha: float, tmp_path: Path) -> None:
    pipe = ZOO[name].build()
    policy = moved(pipe, alpha=alpha)
    ours = image(name, pipe)
    save_lora(tmp_path, policy, {"preset": "none"})
    pattern = rf"{policy.part}\.[A-Za-z0-9_.]+\.lora_[AB]\.weight"
    assert all(re.fullmatch(pattern, key) for key in read_tensors(tmp_path / FILE))
    stock = ZOO[name].build()
    assert not torch.equal(image(name, stock), ours)
    stock.load_lora_weights(tmp_path)
    assert torch.equal(image(name, stock), ours), "to the bit"
    again = Policy(ZOO[name].build(), rank=2)
    load_lora(tmp_path, again)
    assert all(torch.equal(t, lora_tensors(policy)[n]) for n, t in lora_tensors(again).items())


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_kohyas_layout_of_a_unet_is_read_back(name: str, tmp_path: Path) -> None:
    pipe = ZOO[name].build()
    policy = moved(pipe)
    ours = image(name, pipe)
    save_lora(tmp_path / "k.safetensors", policy, {}, "kohya")
    keys = read_tensors(tmp_path / "k.safetensors")
    assert all(re.fullmatch(r"lora_unet_[a-z0-9_]+\.(lora_down\.weight|lora_up\.weight|alpha)", key) for key in keys)
    stock = ZOO[name].build()
    stock.load_lora_weights(tmp_path / "k.safetensors")
    assert torch.allclose(image(name, stock), ours, atol=1e-5)
    with pytest.raises(UsageError, match="kohya's layout is for UNets"):
        save_lora(tmp_path, moved(ZOO["sd3"].build()), {}, "kohya")


def test_files_of_other_models_are_refused_by_name(tmp_path: Path) -> None:
    save_lora(tmp_path, moved(ZOO["sd3"].build()), {})
    with pytest.raises(UsageError, match=r"does not fit this unet: .*; .*; .* and \d+ more"):
        load_lora(tmp_path, Policy(ZOO["sd15"].build(), rank=2))
    with pytest.raises(UsageError, match="is 2x.* and not 3x"):
        load_lora(tmp_path, Policy(ZOO["sd3"].build(), rank=3))
    with pytest.raises(ValueError, match="cannot read the tensors"):
        load_lora(tmp_path / "none.safetensors", Policy(ZOO["sd3"].build(), rank=2))


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(UsageError, match="must be a power of two"):
        Policy(ZOO["sd3"].build(), rank=4, alpha=6)
    with pytest.raises(UsageError, match="none is named nothing"):
        Policy(ZOO["sd3"].build(), targets=("nothing",))
    pipe = ZOO["sd3"].build()
    Policy(pipe)
    with pytest.raises(UsageError, match="has a LoRA already"):
        Policy(pipe)

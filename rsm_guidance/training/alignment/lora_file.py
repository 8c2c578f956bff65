"""LoRA files that stock pipelines and ComfyUI read, with the scale folded into the weights (alpha = rank)."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.io.files import read_tensors, write_tensors
from rsm_guidance.training.alignment.policy import ADAPTER, Policy, Role

FILE, KOHYA = "pytorch_lora_weights.safetensors", "kohya_lora_weights.safetensors"
Format = Literal["diffusers", "kohya"]


def lora_tensors(policy: Policy, role: Role = "policy") -> dict[str, Tensor]:
    """The LoRA by diffusers' names within the denoiser ("blocks.0.attn.to_q.lora_A.weight"), float32, with its scale in lora_B."""
    found = policy.weights(role).items()
    return {_plain(name): (t * policy.scale if "lora_B" in name else t).cpu() for name, t in found}


def save_lora(
    path: Path, policy: Policy, about: Mapping[str, str], kind: Format = "diffusers", role: Role = "policy"
) -> None:
    """Write a LoRA file, atomically.

    Args:
        path: a file, or a folder for the usual name.
        policy: whose.
        about: further entries of the metadata, such as the preset, the reward and the seed.
        kind: "diffusers" (`pipe.load_lora_weights`, and ComfyUI for transformers) or "kohya" (ComfyUI and others for UNets).
        role: which weights.

    Raises:
        UsageError: for kohya's layout of another denoiser than a UNet.
    """
    tensors = {f"{policy.part}.{name}": t for name, t in lora_tensors(policy, role).items()}
    metadata = {**_metadata(policy), **about}
    if kind == "kohya":
        tensors = _kohya(tensors, policy)
        del metadata["lora_adapter_metadata"]  # diffusers takes either this or the alphas
    write_tensors(path if path.suffix == ".safetensors" else path / FILE, tensors, metadata)


def load_lora(path: Path, policy: Policy) -> None:
    """Start a policy from a LoRA file of `save_lora`, or of any trainer that writes diffusers' layout with alpha = rank.

    Raises:
        UsageError: if the file cannot be read, or any tensor does not fit.
    """
    path = path / FILE if path.is_dir() else path
    prefix = f"{policy.part}."
    known = {_plain(name): name for name in policy.trained}
    found = read_tensors(path)
    own = {known.get(k.removeprefix(prefix), k): t for k, t in found.items()}
    policy.load(own, str(path))


def _plain(name: str) -> str:
    return name.replace(f".{ADAPTER}.", ".")


def _metadata(policy: Policy) -> dict[str, str]:
    rank = policy.rank
    config = {"r": rank, "lora_alpha": rank, "target_modules": list(policy.targets), "peft_type": "LORA"}
    return {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"{policy.part}.{key}": value for key, value in config.items()}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": type(policy.denoiser).__name__,
        "modelspec.implementation": "diffusers",
        "modelspec.date": datetime.now(UTC).date().isoformat(),
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(rank),
    }


def _kohya(tensors: dict[str, Tensor], policy: Policy) -> dict[str, Tensor]:
    if policy.part != "unet":
        raise UsageError(
            f"kohya's layout is for UNets, and this is a {policy.part}; ComfyUI reads diffusers' layout of it"
        )
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        path, _, side = name.removesuffix(".weight").removeprefix("unet.").rpartition(".")
        key = f"lora_unet_{path.replace('.', '_')}"
        found[f"{key}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = tensor
        found[f"{key}.alpha"] = torch.tensor(float(policy.rank))
    return found

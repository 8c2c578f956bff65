"""The policy: a LoRA on a pipeline's denoiser, and the other weights that trainings compare it with.

One adapter is in the denoiser.  Beside it are kept the `old` weights, which make the samples, and, where asked for, an `average`
of the policy's.  The `reference` is the base model: the same adapter with lora_B = 0, which adds nothing, unless one is kept,
too.  A switch moves other tensors into the same parameters, so that no flag changes, nothing is counted twice, and DDP sees one
set of parameters.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from rsm_guidance.core.errors import UsageError
from rsm_guidance.engine.families import denoisers_of

Role = Literal["policy", "old", "average", "reference"]
ADAPTER = "policy"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Ends of the names of attention layers, in diffusers' transformers and UNets."""


class Policy(nn.Module):
    """The denoiser with its LoRA, which alone is trained, in float32.

    Args:
        pipe: any pipeline with one denoiser; its denoiser is changed in place.
        rank: of the LoRA.
        alpha: the LoRA is scaled by alpha / rank, a power of two, so that a file with the scale folded in is exact; 0 for 1.
        targets: names, or ends of names, of the layers that have one.
        kept: roles whose weights are kept; a reference that is kept can become another than the base model.

    Attributes:
        part: name of the denoiser in the pipeline ("transformer", "unet").
        denoiser: the module.

    Raises:
        UsageError: for pipelines with several denoisers, targets that no layer has, and other scales.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        rank: int = 16,
        alpha: float = 0.0,
        targets: Sequence[str] = ATTENTION,
        kept: Sequence[Role] = ("old",),
    ) -> None:
        super().__init__()
        self.scale = _scale(rank, alpha)
        found = denoisers_of(pipe)
        if len(found) != 1:
            raise UsageError(f"{type(pipe).__name__} has {len(found)} denoisers; a policy is a LoRA on a single one")
        [(self.part, denoiser)] = found.items()
        if any("lora_" in name for name, _ in denoiser.named_parameters()):
            raise UsageError(
                f"the {self.part} has a LoRA already; fuse or unload it first (pipe.fuse_lora, unload_lora_weights)"
            )
        self.denoiser: Any = denoiser.requires_grad_(False)
        self.rank, self.targets, self.kept = rank, tuple(targets), tuple(kept)
        _add_lora(self.denoiser, rank, self.scale * rank, self.targets)
        for parameter in self.trained.values():
            parameter.data = parameter.data.float()  # an update of half-precision weights is mostly rounded away
        for role in self.kept:
            for name, tensor in self.weights("policy").items():
                self.register_buffer(_buffer(role, name), tensor.clone())  # part of a saved state

    def train(self, mode: bool = True) -> "Policy":
        """Always as in evaluation: dropout would make ratios differ from 1 on policy."""
        return super().train(False)

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The LoRA's parameters by their names in the denoiser."""
        return {name: p for name, p in self.denoiser.named_parameters() if "lora_" in name}

    def weights(self, role: Role) -> dict[str, Tensor]:
        """The LoRA's tensors in a role, by name."""
        if role == "policy":
            return {name: p.detach() for name, p in self.trained.items()}
        if role in self.kept:
            return {name: self.get_buffer(_buffer(role, name)) for name in self.trained}
        if role != "reference":
            raise UsageError(f"this policy keeps no {role!r} weights, only {', '.join(self.kept) or 'none'}")
        return {n: torch.zeros_like(p) if "lora_B" in n else p.detach() for n, p in self.trained.items()}

    @contextmanager
    def acting(self, role: Role) -> Iterator[None]:
        """Let the denoiser have other weights for a while, in which no graph may be built."""
        if role == "policy":
            yield
            return
        held_by = self.trained
        held = {name: p.data for name, p in held_by.items()}
        for name, tensor in self.weights(role).items():
            held_by[name].data = tensor
        try:
            with torch.no_grad():
                yield
        finally:
            for name, parameter in held_by.items():
                parameter.data = held[name]

    @torch.no_grad()
    def advance(self, role: Role, decay: float = 0.0) -> None:
        """Kept weights <- decay * kept + (1 - decay) * policy; with 0 they become the policy's."""
        if not 0 <= decay <= 1:
            raise UsageError(f"the decay of the {role} policy lies in [0, 1]; got {decay}")
        if role == "policy" or role not in self.kept:
            raise UsageError(f"this policy keeps no {role!r} weights, only {', '.join(self.kept) or 'none'}")
        for name, parameter in self.trained.items():
            self.get_buffer(_buffer(role, name)).lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor], where: str) -> None:
        """Take over a LoRA's tensors, by their names in the denoiser, with the scale folded into lora_B.

        Raises:
            UsageError: if any is missing, unknown or of another shape, naming up to three.
        """
        own = self.trained
        faults = [
            *(f"{k} is missing" for k in own if k not in tensors),
            *(f"{k} has no place" for k in tensors if k not in own),
            *(
                f"{k} is {_size(t)} and not {_size(own[k])}"
                for k, t in tensors.items()
                if k in own and t.shape != own[k].shape
            ),
        ]
        if faults:
            more = f" and {len(faults) - 3} more" if len(faults) > 3 else ""
            raise UsageError(f"the LoRA in {where} does not fit this {self.part}: {'; '.join(faults[:3])}{more}")
        for name, parameter in own.items():
            parameter.copy_(tensors[name] / self.scale if "lora_B" in name else tensors[name])
        for role in self.kept:
            if role != "reference":
                self.advance(role)


def _scale(rank: int, alpha: float) -> float:
    if rank < 1:
        raise UsageError(f"lora_rank must be positive; got {rank}")
    scale = (alpha or rank) / rank
    if not (0 < scale < math.inf) or math.frexp(scale)[0] != 0.5:
        raise UsageError(
            f"lora_alpha / lora_rank must be a power of two, so that files with the scale folded in are exact; got {alpha:g} / {rank}"
        )
    return scale


def _add_lora(denoiser: nn.Module, rank: int, alpha: float, targets: tuple[str, ...]) -> None:
    from peft import LoraConfig, inject_adapter_in_model  # takes seconds to import

    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian")  # type: ignore[arg-type]
    try:
        inject_adapter_in_model(config, denoiser, ADAPTER)
    except ValueError as error:
        raise UsageError(
            f"the LoRA has no layer to go to: none is named {', '.join(targets)}; set lora_targets"
        ) from error


def _buffer(role: Role, name: str) -> str:
    return f"{role}_" + name.replace(".", "_")


def _size(tensor: Tensor) -> str:
    return "x".join(map(str, tensor.shape))

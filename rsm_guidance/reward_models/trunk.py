"""The lower part of a denoiser, up to the last block that the reward head reads."""

import copy
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.reward_models.backbone import denoiser_of
from rsm_guidance.reward_models.blocks import (
    OUTPUTS,
    Grid,
    block_lists,
    block_names,
    cost_of,
    plane_of,
    prediction_plane,
    prediction_width,
    width_of,
)


class Trunk(nn.Module):
    """A denoiser that ends at its last tapped block: noisy latents to visual features.

    The denoiser's own forward pass runs over a shell of it: the same modules, but lists of blocks that end early, and outputs
    that compute nothing.  No pass is broken off, so that `torch.compile`, FSDP and hooks see whole ones.

    Args:
        pipe: the pipeline whose denoiser to cut.
        blocks: how many of its blocks to keep, from the input.
        taps: names of the blocks to read ("mid_block", "up_blocks.1", "transformer_blocks.5"); default the last kept.
        share: use the denoiser's own modules (for a frozen backbone) instead of a copy of what is kept.
        predicts: read what the output layers make of the last kept block, instead of blocks.

    Attributes:
        taps: names of the blocks that are read.
        dim: channels of the features, of all taps together.
        depth_share: cost of a pass, as a share of one denoiser evaluation.
    """

    def __init__(
        self, pipe: DiffusionPipeline, blocks: int, taps: tuple[str, ...], share: bool, predicts: bool = False
    ) -> None:
        super().__init__()
        denoiser = denoiser_of(pipe)
        names = block_names(denoiser)
        if not 1 <= blocks <= len(names):
            raise UsageError(f"blocks must be between 1 and {len(names)}, the denoiser's depth; got {blocks}")
        kept = names[:blocks]
        unknown = [t for t in taps if t not in kept]
        if unknown:
            raise UsageError(f"cannot read {unknown[0]!r}; the kept blocks are {', '.join(kept)}")
        self.taps = taps or (kept[-1],)
        if any(t.startswith("down_blocks") for t in self.taps):
            raise UsageError(
                "of a UNet only the middle and upper blocks can be read: keep more blocks, or name other taps"
            )
        self._kept = kept[: 1 + max(kept.index(tap) for tap in self.taps)] if share else kept
        self.depth_share = cost_of(denoiser, kept) / cost_of(denoiser, names)
        self._predicts = predicts
        if predicts and "block_out_channels" in denoiser.config and blocks < len(names):
            raise UsageError(f"the output layers of a UNet read all of its blocks: keep all {len(names)}; got {blocks}")
        self.dim = prediction_width(denoiser) if predicts else sum(width_of(denoiser, tap) for tap in self.taps)
        self._shared = (denoiser,) if share else None  # in a tuple, so that its parameters are not ours
        if not share:
            self.denoiser = copy.deepcopy(_shell(denoiser, kept, predicts)).requires_grad_(True)

    @property
    def module(self) -> Any:
        """The denoiser that is run: a copy of the kept part, or the pipeline's own."""
        return self.denoiser if self._shared is None else self._shared[0]

    def forward(self, arguments: dict[str, Any], grid: Grid) -> tuple[Tensor, Grid]:
        """Features of a batch.

        Args:
            arguments: what the denoiser is called with, by name.
            grid: rows and columns of the image tokens.

        Returns:
            Visual tokens [B, rows * columns, dim], and their rows and columns.
        """
        module = self.module
        # A shared denoiser may have been changed since (LoRA, checkpointing), so its shell is made of what it is now.
        shell = module if self._shared is None else _shell(module, self._kept, self._predicts)
        seen: dict[str, Tensor] = {}
        handles = [shell.get_submodule(tap).register_forward_hook(_Reader(seen, tap)) for tap in self.taps]
        hook = getattr(module, "_hf_hook", None) if self._shared is not None else None
        try:
            if hook is not None:  # offloading: brings the weights, which are the shell's, too
                _, arguments = hook.pre_forward(module, **arguments)
            predicted = shell(**{**arguments, "return_dict": False})[0]
            if hook is not None:
                hook.post_forward(module, None)
        finally:
            for handle in handles:
                handle.remove()
        if self._predicts:
            plane = prediction_plane(predicted, grid)
            return plane.flatten(2).transpose(1, 2), (plane.shape[-2], plane.shape[-1])
        read = [plane_of(module, tap, seen[tap], arguments, grid) for tap in self.taps]
        rows, columns = read[0].shape[-2:]
        planes = [p if p.shape[-2:] == (rows, columns) else F.adaptive_avg_pool2d(p, (rows, columns)) for p in read]
        features = planes[0] if len(planes) == 1 else torch.cat(planes, 1)
        return features.flatten(2).transpose(1, 2), (rows, columns)

    def tuned(self, blocks: int) -> list[tuple[str, nn.Parameter]]:
        """Parameters of the last kept blocks by name.

        Raises:
            UsageError: if fewer are kept.
        """
        if blocks > len(self._kept):
            raise UsageError(f"tuned_blocks must be at most the {len(self._kept)} kept ones; got {blocks}")
        starts = tuple(f"denoiser.{name}." for name in self._kept[-blocks:])
        return [(name, p) for name, p in self.named_parameters() if name.startswith(starts)]

    def tune(self, blocks: int) -> None:
        """Let only the last kept blocks be trained."""
        self.requires_grad_(False)
        for _, parameter in self.tuned(blocks):
            parameter.requires_grad_(True)


class _Reader:
    """A forward hook that keeps a block's output."""

    def __init__(self, seen: dict[str, Any], tap: str) -> None:
        self._seen, self._tap = seen, tap

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._seen[self._tap] = output


class _Lower(nn.ModuleList):
    """The first modules of a list that still tells its whole length, from which some denoisers count (Chroma)."""

    def __init__(self, modules: list[nn.Module], length: int) -> None:
        super().__init__(modules)
        self.length = length

    def __len__(self) -> int:
        return getattr(self, "length", len(self._modules))

    def __iter__(self) -> Any:
        return iter(self._modules.values())


class _Skipped(nn.Module):
    """Stands where an upper block of a UNet was, which takes as many skip connections."""

    has_cross_attention = False

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.resnets = (None,) * len(block.resnets)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states


class _NoOutput(nn.Module):
    """Stands where an output layer was: nothing is computed, but what follows finds the shape that it expects."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        projections = [getattr(layer, n, None) for n in ("linear_2", "linear")] + [layer]
        found: Any = next((p for p in projections if isinstance(p, nn.Linear | nn.Conv2d)), None)
        self.width = None if found is None else getattr(found, "out_features", None) or found.out_channels
        self.axis = 1 if isinstance(found, nn.Conv2d) else -1

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.width is None:
            return hidden_states
        shape = list(hidden_states.shape)
        shape[self.axis] = self.width
        return hidden_states.new_zeros(shape)


def _shell(denoiser: nn.Module, kept: list[str], predicts: bool) -> nn.Module:
    """The denoiser over the same modules, without the blocks that are not kept, and unless it `predicts` without outputs."""
    shell = copy.copy(denoiser)
    modules = dict(denoiser._modules)
    for name in block_lists(denoiser):
        blocks = modules[name]
        if isinstance(blocks, nn.ModuleList):
            ours = [b for i, b in enumerate(blocks) if f"{name}.{i}" in kept]
            if name == "up_blocks":
                ours += [_Skipped(b) for b in list(blocks)[len(ours) :]]
            modules[name] = _Lower(ours, len(blocks))
    for name in () if predicts else OUTPUTS:
        layer = modules.get(name)
        if isinstance(layer, nn.ModuleDict):
            modules[name] = nn.ModuleDict({key: _NoOutput(part) for key, part in layer.items()})
        elif layer is not None:
            modules[name] = _NoOutput(layer)
    # Instance attributes that would lead back to the whole denoiser: offload hooks, a compiled call.
    state = {k: v for k, v in vars(shell).items() if k not in ("forward", "_old_forward", "_hf_hook")}
    vars(shell).clear()
    vars(shell).update(state | {"_modules": modules, "_compiled_call_impl": None})
    return shell

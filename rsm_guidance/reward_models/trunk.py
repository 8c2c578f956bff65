"""The lower part of a denoiser, up to the last block that the reward head reads."""

import copy
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.nn import functional as F

from rsm_guidance.reward_models.backbones import Backbone, Grid, backbone_of, denoiser_of

_AFTER = (
    "norm_out",
    "proj_out",
    "conv_norm_out",
    "conv_out",
    "all_final_layer",
)  # what only the denoiser's output needs


class _ReachedLastTap(Exception):
    """Ends a denoiser's forward pass."""


class Trunk(nn.Module):
    """A denoiser that stops at its last tapped block: noisy latents to visual features.

    Args:
        pipe: the pipeline whose denoiser to cut.
        blocks: how many of its blocks to keep, from the input.
        taps: names of the blocks to read ("mid_block", "up_blocks.1", "transformer_blocks.5"); default the last kept.
        share: use the denoiser itself (for a frozen backbone) instead of a copy of what is kept of it.

    Attributes:
        dim: channels of the features, of all taps together.
        depth_share: cost of a pass, as a share of one denoiser evaluation.
    """

    def __init__(self, pipe: DiffusionPipeline, blocks: int, taps: tuple[str, ...], share: bool) -> None:
        super().__init__()
        self.backbone: Backbone = backbone_of(pipe)
        denoiser = denoiser_of(pipe)
        names = block_names(denoiser, self.backbone)
        if not 1 <= blocks <= len(names):
            raise ValueError(f"blocks must be between 1 and {len(names)}, the denoiser's depth; got {blocks}")
        kept, dropped = names[:blocks], names[blocks:]
        unknown = [t for t in taps if t not in kept]
        if unknown:
            raise ValueError(f"cannot read {unknown[0]!r}; the kept blocks are {', '.join(kept)}")
        self.taps = taps or (kept[-1],)
        if any(t.startswith("down_blocks") for t in self.taps):
            raise ValueError(
                "of a UNet only the middle and upper blocks can be read: keep more blocks, or name other taps"
            )
        self.depth_share = _cost(denoiser, kept) / _cost(denoiser, names)
        self.dim = sum(_width(denoiser, tap) for tap in self.taps)
        if share:
            self._shared = (denoiser,)  # in a tuple, so that its parameters are not ours
        else:
            left = [denoiser.get_submodule(n) for n in dropped] + [getattr(denoiser, n, None) for n in _AFTER]
            memo = {id(m): nn.Identity() for m in left if isinstance(m, nn.Module)}
            self.denoiser = copy.deepcopy(denoiser, memo).requires_grad_(True)

    @property
    def module(self) -> Any:
        """The denoiser that is run."""
        return self.denoiser if hasattr(self, "denoiser") else self._shared[0]

    def forward(self, arguments: dict[str, Any], grid: Grid) -> tuple[Tensor, Grid]:
        """Features of a batch.

        Args:
            arguments: what the denoiser is called with (`Backbone.call`).
            grid: rows and columns of the image tokens.

        Returns:
            Visual tokens [B, rows * columns, dim], and their rows and columns.
        """
        seen: dict[str, Tensor] = {}

        def read(name: str) -> Any:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                seen[name] = _plane(output, grid)
                if len(seen) == len(self.taps):
                    raise _ReachedLastTap

            return hook

        handles = [self.module.get_submodule(tap).register_forward_hook(read(tap)) for tap in self.taps]
        try:
            self.module(**arguments, return_dict=False)
        except _ReachedLastTap:
            pass
        finally:
            for handle in handles:
                handle.remove()
        rows, columns = seen[self.taps[0]].shape[-2:]
        planes = [
            p if p.shape[-2:] == (rows, columns) else F.adaptive_avg_pool2d(p, (rows, columns)) for p in seen.values()
        ]
        features = planes[0] if len(planes) == 1 else torch.cat(planes, 1)
        return features.flatten(2).transpose(1, 2), (rows, columns)


def block_names(denoiser: nn.Module, backbone: Backbone) -> list[str]:
    """Names of a denoiser's blocks, in the order they run."""
    names = []
    for name in backbone.blocks:
        module = denoiser.get_submodule(name)
        names += [f"{name}.{i}" for i in range(len(module))] if isinstance(module, nn.ModuleList) else [name]
    return names


def _plane(output: Any, grid: Grid) -> Tensor:
    """A block's output as features [B, C, rows, columns]; the image stream of joint blocks, the image's tokens first."""
    tokens: Tensor = output[-1] if isinstance(output, tuple) else output
    if tokens.ndim == 4:
        return tokens
    return tokens[:, : grid[0] * grid[1]].transpose(1, 2).unflatten(2, grid)


def _width(denoiser: Any, tap: str) -> int:
    config = denoiser.config
    if "block_out_channels" in config:
        sizes = list(config.block_out_channels)
        return int(sizes[-1] if tap == "mid_block" else sizes[::-1][int(tap.rpartition(".")[2])])
    if "dim" in config:
        return int(config.dim)
    return int(config.num_attention_heads * config.attention_head_dim)


def _cost(denoiser: Any, names: list[str]) -> float:
    """Blocks that are all alike count one each; those of a UNet by their parameters."""
    if "block_out_channels" in denoiser.config:
        return float(sum(p.numel() for n in names for p in denoiser.get_submodule(n).parameters()))
    return float(len(names))

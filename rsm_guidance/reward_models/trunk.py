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
    embedding_of,
    has_text,
    output_plane,
    output_width,
    plane_of,
    text_of,
    width_of,
)
from rsm_guidance.reward_models.config import DRMConfig
from rsm_guidance.reward_models.heads import HEADS, Features, Widths


class Trunk(nn.Module):
    """A denoiser that ends at its last tapped block: noisy latents to what the reward head reads.

    The denoiser's own forward pass runs over a shell of it: the same modules, but lists of blocks that end early, and outputs
    that compute nothing (unless the head reads them).  No pass is broken off, so that `torch.compile`, FSDP and hooks see
    whole ones.

    Args:
        pipe: the pipeline whose denoiser to cut.
        config: which blocks to keep and to read, for which head; a frozen trunk uses the denoiser's own modules, any other
            a copy of what is kept.

    Attributes:
        taps: names of the blocks that are read; empty where the denoiser's output is.
        widths: channels of what is read.
        depth_share: cost of a pass, as a share of one denoiser evaluation.
    """

    def __init__(self, pipe: DiffusionPipeline, config: DRMConfig) -> None:
        super().__init__()
        denoiser, head = denoiser_of(pipe), HEADS[config.head]
        names = block_names(denoiser)
        kept = _kept_blocks(denoiser, names, config)
        self._outputs, share = head.reads_output, config.adaptation == "frozen"
        self.taps = () if self._outputs else config.taps or (kept[-1],)
        self.text_taps = config.text_taps
        self._embedding = embedding_of(denoiser)[0] if head.reads_embedding else ""
        read = [kept.index(tap) for tap in (*self.taps, *self.text_taps)]
        self._kept = kept[: 1 + max(read)] if share and read else kept
        self.depth_share = cost_of(denoiser, kept) / cost_of(denoiser, names)
        self.widths = widths_of(denoiser, config)
        self._shared = (denoiser,) if share else None  # in a tuple, so that its parameters are not ours
        if not share:
            self.denoiser = copy.deepcopy(_shell(denoiser, kept, self._outputs)).requires_grad_(True)

    @property
    def module(self) -> Any:
        """The denoiser that is run: a copy of the kept part, or the pipeline's own."""
        return self.denoiser if self._shared is None else self._shared[0]

    def last_blocks(self, count: int) -> list[nn.Module]:
        """The last blocks kept, and what comes after them."""
        if count > len(self._kept):
            raise UsageError(f"tuned_blocks is {count}, of {len(self._kept)} blocks kept")
        after = [getattr(self.module, name, None) for name in OUTPUTS] if self._outputs else []
        return [self.module.get_submodule(name) for name in self._kept[-count:]] + [m for m in after if m is not None]

    def forward(self, arguments: dict[str, Any], grid: Grid) -> Features:
        """What the head reads of a batch.

        Args:
            arguments: what the denoiser is called with, by name.
            grid: rows and columns of the image tokens.
        """
        if self._shared is not None and not _need_gradient(arguments):
            with torch.no_grad():  # nothing below the head learns
                return self._read(arguments, grid)
        return self._read(arguments, grid)

    def _read(self, arguments: dict[str, Any], grid: Grid) -> Features:
        module = self.module
        # A shared denoiser may have been changed since (LoRA, checkpointing), so its shell is made of what it is now.
        shell = module if self._shared is None else _shell(module, self._kept, self._outputs)
        seen: dict[str, Any] = {}
        read = dict.fromkeys((*self.taps, *self.text_taps, *([self._embedding] if self._embedding else [])))
        handles = [shell.get_submodule(name).register_forward_hook(_Reader(seen, name)) for name in read]
        hook = getattr(module, "_hf_hook", None) if self._shared is not None else None
        try:
            if hook is not None:  # offloading: brings the weights, which are the shell's, too
                _, arguments = hook.pre_forward(module, **arguments)
            output = shell(**arguments)
            if hook is not None:
                hook.post_forward(module, None)
        finally:
            for handle in handles:
                handle.remove()
        planes = [plane_of(module, tap, seen[tap], arguments, grid) for tap in self.taps]
        tokens, grid = _tokens(planes or [output_plane(output, grid)])
        text = tuple(text_of(module, tap, seen[tap]) for tap in self.text_taps)
        return Features(tokens, grid, text, seen[self._embedding] if self._embedding else None)


def widths_of(denoiser: Any, config: DRMConfig) -> Widths:
    """Channels of what a head reads of a denoiser."""
    head, kept = HEADS[config.head], _kept_blocks(denoiser, block_names(denoiser), config)
    taps = config.taps or (kept[-1],)
    image = (output_width(denoiser),) if head.reads_output else tuple(width_of(denoiser, tap) for tap in taps)
    text = tuple(width_of(denoiser, tap) for tap in config.text_taps)
    return Widths(image, text, embedding_of(denoiser)[1] if head.reads_embedding else 0)


def _kept_blocks(denoiser: nn.Module, names: list[str], config: DRMConfig) -> list[str]:
    """Names of the blocks kept, after checks that the denoiser has what the configuration reads."""
    if not 1 <= config.blocks <= len(names):
        raise UsageError(f"blocks must be between 1 and {len(names)}, the denoiser's depth; got {config.blocks}")
    kept = names[: config.blocks]
    unknown = [t for t in (*config.taps, *config.text_taps) if t not in kept]
    if unknown:
        raise UsageError(f"cannot read {unknown[0]!r}; the kept blocks are {', '.join(kept)}")
    if not HEADS[config.head].reads_output and any(t.startswith("down_blocks") for t in config.taps or kept[-1:]):
        raise UsageError("of a UNet only the middle and upper blocks can be read: keep more blocks, or name other taps")
    silent = [t for t in config.text_taps if not has_text(denoiser, t)]
    if silent:
        raise UsageError(f"{silent[0]} of {type(denoiser).__name__} puts out no text tokens; leave it out of text_taps")
    if HEADS[config.head].reads_output and "up_blocks.0" in names and len(kept) < len(names):
        raise UsageError(
            f"the head {config.head!r} reads the denoiser's output, which a UNet has after its last block only: keep all "
            f"{len(names)} blocks, or take another head"
        )
    return kept


def _tokens(planes: list[Tensor]) -> tuple[Tensor, Grid]:
    """Planes [B, C, ...] as tokens [B, rows * columns, sum of C] on the grid of the first."""
    rows, columns = planes[0].shape[-2:]
    planes = [p if p.shape[-2:] == (rows, columns) else F.adaptive_avg_pool2d(p, (rows, columns)) for p in planes]
    features = planes[0] if len(planes) == 1 else torch.cat(planes, 1)
    return features.flatten(2).transpose(1, 2), (rows, columns)


def _need_gradient(value: Any) -> bool:
    """Whether a tensor of a denoiser's arguments needs a gradient."""
    if isinstance(value, Tensor):
        return value.requires_grad
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return any(_need_gradient(part) for part in parts)


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


def _shell(denoiser: nn.Module, kept: list[str], outputs: bool) -> nn.Module:
    """The denoiser over the same modules, without the blocks that are not kept, and without `outputs` unless asked for."""
    shell = copy.copy(denoiser)
    modules = dict(denoiser._modules)
    for name in block_lists(denoiser):
        blocks = modules[name]
        if isinstance(blocks, nn.ModuleList):
            ours = [b for i, b in enumerate(blocks) if f"{name}.{i}" in kept]
            if name == "up_blocks":
                ours += [_Skipped(b) for b in list(blocks)[len(ours) :]]
            modules[name] = _Lower(ours, len(blocks))
    for name in () if outputs else OUTPUTS:
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

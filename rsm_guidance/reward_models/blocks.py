"""Which modules of a denoiser are its blocks, and where in a block's output the image is."""

from typing import Any, Literal

import torch
from diffusers.models.embeddings import TimestepEmbedding
from torch import Tensor, nn

from rsm_guidance.core.contracts import UsageError

Grid = tuple[int, int]
"""Rows and columns of image tokens; the frames of a video stand one below the other."""

_LISTS = (
    ("down_blocks", "mid_block", "up_blocks"),
    ("transformer_blocks", "single_transformer_blocks"),
    ("double_stream_blocks", "single_stream_blocks"),
    ("blocks",),
    ("layers",),
)
"""Names that diffusers' denoisers give their blocks, in the order they run; the first group that a denoiser has is its own."""

OUTPUTS = ("norm_out", "proj_out", "conv_norm_out", "conv_out", "all_final_layer", "final_layer")
"""What only a denoiser's output needs."""

Place = Literal["first", "after text", "after mask"]
_PLACES: dict[tuple[str, str], Place] = {
    ("ChromaTransformer2DModel", "single_transformer_blocks"): "after text",
    ("Flux2Transformer2DModel", "single_transformer_blocks"): "after text",
    ("Lumina2Transformer2DModel", "layers"): "after mask",
}
"""Where image tokens stand in a block's output, by denoiser and list; first in all others."""

_IMAGE_BEFORE_TEXT = ("HiDreamImageTransformer2DModel",)
"""Denoisers whose joint blocks return (image, text); all others return (text, image)."""


def block_lists(denoiser: nn.Module) -> tuple[str, ...]:
    """Names of the modules (or lists of modules) that hold a denoiser's blocks, in the order they run.

    Raises:
        UsageError: for a denoiser whose blocks have other names.
    """
    for group in _LISTS:
        found = tuple(name for name in group if isinstance(getattr(denoiser, name, None), nn.Module))
        if found and found[0] == group[0]:
            return found
    raise UsageError(
        f"a reward model reads the blocks of a denoiser, and those of {type(denoiser).__name__} were not found; use a "
        "reward function, which scores decoded images"
    )


def block_names(denoiser: nn.Module) -> list[str]:
    """Names of a denoiser's blocks, in the order they run."""
    names = []
    for name in block_lists(denoiser):
        module = denoiser.get_submodule(name)
        names += [f"{name}.{i}" for i in range(len(module))] if isinstance(module, nn.ModuleList) else [name]
    return names


def plane_of(denoiser: nn.Module, tap: str, output: Any, arguments: dict[str, Any], grid: Grid) -> Tensor:
    """A block's output as features [B, C, rows, columns] of the image.

    Args:
        denoiser: whose block it is.
        tap: name of the block.
        output: what it returned: planes, tokens, or tokens of text and image.
        arguments: what the denoiser was called with; tells the length of the text.
        grid: rows and columns of the image's tokens.
    """
    kind = type(denoiser).__name__
    if isinstance(output, tuple):
        output = output[0 if kind in _IMAGE_BEFORE_TEXT else -1]
    tokens: Tensor = output
    if tokens.ndim == 4:
        return tokens
    size = grid[0] * grid[1]
    place = _PLACES.get((kind, tap.rpartition(".")[0]), "first")
    if place == "after mask":  # the texts of a batch have their own lengths
        starts = arguments["encoder_attention_mask"].sum(1).tolist()
        rows = [t[int(start) : int(start) + size] for t, start in zip(tokens, starts, strict=True)]
        tokens = torch.stack(rows)
    else:
        start = arguments["encoder_hidden_states"].shape[1] if place == "after text" else 0
        tokens = tokens[:, start : start + size]
    return tokens.transpose(1, 2).unflatten(2, grid)


def text_of(denoiser: nn.Module, tap: str, output: Any) -> Tensor:
    """The text tokens [B, T, C] of a joint block's output."""
    text = output[1 if type(denoiser).__name__ in _IMAGE_BEFORE_TEXT else 0] if isinstance(output, tuple) else None
    if not isinstance(text, Tensor):
        raise UsageError(f"{tap} of {type(denoiser).__name__} puts out no text tokens; leave it out of text_taps")
    return text


def has_text(denoiser: nn.Module, tap: str) -> bool:
    """Whether a block puts out text tokens beside those of the image."""
    return any(name.endswith("to_add_out") for name, _ in denoiser.get_submodule(tap).named_modules())


def output_plane(output: Any, grid: Grid) -> Tensor:
    """A denoiser's output as a plane [B, C, rows, columns]; of packed latents, of packed size.

    Frames stand one below the other.
    """
    found = output[0] if isinstance(output, tuple) else getattr(output, "sample", output)
    plane: Tensor = torch.stack(list(found)) if isinstance(found, list) else found
    if plane.ndim == 3:
        return plane[:, : grid[0] * grid[1]].transpose(1, 2).unflatten(2, grid)
    return plane.flatten(2, 3) if plane.ndim == 5 else plane


def output_width(denoiser: Any) -> int:
    """Channels of a denoiser's output; of packed latents, which have the square of the patch size as many, packed."""
    config = denoiser.config
    width, patch = int(config.get("out_channels") or config.in_channels), config.get("patch_size")
    packed = isinstance(patch, int) and config.in_channels == width * patch**2
    return int(config.in_channels) if packed else width


def embedding_of(denoiser: nn.Module) -> tuple[str, int]:
    """The module whose output tells the blocks their noise level, and its channels.

    SD3 and its kin add the pooled prompt in `time_text_embed`; of others it is the embedding of the timestep.

    Raises:
        UsageError: for a denoiser without one.
    """
    joint = "time_text_embed"
    for name, module in denoiser.named_modules():
        if isinstance(module, TimestepEmbedding):
            return joint if name.startswith(joint) else name, int(module.linear_2.out_features)
        if name == "t_embedder":
            linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
            return name, int(linears[-1].out_features)
    raise UsageError(
        f"the head 'query' reads the embedding of the noise level, and {type(denoiser).__name__} has none of the usual "
        "kind; use another head"
    )


def width_of(denoiser: Any, tap: str) -> int:
    """Channels of a block's features."""
    config = denoiser.config
    if "block_out_channels" in config:
        sizes = list(config.block_out_channels)
        return int(sizes[-1] if tap == "mid_block" else sizes[::-1][int(tap.rpartition(".")[2])])
    for name in ("dim", "hidden_size"):
        if name in config:
            return int(config[name])
    return int(config.num_attention_heads * config.attention_head_dim)


def cost_of(denoiser: Any, names: list[str]) -> float:
    """Blocks that are all alike count one each; those of a UNet by their parameters."""
    if "block_out_channels" in denoiser.config:
        return float(sum(p.numel() for n in names for p in denoiser.get_submodule(n).parameters()))
    return float(len(names))


def token_grid(denoiser: Any, latents: Tensor) -> Grid | None:
    """Rows and columns of image tokens for latents [B, C, H, W] or [B, C, F, H, W]; None for packed ones [B, S, C]."""
    if latents.ndim == 3:
        return None
    config = denoiser.config
    patch = config.get("patch_size") or (config.get("all_patch_size") or [1])[0]
    frame, height, width = patch if isinstance(patch, list | tuple) else (1, patch, patch)
    frames = latents.shape[2] // frame if latents.ndim == 5 else 1
    return frames * (latents.shape[-2] // height), latents.shape[-1] // width

"""The lower part of a denoiser, up to the block the reward head reads."""

import copy

from diffusers import SD3Transformer2DModel
from torch import Tensor, nn


class SD3Trunk(nn.Module):
    """The first `blocks` joint blocks of an SD3 transformer: noisy latents to visual tokens.

    Args:
        transformer: the denoiser to cut.
        blocks: how many of its blocks to keep, from the input.
        share: use the denoiser's own modules (for a frozen backbone) instead of a copy.
    """

    def __init__(self, transformer: SD3Transformer2DModel, blocks: int, share: bool) -> None:
        super().__init__()
        total = len(transformer.transformer_blocks)
        # The last block of SD3 drops its text stream, which costs nothing here, so it may be kept too.
        if not 1 <= blocks <= total:
            raise ValueError(f"blocks must be between 1 and {total}, the denoiser's depth; got {blocks}")

        def own(module: nn.Module) -> nn.Module:
            return module if share else copy.deepcopy(module).requires_grad_(True)

        self.patch_size: int = transformer.config.patch_size
        self.dim: int = transformer.inner_dim
        self.depth_share = blocks / total
        self.pos_embed = own(transformer.pos_embed)
        self.time_text_embed = own(transformer.time_text_embed)
        self.context_embedder = own(transformer.context_embedder)
        self.blocks = nn.ModuleList([own(block) for block in transformer.transformer_blocks[:blocks]])

    def forward(self, latents: Tensor, timestep: Tensor, tokens: Tensor, pooled: Tensor) -> Tensor:
        """Visual tokens [B, H * W / patch^2, dim].

        Args:
            latents: noisy latents [B, C, H, W].
            timestep: model timesteps [B], 1000 * sigma.
            tokens: text tokens [B, L, joint_attention_dim].
            pooled: pooled text [B, pooled_projection_dim].
        """
        hidden = self.pos_embed(latents)
        temb = self.time_text_embed(timestep, pooled)
        text = self.context_embedder(tokens)
        for block in self.blocks:
            text, hidden = block(hidden_states=hidden, encoder_hidden_states=text, temb=temb)
        visual: Tensor = hidden
        return visual

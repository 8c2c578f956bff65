"""The embedded text-to-image model: its parts.

A `StableDiffusion3Pipeline` in stock layout: SD3Transformer2DModel, AutoencoderKL, two CLIP text encoders, a
tokenizer whose vocabulary is the caption grammar, FlowMatchEulerDiscreteScheduler.

The stock pipeline stands in 256 zero tokens for a missing third text encoder, which quadruples the length of the
sequence of so small a model.  `AbsentTextEncoder` takes the third place and contributes a single zero token (the stock
code cannot reshape none), so that a plain `pipe(prompt)` is as fast as the model is.
"""

import itertools
from collections import Counter

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
    T5Config,
    T5EncoderModel,
)

from rsm_guidance.shapes.scenes import vocabulary

TOKENS = 16
_END = "</w>"
_WIDTHS = (128, 32)  # of the two text encoders; their sum is the joint attention width


class AbsentTextEncoder(T5EncoderModel):
    """Stands in for a third text encoder: token ids [B, L] to one zero token [B, 1, d_model]."""

    _tied_weights_keys = None

    def __init__(self, config: T5Config) -> None:
        PreTrainedModel.__init__(self, config)  # skips building a T5
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # gives the module a dtype and a device
        self.post_init()

    def _init_weights(self, module: torch.nn.Module) -> None:
        """Nothing to initialise."""

    def get_input_embeddings(self) -> torch.nn.Module | None:
        """There are none."""
        return None

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.anchor.new_zeros(input_ids.shape[0], 1, self.config.d_model),)


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer in which every word of the grammar is one token, and other words fall apart into letters."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789.,!?'-")
    merges = _merges(vocabulary())
    symbols = dict.fromkeys([*letters, *(c + _END for c in letters), *(a + b for a, b in merges)])
    symbols |= dict.fromkeys(["<|startoftext|>", "<|endoftext|>"])
    return CLIPTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=merges, model_max_length=TOKENS)


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges until every word is one symbol, the most frequent pair first.

    The tokenizers library's trainer breaks ties differently in every process, which a resumed training cannot stand.
    """
    spelled = [[*word[:-1], word[-1] + _END] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in spelled for pair in itertools.pairwise(word)):
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        spelled = [_merged(word, best) for word in spelled]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def build_text_encoder(tokenizer: CLIPTokenizer, index: int) -> CLIPTextModelWithProjection:
    """One of the two untrained text encoders (index 0: width 128, 3 layers; index 1: width 32, 2 layers)."""
    width = _WIDTHS[index]
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width * 3,
        projection_dim=width // 2,
        num_hidden_layers=(3, 2)[index],
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config)


def build_transformer() -> SD3Transformer2DModel:
    """The untrained denoiser: 6 joint blocks of width 128 on 8x8 patches of the 16x16x4 latents."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=sum(_WIDTHS),
        caption_projection_dim=128,
        pooled_projection_dim=sum(_WIDTHS) // 2,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


def build_absent_text_encoder() -> AbsentTextEncoder:
    """The third text encoder of the shapes model."""
    return AbsentTextEncoder(T5Config(d_model=sum(_WIDTHS), vocab_size=2, num_layers=1, num_heads=1, d_ff=1, d_kv=1))


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified-flow Euler sampling with a shift towards the noisy levels, where layout is decided."""
    return FlowMatchEulerDiscreteScheduler(shift=1.5)

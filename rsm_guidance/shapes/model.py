"""The embedded text-to-image model: its parts, and where the packaged weights lie.

A `StableDiffusion3Pipeline` in stock layout: SD3Transformer2DModel, AutoencoderKL, two CLIP text encoders, a
tokenizer whose vocabulary is the caption grammar, FlowMatchEulerDiscreteScheduler.

The stock pipeline stands in 256 zero tokens for a missing third text encoder, which quadruples the length of the
sequence of so small a model.  `AbsentTextEncoder` takes the third place and contributes a single zero token (the stock
code cannot reshape none), so that a plain `pipe(prompt)` is as fast as the model is.
"""

import json
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
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
STEPS = 20  # what the packaged model was tuned and measured with
GUIDANCE_SCALE = 3.0
_WIDTHS = (128, 32)  # of the two text encoders; their sum is the joint attention width
_PACKAGED = Path(__file__).parent / "weights"


def model_path() -> str:
    """Folder of the packaged shapes model, in stock diffusers layout (for `from_pretrained`)."""
    return str(_PACKAGED / "model")


def drm_path() -> str:
    """Folder of the packaged diffusion reward model of the shapes world."""
    return str(_PACKAGED / "drm")


class AbsentTextEncoder(T5EncoderModel):
    """A third text encoder that has nothing to say: token ids [B, L] -> one zero token [B, 1, d_model]."""

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
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789.,!?'-")
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    bpe.train_from_iterator(vocabulary(), trainer)
    learned = json.loads(bpe.to_str())["model"]
    symbols = letters + [c + "</w>" for c in letters]
    symbols += [s for s in learned["vocab"] if s not in set(symbols)]
    symbols += ["<|startoftext|>", "<|endoftext|>"]
    merges = [tuple(m) if not isinstance(m, str) else tuple(m.split(" ")) for m in learned["merges"]]
    return CLIPTokenizer(vocab={s: i for i, s in enumerate(symbols)}, merges=merges, model_max_length=TOKENS)


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

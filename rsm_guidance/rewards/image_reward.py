"""ImageReward v1.0 (arXiv 2304.05977): BLIP with a head on the first token of the text, which attends to the image.

The checkpoint is in the layout of BLIP's own code and is read into transformers' BLIP.  Settings that transformers has
other defaults for: 12 heads in the text encoder, epsilon 1e-6 in the vision encoder; and the text encoder attends both ways.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor, nn

from rsm_guidance.core.errors import UsageError
from rsm_guidance.rewards.builtin import ModelReward
from rsm_guidance.rewards.checkpoints import checkpoint_file, layers_of, load_strictly, read_tensors, renamed
from rsm_guidance.rewards.clip import tokenized, tokenizer_of
from rsm_guidance.rewards.images import shortest_side, standardized
from rsm_guidance.rewards.linear_head import linear_head

MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Of the raw score on the authors' data; what is published is (raw - MEAN) / STD."""
TOKENS = 35
_VISION_HEADS, _TEXT_HEADS = 16, 12  # all else can be read off the shapes
_UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # of BLIP's pre-training


@dataclass(frozen=True)
class ImageRewardV1(ModelReward):
    """Standard scores, about -2.5 to 2.

    Attributes:
        model: file, folder or hub id of the checkpoint.
        tokenizer: folder or hub id of the tokenizer; None for the one beside the checkpoint or bert-base-uncased.
    """

    model: str = "THUDM/ImageReward"
    tokenizer: str | None = None

    name = "image-reward"
    about = "standard score of how people rank images for a prompt (ImageReward v1.0)"
    needs = "downloads of THUDM/ImageReward and the tokenizer of bert-base-uncased"
    range = (-inf, inf)
    differentiable = True
    reads_prompt = True

    @functools.cached_property
    def network(self) -> nn.Module:
        path = checkpoint_file(self.model, ("ImageReward.pt", "ImageReward.safetensors", "model.safetensors"))
        tensors = {k: v for k, v in read_tensors(path).items() if not k.startswith(_UNUSED)}
        return blip_scorer(tensors, path).to(self.precision).eval().requires_grad_(False)

    @functools.cached_property
    def words(self) -> Any:
        """The tokenizer."""
        published = "bert-base-uncased"
        given = self.tokenizer or (published if self.model == ImageRewardV1.model else None)
        return tokenizer_of(given, self.model, published)

    def load(self) -> Any:
        _ = self.words
        return super().load()

    def batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        network: Any = self.network
        pixels = standardized(shortest_side(images, network["vision"].config.image_size, rounded_crop=True))
        seen = network["vision"](pixel_values=pixels.to(self.precision)).last_hidden_state
        tokens = tokenized(self.words, prompts, TOKENS, self.name, padding="max_length").to(images.device)
        read = network["text"](
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=seen.device),
            is_decoder=False,
        ).last_hidden_state
        raw: Tensor = network["head"](read[:, 0]).float()
        return (raw - MEAN) / STD


def blip_scorer(tensors: Mapping[str, Tensor], source: object) -> nn.ModuleDict:
    """BLIP's two encoders and the head, with the weights of an ImageReward checkpoint.

    Raises:
        UsageError: naming tensors that are missing, unknown or of the wrong shape.
    """
    from transformers import BlipTextConfig, BlipTextModel, BlipVisionConfig, BlipVisionModel

    places = {"blip.visual_encoder.": "vision", "blip.text_encoder.": "text", "mlp.": "head"}
    parts: dict[str, dict[str, Tensor]] = {part: {} for part in places.values()}
    for name, tensor in tensors.items():
        prefix = next((p for p in places if name.startswith(p)), None)
        if prefix is None:
            raise UsageError(f"the checkpoint {source} does not fit ImageReward: it has unknown {name}")
        if not name.endswith(".position_ids"):
            parts[places[prefix]][name.removeprefix(prefix)] = tensor
    try:
        vision = BlipVisionModel(BlipVisionConfig(**_vision_sizes(parts["vision"])))
        text = BlipTextModel(BlipTextConfig(**_text_sizes(parts["text"])), add_pooling_layer=False)
    except KeyError as error:
        raise UsageError(f"the checkpoint {source} does not fit ImageReward: it lacks {error}") from error
    load_strictly(vision, renamed(parts["vision"], _BLIP_VISION), source)
    load_strictly(text, parts["text"], source)
    return nn.ModuleDict({"vision": vision, "text": text, "head": linear_head(parts["head"], source)})


_BLIP_VISION = (
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
    ("norm.weight", "post_layernorm.weight"),
    ("norm.bias", "post_layernorm.bias"),
)


def _vision_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the `BlipVisionConfig`."""
    _, positions, width = tensors["pos_embed"].shape
    patch = tensors["patch_embed.proj.weight"].shape[-1]
    return {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": patch * round((positions - 1) ** 0.5),
        "intermediate_size": tensors["blocks.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": layers_of(tensors, "blocks."),
        "num_attention_heads": _VISION_HEADS,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu",
    }


def _text_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of the `BlipTextConfig`."""
    vocabulary, width = tensors["embeddings.word_embeddings.weight"].shape
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "max_position_embeddings": tensors["embeddings.position_embeddings.weight"].shape[0],
        "encoder_hidden_size": tensors["encoder.layer.0.crossattention.self.key.weight"].shape[1],
        "intermediate_size": tensors["encoder.layer.0.intermediate.dense.weight"].shape[0],
        "num_hidden_layers": layers_of(tensors, "encoder.layer."),
        "num_attention_heads": _TEXT_HEADS,
        "layer_norm_eps": 1e-12,
        "bos_token_id": None,  # it reads texts, and writes none
        "sep_token_id": None,
        "is_decoder": True,  # only then is there attention to the image
    }

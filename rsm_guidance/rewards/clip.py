"""CLIP for the rewards that are made of it: embeddings, and checkpoints in the layout of open_clip."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from rsm_guidance.core.errors import UsageError
from rsm_guidance.rewards.builtin import ModelReward, warn_cut
from rsm_guidance.rewards.checkpoints import layers_of, load_strictly, pretrained, pretrained_strictly, renamed
from rsm_guidance.rewards.images import shortest_side, standardized

CLIP_L = "openai/clip-vit-large-patch14"
CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
_HEADS = 16  # of ViT-H-14, in both towers; all else can be read off the shapes


@dataclass(frozen=True)
class ClipReward(ModelReward):
    """A reward by a `CLIPModel` of transformers.

    Attributes:
        model: its folder or hub id.
        tokenizer: folder or hub id of its tokenizer; None for the one beside the model or, where there is none, the published one.
    """

    model: str = CLIP_L
    tokenizer: str | None = None

    differentiable = True
    reads_prompt = True

    @functools.cached_property
    def network(self) -> nn.Module:
        from transformers import CLIPModel

        return pretrained_strictly(CLIPModel.from_pretrained, self.model, self.precision)

    @functools.cached_property
    def words(self) -> Any:
        """The tokenizer."""
        return tokenizer_of(self.tokenizer, self.model, type(self).model)

    def load(self) -> Any:
        _ = self.words
        return super().load()

    def prepared(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [0, 1] as the model reads them."""
        return standardized(shortest_side(images, image_side(self.network)))

    def similarity(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Cosines [B] of the embeddings of images and prompts."""
        image = embedded_images(self.network, self.prepared(images))
        return (image * embedded_texts(self.network, self.words, prompts, self.name)).sum(-1)


def image_side(model: Any) -> int:
    """Pixels of a side of the images that a CLIPModel reads."""
    side: int = model.config.vision_config.image_size
    return side


def embedded_images(model: Any, pixels: Tensor) -> Tensor:
    """Unit vectors [B, D], float32, of prepared images."""
    pooled = model.vision_model(pixel_values=pixels.to(model.dtype)).pooler_output
    return normalize(model.visual_projection(pooled).float(), dim=-1)


def embedded_texts(model: Any, tokenizer: Any, prompts: list[str], name: str) -> Tensor:
    """Unit vectors [B, D], float32, of prompts; equal ones are encoded once, and what is too long is cut, with a warning."""
    unique = list(dict.fromkeys(prompts))
    limit = model.config.text_config.max_position_embeddings
    tokens = tokenized(tokenizer, unique, limit, name, padding=True).to(model.device)
    with torch.no_grad():
        pooled = model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]).pooler_output
        vectors = normalize(model.text_projection(pooled).float(), dim=-1)
    return vectors[[unique.index(prompt) for prompt in prompts]]


def tokenized(tokenizer: Any, prompts: list[str], limit: int, name: str, padding: bool | str) -> Any:
    """Token ids and mask [B, T], T at most `limit`; says once that something was cut."""
    if any(len(ids) > limit for ids in tokenizer(prompts, truncation=False, verbose=False)["input_ids"]):
        warn_cut(name, limit)
    return tokenizer(prompts, padding=padding, truncation=True, max_length=limit, return_tensors="pt")


def tokenizer_of(given: str | None, model: str, published: str) -> Any:
    """The tokenizer at `given`, else the one in the folder or repository of the model, else the `published` one."""
    from transformers import AutoTokenizer

    local = Path(model).expanduser()
    beside = local if local.is_dir() else local.parent
    own = not local.exists() or any((beside / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
    found = given or (published if not own else str(beside) if local.exists() else model)
    return pretrained(AutoTokenizer.from_pretrained, found)


def open_clip_model(tensors: Mapping[str, Tensor], tokenizer: Any, dtype: torch.dtype, source: object) -> nn.Module:
    """A frozen `CLIPModel` with the weights of an open_clip ViT-H-14, whose sizes are read off the shapes.

    Raises:
        UsageError: naming tensors that are missing, unknown or of the wrong shape.
    """
    from transformers import CLIPConfig, CLIPModel

    try:
        config = CLIPConfig(**_sizes(tensors, tokenizer))
    except KeyError as error:
        raise UsageError(f"the checkpoint {source} is not in the layout of open_clip: it lacks {error}") from error
    model = CLIPModel(config)
    load_strictly(model, from_open_clip(tensors), source)
    frozen: nn.Module = model.to(dtype).eval().requires_grad_(False)
    return frozen


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of an open_clip CLIP under the names of `CLIPModel`."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        base, fused, kind = name.partition(".attn.in_proj_")
        if fused:
            split |= {f"{base}.self_attn.{p}_proj.{kind}": t for p, t in zip("qkv", tensor.chunk(3), strict=True)}
        else:
            split[name] = tensor.T.contiguous() if name in ("text_projection", "visual.proj") else tensor
    return renamed(split, _OPEN_CLIP)


_OPEN_CLIP = (
    ("visual.transformer.resblocks.", "vision_model.encoder.layers."),
    ("transformer.resblocks.", "text_model.encoder.layers."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    ("visual.class_embedding", "vision_model.embeddings.class_embedding"),
    ("visual.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
    ("visual.conv1.weight", "vision_model.embeddings.patch_embedding.weight"),
    ("visual.ln_pre.", "vision_model.pre_layrnorm."),
    ("visual.ln_post.", "vision_model.post_layernorm."),
    ("visual.proj", "visual_projection.weight"),
    ("text_projection", "text_projection.weight"),
    ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
    ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
    ("ln_final.", "text_model.final_layer_norm."),
)


def _sizes(tensors: Mapping[str, Tensor], tokenizer: Any) -> dict[str, Any]:
    """Arguments of the `CLIPConfig` of an open_clip ViT-H-14."""
    positions, width = tensors["visual.positional_embedding"].shape
    patch = tensors["visual.conv1.weight"].shape[-1]
    length, text_width = tensors["positional_embedding"].shape
    shared = {"hidden_act": "gelu", "num_attention_heads": _HEADS, "layer_norm_eps": 1e-5}
    text = {
        "vocab_size": tensors["token_embedding.weight"].shape[0],
        "hidden_size": text_width,
        "max_position_embeddings": length,
        "intermediate_size": tensors["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": layers_of(tensors, "transformer.resblocks."),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": width,
        "patch_size": patch,
        "image_size": patch * round((positions - 1) ** 0.5),
        "intermediate_size": tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        "num_hidden_layers": layers_of(tensors, "visual.transformer.resblocks."),
    }
    return {
        "text_config": text | shared,
        "vision_config": vision | shared,
        "projection_dim": tensors["visual.proj"].shape[1],
    }

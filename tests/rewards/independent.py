"""The published reward models once more, from their papers and tensors alone, in float64."""

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

Tensors = dict[str, Tensor]


def norm(t: Tensors, name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return layer_norm(x, x.shape[-1:], t[f"{name}.weight"].double(), t[f"{name}.bias"].double(), eps)


def linear(t: Tensors, name: str, x: Tensor) -> Tensor:
    return x @ t[f"{name}.weight"].double().T + t[f"{name}.bias"].double()


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """Of [B, T, D] and [B, S, D], with an additive mask [T, S] or [B, 1, 1, S]."""
    split = [a.unflatten(-1, (heads, -1)).transpose(1, 2) for a in (q, k, v)]
    logits = split[0] @ split[1].mT / split[0].shape[-1] ** 0.5
    weights = (logits if mask is None else logits + mask).softmax(-1)
    return (weights @ split[2]).transpose(1, 2).flatten(2)


def patches(images: Tensor, kernel: Tensor) -> Tensor:
    side = kernel.shape[-1]
    cut = images.double().unfold(2, side, side).unfold(3, side, side)  # [B, 3, h, w, p, p]
    return torch.einsum("bchwpq,dcpq->bhwd", cut, kernel.double()).flatten(1, 2)


def _resblocks(t: Tensors, prefix: str, x: Tensor, layers: int, mask: Tensor | None) -> Tensor:
    for i in range(layers):
        block = f"{prefix}transformer.resblocks.{i}."
        y = norm(t, f"{block}ln_1", x)
        qkv = y @ t[f"{block}attn.in_proj_weight"].double().T + t[f"{block}attn.in_proj_bias"].double()
        x = x + linear(t, f"{block}attn.out_proj", attention(*qkv.chunk(3, -1), 16, mask))
        x = x + linear(t, f"{block}mlp.c_proj", gelu(linear(t, f"{block}mlp.c_fc", norm(t, f"{block}ln_2", x))))
    return x


def open_clip_cosine(t: Tensors, pixels: Tensor, ids: list[list[int]]) -> Tensor:
    """Cosines [B] of an open_clip ViT-H-14 (three and two layers) for prepared images and token ids without padding."""
    x = patches(pixels, t["visual.conv1.weight"])
    start = t["visual.class_embedding"].double().expand(len(x), 1, -1)
    x = norm(t, "visual.ln_pre", torch.cat([start, x], 1) + t["visual.positional_embedding"].double())
    x = norm(t, "visual.ln_post", _resblocks(t, "visual.", x, 3, None)[:, 0]) @ t["visual.proj"].double()
    texts = []
    for row in ids:
        y = t["token_embedding.weight"].double()[row] + t["positional_embedding"].double()[: len(row)]
        causal = torch.full((len(row), len(row)), -torch.inf).triu(1)
        y = norm(t, "ln_final", _resblocks(t, "", y[None], 2, causal))[0]
        texts.append(y[row.index(max(row))] @ t["text_projection"].double())
    return torch.cosine_similarity(x, torch.stack(texts))


def head(t: Tensors, prefix: str, x: Tensor) -> Tensor:
    for place in (0, 2, 4, 6, 7):
        x = linear(t, f"{prefix}{place}", x)
    return x[:, 0]


def image_reward(t: Tensors, pixels: Tensor, ids: list[list[int]]) -> Tensor:
    """Standard scores [B] of ImageReward (two and two layers) for prepared images and token ids without padding."""
    root, words = "blip.visual_encoder.", "blip.text_encoder."
    x = patches(pixels, t[f"{root}patch_embed.proj.weight"]) + t[f"{root}patch_embed.proj.bias"].double()
    x = torch.cat([t[f"{root}cls_token"].double().expand(len(x), 1, -1), x], 1) + t[f"{root}pos_embed"].double()
    for i in range(2):
        block = f"{root}blocks.{i}."
        qkv = linear(t, f"{block}attn.qkv", norm(t, f"{block}norm1", x, 1e-6))
        x = x + linear(t, f"{block}attn.proj", attention(*qkv.chunk(3, -1), 16))
        x = x + linear(t, f"{block}mlp.fc2", gelu(linear(t, f"{block}mlp.fc1", norm(t, f"{block}norm2", x, 1e-6))))
    x = norm(t, f"{root}norm", x, 1e-6)
    scores = []
    for row, seen in zip(ids, x, strict=True):
        y = t[f"{words}embeddings.word_embeddings.weight"].double()[row]
        y = norm(
            t,
            f"{words}embeddings.LayerNorm",
            y + t[f"{words}embeddings.position_embeddings.weight"].double()[: len(row)],
            1e-12,
        )[None]
        for i in range(2):
            layer = f"{words}encoder.layer.{i}."
            for kind in ("attention", "crossattention"):
                source = y if kind == "attention" else seen[None]
                q = linear(t, f"{layer}{kind}.self.query", y)
                k, v = (linear(t, f"{layer}{kind}.self.{n}", source) for n in ("key", "value"))
                out = linear(t, f"{layer}{kind}.output.dense", attention(q, k, v, 12))
                y = norm(t, f"{layer}{kind}.output.LayerNorm", out + y, 1e-12)
            wide = gelu(linear(t, f"{layer}intermediate.dense", y))
            y = norm(t, f"{layer}output.LayerNorm", linear(t, f"{layer}output.dense", wide) + y, 1e-12)
        scores.append(y[:, 0])
    return (head(t, "mlp.layers.", torch.cat(scores)) - 0.16717362830052426) / 1.0333394966054072

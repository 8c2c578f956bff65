"""Published reward models in small, with random weights, saved in the layouts of the real ones."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer

SIDE, PATCH, LENGTH = 32, 8, 24
WIDTH, TEXT_WIDTH, JOINT = 32, 48, 20
PROMPTS = ["a red star", "two blue squares and a star", "star"]


def pictures(height: int, width: int, count: int = 3, seed: int = 0) -> list[Image.Image]:
    """Noise over a gradient."""
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (count, height, width, 3))
    slope = np.linspace(0, 255, width)[None, None, :, None]
    return [Image.fromarray(a) for a in ((noise + slope) / 2).astype(np.uint8)]


def tensor_of(images: list[Image.Image]) -> Tensor:
    return torch.stack([torch.from_numpy(np.array(i)) for i in images]).permute(0, 3, 1, 2).float() / 255


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    letters = [chr(c) for c in range(97, 123)]
    words = [*letters, *(f"{c}</w>" for c in letters), "st", "ar</w>", "star</w>"]
    vocab = {w: i for i, w in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[("s", "t"), ("a", "r</w>"), ("st", "ar</w>")])
    tokenizer.save_pretrained(folder)
    return tokenizer


def bert_tokenizer(folder: Path) -> BertTokenizer:
    words = "[PAD] [UNK] [CLS] [SEP] [MASK] a red blue star two squares and".split()
    tokenizer = BertTokenizer(vocab={w: i for i, w in enumerate(words)})
    tokenizer.save_pretrained(folder)
    return tokenizer


def hf_clip(folder: Path, side: int = SIDE, projection: int = JOINT, act: str = "quick_gelu") -> CLIPModel:
    """A CLIPModel with its tokenizer, as `save_pretrained` writes them."""
    tokenizer = clip_tokenizer(folder)
    shared = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "hidden_act": act}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": 0}
    text = {"vocab_size": len(tokenizer), "hidden_size": 32, "max_position_embeddings": LENGTH, **shared, **ids}
    vision = {"hidden_size": 32, "image_size": side, "patch_size": PATCH, **shared}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) * (0.5 if len(s) < 2 else s[-1] ** -0.5) for n, s in shapes.items()}


def open_clip_tensors(vocabulary: int, side: int = SIDE) -> dict[str, Tensor]:
    """A CLIP ViT-H-14 in open_clip's layout: three and two layers instead of 32 and 24."""
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (LENGTH, TEXT_WIDTH),
        "text_projection": (TEXT_WIDTH, JOINT),
        "logit_scale": (),
        "token_embedding.weight": (vocabulary, TEXT_WIDTH),
        "ln_final.weight": (TEXT_WIDTH,),
        "ln_final.bias": (TEXT_WIDTH,),
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": ((side // PATCH) ** 2 + 1, WIDTH),
        "visual.proj": (WIDTH, JOINT),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
    }
    shapes |= {f"visual.ln_{n}.{k}": (WIDTH,) for n in ("pre", "post") for k in ("weight", "bias")}
    for prefix, width, layers in (("visual.transformer", WIDTH, 3), ("transformer", TEXT_WIDTH, 2)):
        for i in range(layers):
            block = f"{prefix}.resblocks.{i}."
            shapes |= {f"{block}ln_{n}.{k}": (width,) for n in (1, 2) for k in ("weight", "bias")}
            shapes |= {f"{block}attn.in_proj_weight": (3 * width, width), f"{block}attn.in_proj_bias": (3 * width,)}
            shapes |= {f"{block}attn.out_proj.weight": (width, width), f"{block}attn.out_proj.bias": (width,)}
            shapes |= {f"{block}mlp.c_fc.weight": (2 * width, width), f"{block}mlp.c_fc.bias": (2 * width,)}
            shapes |= {f"{block}mlp.c_proj.weight": (width, 2 * width), f"{block}mlp.c_proj.bias": (width,)}
    return random_tensors(shapes, 1)


def head_shapes(widths: tuple[int, ...], prefix: str) -> dict[str, tuple[int, ...]]:
    layers = zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False)
    return {f"{prefix}{p}.{k}": s for p, a, b in layers for k, s in (("weight", (b, a)), ("bias", (b,)))}


def image_reward_tensors(vocabulary: int, side: int = SIDE) -> dict[str, Tensor]:
    """ImageReward in the layout of its own package, with what BLIP's pre-training left in it."""
    vision, text, hidden = 32, 48, 64
    root, words = "blip.visual_encoder.", "blip.text_encoder."
    shapes: dict[str, tuple[int, ...]] = {
        f"{root}cls_token": (1, 1, vision),
        f"{root}pos_embed": (1, (side // PATCH) ** 2 + 1, vision),
        f"{root}patch_embed.proj.weight": (vision, 3, PATCH, PATCH),
        f"{root}patch_embed.proj.bias": (vision,),
        f"{words}embeddings.word_embeddings.weight": (vocabulary, text),
        f"{words}embeddings.position_embeddings.weight": (64, text),
        "blip.vision_proj.weight": (8, vision),
        "blip.vision_proj.bias": (8,),
        "blip.text_proj.weight": (8, text),
        "blip.text_proj.bias": (8,),
    }
    linear: dict[str, tuple[int, int]] = {}
    norms: dict[str, int] = {f"{root}norm": vision, f"{words}embeddings.LayerNorm": text}
    for i in range(2):
        block = f"{root}blocks.{i}."
        norms |= {f"{block}norm1": vision, f"{block}norm2": vision}
        linear |= {f"{block}attn.qkv": (3 * vision, vision), f"{block}attn.proj": (vision, vision)}
        linear |= {f"{block}mlp.fc1": (hidden, vision), f"{block}mlp.fc2": (vision, hidden)}
        layer = f"{words}encoder.layer.{i}."
        for kind, source in (("attention", text), ("crossattention", vision)):
            linear |= {f"{layer}{kind}.self.query": (text, text), f"{layer}{kind}.self.key": (text, source)}
            linear |= {f"{layer}{kind}.self.value": (text, source), f"{layer}{kind}.output.dense": (text, text)}
            norms |= {f"{layer}{kind}.output.LayerNorm": text}
        linear |= {f"{layer}intermediate.dense": (hidden, text), f"{layer}output.dense": (text, hidden)}
        norms |= {f"{layer}output.LayerNorm": text}
    shapes |= {f"{n}.{k}": (w,) for n, w in norms.items() for k in ("weight", "bias")}
    shapes |= {f"{n}.weight": s for n, s in linear.items()} | {f"{n}.bias": s[:1] for n, s in linear.items()}
    tensors = random_tensors(shapes | head_shapes((text, 32, 16, 8, 4, 1), "mlp.layers."), 2)
    tensors |= {n: 2.5 * t for n, t in tensors.items() if n.startswith("mlp.") and t.ndim == 2}  # scores that differ
    return tensors | {f"{words}embeddings.position_ids": torch.arange(64)[None]}


def write_image_reward(folder: Path, side: int = SIDE) -> dict[str, Tensor]:
    tokenizer = bert_tokenizer(folder)
    tensors = image_reward_tensors(len(tokenizer), side)
    torch.save(tensors, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps({"hidden_size": 48}))
    return tensors


def write_hpsv2(folder: Path, side: int = SIDE) -> dict[str, Tensor]:
    tensors = open_clip_tensors(len(clip_tokenizer(folder)), side)
    torch.save({"epoch": 1, "state_dict": tensors}, folder / "HPS_v2.1_compressed.pt")
    return tensors


def write_aesthetic(folder: Path) -> dict[str, Tensor]:
    folder.mkdir(exist_ok=True)
    tensors = random_tensors(head_shapes((JOINT, 32, 16, 8, 4, 1), "layers."), 3)
    torch.save(tensors, folder / "sac+logos+ava1-l14-linearMSE.pth")
    return tensors

"""Small published rewards by name, each with what an independent calculation says of images under PROMPTS."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPTokenizer

from rsm_guidance.rewards import resolve_reward
from rsm_guidance.rewards.images import longest_side, shortest_side, standardized
from tests.rewards import independent, layouts
from tests.rewards.layouts import PROMPTS, SIDE, tensor_of

PUBLISHED = ("clip-score", "pickscore", "hpsv2", "image-reward", "aesthetic")
Case = tuple[Any, Callable[[list[Image.Image]], Tensor]]


def processor(side: int = SIDE) -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def ids_of(tokenizer: Any) -> list[list[int]]:
    return [tokenizer(p)["input_ids"] for p in PROMPTS]


def made(name: str, folder: Path) -> Case:
    if name == "hpsv2":
        tensors = layouts.write_hpsv2(folder)
        ids = ids_of(CLIPTokenizer.from_pretrained(folder))

        def hpsv2(images: list[Image.Image]) -> Tensor:
            return independent.open_clip_cosine(tensors, standardized(longest_side(tensor_of(images), SIDE)), ids)

        return resolve_reward(f"hpsv2:model={folder}"), hpsv2
    if name == "image-reward":
        tensors = layouts.write_image_reward(folder)
        words = ids_of(layouts.bert_tokenizer(folder))

        def image_reward(images: list[Image.Image]) -> Tensor:
            pixels = standardized(shortest_side(tensor_of(images), SIDE, rounded_crop=True))
            return independent.image_reward(tensors, pixels, words)

        return resolve_reward(f"image-reward:model={folder}"), image_reward
    clip = layouts.hf_clip(folder / "clip")
    if name == "aesthetic":
        tensors = layouts.write_aesthetic(folder / "head")

        def aesthetic(images: list[Image.Image]) -> Tensor:
            features = clip.get_image_features(**processor()(images, return_tensors="pt")).pooler_output.double()
            return independent.head(tensors, "layers.", features / features.norm(dim=-1, keepdim=True))

        return resolve_reward(f"aesthetic:model={folder / 'head'}:clip={folder / 'clip'}"), aesthetic
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")

    def by_transformers(images: list[Image.Image]) -> Tensor:
        inputs = processor()(images, return_tensors="pt") | tokenizer(PROMPTS, padding=True, return_tensors="pt")
        scaled = clip(**inputs).logits_per_image.diagonal()
        return scaled if name == "pickscore" else scaled / clip.logit_scale.exp()

    return resolve_reward(f"{name}:model={folder / 'clip'}"), by_transformers

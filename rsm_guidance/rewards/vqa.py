"""VQAScore (arXiv 2404.01291): the probability that a vision-language model answers "yes" when asked whether the image shows the prompt."""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rsm_guidance.core.errors import UsageError
from rsm_guidance.rewards.builtin import ModelReward
from rsm_guidance.rewards.checkpoints import pretrained
from rsm_guidance.rewards.images import to_uint8

QUESTION = 'Does this image show "{prompt}"? Please answer yes or no.'


@dataclass(frozen=True)
class VQA(ModelReward):
    """Probability in [0, 1] of an answer that begins with yes, by any image-text-to-text model of transformers.

    Its own processor prepares the images, so that scores have no gradient; they are scored one by one, since padding would
    move the answer.

    Attributes:
        model: folder or hub id.
        question: {prompt} stands for the prompt.
        answer: the word whose probability counts, with or without a capital and a space before it.
    """

    model: str = "Qwen/Qwen2.5-VL-3B-Instruct"
    question: str = QUESTION
    answer: str = "yes"

    name = "vqa"
    about = "probability that a vision-language model says yes, the image shows the prompt"
    needs = "a download of Qwen/Qwen2.5-VL-3B-Instruct, or model=FOLDER of any image-text-to-text model"
    range = (0.0, 1.0)
    reads_prompt = True

    @functools.cached_property
    def network(self) -> nn.Module:
        from transformers import AutoModelForImageTextToText

        model: nn.Module = pretrained(AutoModelForImageTextToText.from_pretrained, self.model, dtype=self.precision)
        return model.eval().requires_grad_(False)

    @functools.cached_property
    def processor(self) -> Any:
        """What prepares images and texts."""
        from transformers import AutoProcessor

        return pretrained(AutoProcessor.from_pretrained, self.model)

    @functools.cached_property
    def answers(self) -> list[int]:
        """First tokens of the ways to write the answer.

        Raises:
            UsageError: if no way of writing it begins with a token of its own.
        """
        words = {form for w in (self.answer.lower(), self.answer.capitalize()) for form in (w, f" {w}")}
        found = self._first_tokens(words) - self._first_tokens({"no", "No", " no", " No"})
        if not found:
            raise UsageError(f"vqa: the tokenizer of {self.model!r} has no token of its own for {self.answer!r}")
        return sorted(found)

    def _first_tokens(self, words: set[str]) -> set[int]:
        ids = [self.processor.tokenizer(word, add_special_tokens=False)["input_ids"][:1] for word in words]
        return {token for first in ids for token in first} - {self.processor.tokenizer.unk_token_id}

    def load(self) -> Any:
        _ = self.answers
        return super().load()

    def batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        from PIL import Image

        pictures = [Image.fromarray(image) for image in to_uint8(images).numpy()]
        return torch.stack([self.probability(i, p, images.device) for i, p in zip(pictures, prompts, strict=True)])

    @torch.no_grad()
    def probability(self, image: Any, prompt: str, device: torch.device) -> Tensor:
        """Of the answer, for a Pillow image."""
        inputs = self.processor(images=image, text=self._asked(prompt), return_tensors="pt").to(device)
        logits: Tensor = self.network(**inputs.to(self.precision)).logits[0, -1].float()
        return logits.softmax(-1)[self.answers].sum()

    def _asked(self, prompt: str) -> str:
        """The question as the model was trained to read it."""
        question = self.question.replace("{prompt}", prompt)
        if self.processor.chat_template is None:
            return f"{getattr(self.processor, 'image_token', '')}\n{question}"
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return text

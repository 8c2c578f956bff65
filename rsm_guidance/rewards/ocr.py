"""How well a text is written in an image: one minus its edit distance to what rapidocr reads, by length (Flow-GRPO's OCR reward).

Compared are lower-case letters without spaces.  A text that stands within what is read scores 1.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.rewards.builtin import BuiltInReward
from rsm_guidance.rewards.images import to_uint8

_QUOTED = re.compile(r'"([^"]*)"|“([^”]*)”')


@dataclass(frozen=True)
class OCR(BuiltInReward):
    """Scores in [0, 1]; 1 where the text is there.  It runs on the CPU.

    Attributes:
        column: of the texts that the images should show; None for what stands in the first double quotes of the prompts.
        threads: of the reader; None for one per core.
    """

    column: str | None = None
    threads: int | None = None

    name = "ocr"
    about = "how well the text in quotes, or in a column, is written in the image"
    needs = "the extra ocr (rapidocr, whose wheel carries its models)"
    range = (0.0, 1.0)

    @property
    def reads_prompt(self) -> bool:  # type: ignore[override]
        return self.column is None

    @property
    def requires(self) -> tuple[str, ...]:
        return () if self.column is None else (self.column,)

    @functools.cached_property
    def reader(self) -> Any:
        """The engine."""
        try:
            from rapidocr import RapidOCR
        except ImportError as error:
            raise UsageError(f'the reward ocr needs rapidocr ({error}); pip install "rsm-guidance[ocr]"') from error
        threads = -1 if self.threads is None else self.threads
        return RapidOCR(
            params={"Global.log_level": "critical", "EngineConfig.onnxruntime.intra_op_num_threads": threads}
        )

    def load(self) -> "OCR":
        _ = self.reader
        return self

    def check(self, prompts: list[str], columns: dict[str, list[Any]]) -> None:
        self.targets(prompts, columns)

    def targets(self, prompts: list[str], columns: dict[str, list[Any]]) -> list[str]:
        """What each image should show, ready to compare.

        Raises:
            UsageError: naming the first prompt or entry that asks for no text.
        """
        given = [quoted(p) for p in prompts] if self.column is None else columns[self.column]
        for text, prompt in zip(given, prompts, strict=True):
            if not isinstance(text, str) or not plain(text):
                where = 'put it in double quotes ("...")' if self.column is None else f"its {self.column!r} is {text!r}"
                raise UsageError(f"the reward ocr needs a text to look for; the prompt {prompt!r} has none: {where}")
        return [plain(text) for text in given if text is not None]

    def scores(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        targets = self.targets(prompts, columns)
        found = [self.read(image) for image in to_uint8(images).numpy()]
        return torch.tensor([agreement(text, target) for text, target in zip(found, targets, strict=True)])

    def read(self, image: Any) -> str:
        """All that is read in uint8 [H, W, 3], ready to compare."""
        texts = self.reader(image[:, :, ::-1]).txts  # it takes BGR
        return plain("".join(texts or ()))


def quoted(prompt: str) -> str | None:
    """The text in the first double quotes."""
    found = _QUOTED.search(prompt)
    return None if found is None else next(group for group in found.groups() if group is not None)


def plain(text: str) -> str:
    """Lower case, without spaces."""
    return "".join(text.lower().split())


def agreement(read: str, target: str) -> float:
    """One minus the edit distance by the length of the target, at least 0; 1 where it is part of what was read."""
    if target in read:
        return 1.0
    return max(0.0, 1 - edit_distance(read, target) / len(target))


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and replacements of letters that make `b` of `a` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]

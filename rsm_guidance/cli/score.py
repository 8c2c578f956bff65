"""The command `score`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rsm_guidance.cli.options import check_reward, columns_of, load_reward, quiet_libraries, say
from rsm_guidance.core.errors import UsageError

if TYPE_CHECKING:
    from rsm_guidance.data.prompts import PromptSet


@dataclass(frozen=True)
class Score:
    """Score images under a prompt, or each under its own; one JSON object per image.

    rsm-guidance score out.png --prompt "two blue squares and a yellow star" --reward shapes-verifier

    rsm-guidance score *.png --prompt "a shop sign" --reward ocr:column=target --column target=OPEN

    rsm-guidance score a.png b.png --prompts metadata.jsonl --reward "hpsv2 + 0.1 * image-reward"
    """

    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Image files."""
    prompt: str | None = None
    """What they should show."""
    prompts: Path | None = None
    """Instead: a line for each image, of UTF-8 text or, in a .jsonl file, with a "prompt" and columns for the reward."""
    column: tuple[str, ...] = ()
    """What the reward reads besides --prompt, as NAME=VALUE."""
    reward: str = "shapes-drm"
    """A name (see `rsm-guidance rewards`), folder or hub id of a reward model, package.module:object, or "A + 0.5 * B"."""

    def run(self) -> None:
        if not self.images:
            raise UsageError("no images were given; name at least one file")
        from rsm_guidance.data.prompts import chosen
        from rsm_guidance.evaluation.generate import scores_of
        from rsm_guidance.io.files import read_image

        quiet_libraries()
        asked = self._asked()
        check_reward(self.reward, asked.prompts, asked.columns)
        for path in self.images:
            read_image(path)  # all can be read before a model is loaded
        reward = load_reward(self.reward)
        side = getattr(reward, "image_size", None)
        for row, (path, prompt) in enumerate(zip(self.images, asked.prompts, strict=True)):
            image = read_image(path, None if side is None else (side, side))
            [score] = scores_of(reward, image, [prompt], chosen(asked.columns, [row]))
            say({"image": str(path), "prompt": prompt, "score": score})

    def _asked(self) -> PromptSet:
        """A prompt and columns for each image."""
        from rsm_guidance.data.prompts import PromptSet, read_prompt_set

        count = len(self.images)
        if self.prompts is None:
            if self.prompt is None or not self.prompt.strip():
                raise UsageError("the prompt is empty; say with --prompt what the images should show")
            columns = {name: values * count for name, values in columns_of(self.column).items()}
            return PromptSet([self.prompt] * count, columns)
        if self.prompt is not None or self.column:
            raise UsageError("give --prompts, or --prompt and --column, and not both")
        asked = read_prompt_set(self.prompts)
        if len(asked.prompts) != count:
            raise UsageError(
                f"{self.prompts} has {len(asked.prompts)} prompts for {count} images; write one line for each"
            )
        return asked

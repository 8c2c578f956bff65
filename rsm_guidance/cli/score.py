"""The command `score`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rsm_guidance.cli.options import load_reward, quiet_libraries, say
from rsm_guidance.core.errors import UsageError


@dataclass(frozen=True)
class Score:
    """Score images under a prompt; one JSON object per image.

    rsm-guidance score out.png --prompt "two blue squares and a yellow star" --reward shapes-verifier
    """

    images: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGE...")]
    """Image files."""
    prompt: str
    """What they should show."""
    reward: str = "shapes-drm"
    """A name (see `rsm-guidance rewards`), folder or hub id of a reward model, package.module:object, or "A + 0.5 * B"."""

    def run(self) -> None:
        if not self.images:
            raise UsageError("no images were given; name at least one file")
        if not self.prompt.strip():
            raise UsageError("the prompt is empty; say what the images should show")
        from rsm_guidance.evaluation.generate import scores_of
        from rsm_guidance.io.files import read_image

        quiet_libraries()
        for path in self.images:
            read_image(path)  # all can be read before a model is loaded
        reward = load_reward(self.reward)
        side = getattr(reward, "image_size", None)
        for path in self.images:
            image = read_image(path, None if side is None else (side, side))
            [score] = scores_of(reward, image, [self.prompt])
            say({"image": str(path), "prompt": self.prompt, "score": score})

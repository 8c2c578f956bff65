"""What a restarted call repeats of the first: its random draws, its encoded prompts, and its arguments for other rows."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline

from rsm_guidance.core.random import derive_seed
from rsm_guidance.engine.families import pick_rows, prompts_of, traits_of

_CONDITIONING = ("prompt", "negative_prompt", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


class Draws:
    """The random state that a call's generators had before it, so that a restart draws the same again.

    With one generator for several rows that hold input images it is not the same: diffusers encodes a common image once,
    a restart one for each row.  Pass a generator for each row, or a seed.
    """

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None) -> None:
        self._each = isinstance(generator, list)
        given = generator if isinstance(generator, list) else [] if generator is None else [generator]
        self._states = [(g.device, g.get_state(), g.initial_seed()) for g in given]

    def again(self, rows: tuple[int, ...], base: tuple[int, ...]) -> list[torch.Generator] | torch.Generator | None:
        """Generators for rows; one that served a whole batch cannot serve a part of it, so rows get seeds from it."""
        if not self._states:
            return None
        if self._each:
            return [self._copy(r) for r in rows]
        if rows == base:
            return self._copy(0)
        device, _, seed = self._states[0]
        return [torch.Generator(device).manual_seed(derive_seed(seed, r)) for r in rows]

    def _copy(self, index: int) -> torch.Generator:
        device, state, _ = self._states[index]
        generator = torch.Generator(device)
        generator.set_state(state)
        return generator


class Encoder:
    """Stands in for `encode_prompt` in one call: what the first call of a denoiser encoded serves all later ones.

    Some pipelines encode twice in a call (prompts, then negative prompts), so results are kept by position.
    """

    def __init__(self, encoded: list[Any], rows: tuple[int, ...], count: int) -> None:
        self._encoded, self._rows, self._count = encoded, rows, count
        self._calls = 0

    def __call__(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        index, self._calls = self._calls, self._calls + 1
        if index < len(self._encoded):
            return pick_rows(self._encoded[index], self._rows, self._count)
        with torch.no_grad():
            self._encoded.append(stock(*args, **kwargs))
        return self._encoded[index]


@dataclass
class Repeats:
    """Stock calls for any rows of a first one, with the same draws and texts that are encoded once.

    Attributes:
        pipe: the pipeline.
        call: keyword arguments of the first call.
        base: its rows.
    """

    pipe: DiffusionPipeline
    call: Mapping[str, Any]
    base: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.call = {
            k: [*v] if isinstance(v, list) else v for k, v in self.call.items()
        }  # some calls change their lists
        self.prompts = prompts_of(self.call)
        self.base = tuple(range(len(self.prompts)))
        self._draws = Draws(self.call.get("generator"))
        self._encoded: list[Any] = []

    def first(self) -> dict[str, Any]:
        """The call itself."""
        if isinstance(self.call.get("generator"), list) and traits_of(self.pipe).draws:
            # An image for each row, so that each is encoded with its row's random numbers and not with the first's.
            return {**self.call, **self._images(self.base)}
        return dict(self.call)

    def of(self, rows: tuple[int, ...], generators: list[torch.Generator] | None = None) -> dict[str, Any]:
        """The call for other rows: one image for each, whose conditioning `encoder` supplies."""
        count = len(self.base)
        call = {k: v for k, v in self.call.items() if k != "latents" and not k.startswith(_CONDITIONING)}
        drawn = self._draws.again(rows, self.base) if generators is None else generators
        call |= {"prompt": [self.prompts[r] for r in rows], "generator": drawn}
        negative = self.call.get("negative_prompt")
        given = negative is not None or self.call.get("negative_prompt_embeds") is not None
        if given and traits_of(self.pipe).negatives:
            texts = list(negative) if isinstance(negative, list) else [negative or ""]
            call["negative_prompt"] = [texts[r * len(texts) // count] for r in rows]
        if (copies := traits_of(self.pipe).copies) is not None:
            call[copies] = 1
        return call | self._images(rows)

    def encoder(self, rows: tuple[int, ...]) -> Encoder:
        """What encodes the prompts of a call for rows."""
        return Encoder(self._encoded, rows, len(self.base))

    def _images(self, rows: tuple[int, ...]) -> dict[str, Any]:
        """The input images of rows, where the family takes one per prompt and each prompt, or row, has one."""
        traits = traits_of(self.pipe)
        if type(getattr(self.pipe, "controlnet", None)).__name__.startswith("Multi"):
            return {}  # its lists hold an image for each control
        picked: dict[str, Any] = {}
        for name in traits.images:
            image: Any = self.call.get(name)
            several = isinstance(image, list)
            if image is not None and getattr(image, "ndim", 0) == 4:  # stays a batch: some families read its axes
                picked[name] = image[[r * len(image) // len(self.base) for r in rows]]
            elif image is not None and (several or traits.draws):
                picked[name] = pick_rows(list(image) if several else [image], rows, len(self.base))
        return picked

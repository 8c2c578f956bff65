"""What a restarted call repeats of the first: its random draws, its encoded prompts, and its arguments for other rows."""

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor

from rsm_guidance.core.random import derive_seed
from rsm_guidance.engine.families import copies_of, pick_rows, traits_of
from rsm_guidance.engine.rows import close

_CONDITIONING = ("prompt", "negative_prompt", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")

WAYS = ("texts", "entries", "pictures", "copies")
"""How a call may be asked for other rows.  Which one a pipeline takes rightly is tried, in this order (`engine.rows`).

texts: prompts are picked, all else serves every row; entries: whatever has an entry for each row or prompt is picked, too;
pictures: a single picture is repeated as well, so that each row has one of its own; copies: one prompt, or none, is asked for
as many samples.
"""


_TOGETHER: "weakref.WeakKeyDictionary[DiffusionPipeline, bool]" = weakref.WeakKeyDictionary()
"""Whether a pipeline encodes a prompt to something else with others than alone."""


class Draws:
    """The random state that a call's generators had before it, so that a restart draws the same again.

    With one generator for several rows that hold input images it is not the same: diffusers encodes a common image once,
    a restart one for each row.  Pass a generator for each row, or a seed.

    Args:
        generator: of the call.
        count: number of its rows.
    """

    def __init__(self, generator: torch.Generator | list[torch.Generator] | None, count: int) -> None:
        self._each = isinstance(generator, list) or count == 1
        self._alone = not isinstance(generator, list)
        given = generator if isinstance(generator, list) else [] if generator is None else [generator]
        self._states = [(g.device, g.get_state(), g.initial_seed()) for g in given]

    def again(self, rows: tuple[int, ...], base: tuple[int, ...]) -> list[torch.Generator] | torch.Generator | None:
        """Generators for rows; one that served a whole batch cannot serve a part of it, so rows get seeds from it."""
        if not self._states:
            return None
        if self._alone and rows == base:
            return self._copy(0)
        if self._each:
            return [self._copy(r) for r in rows]
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

    def __init__(self, encoded: list[Any], rows: tuple[int, ...], prompts: list[str]) -> None:
        self._encoded, self._rows, self._prompts = encoded, rows, prompts
        self._calls = 0
        self.suspect: int | None = None

    def __call__(self, stock: Any, *args: Any, **kwargs: Any) -> Any:
        index, self._calls = self._calls, self._calls + 1
        if index < len(self._encoded):
            whole = self._rows == tuple(range(len(self._prompts)))
            return self._encoded[index] if whole else pick_rows(self._encoded[index], self._rows, len(self._prompts))
        with torch.no_grad():
            self._encoded.append(stock(*args, **kwargs))
            if index == 0 and len(set(self._prompts)) > 1 and _TOGETHER.get(stock.__self__) is not False:
                self.suspect = self._differs_alone(stock, inspect.signature(stock).bind(*args, **kwargs).arguments)
        return self._encoded[index]

    def _differs_alone(self, stock: Any, arguments: dict[str, Any]) -> int | None:
        """The row of the shortest prompt, if that is encoded to something else alone than with the others."""
        texts = arguments.get("prompt")
        if not isinstance(texts, list) or len(self._prompts) % len(texts) or len(texts) < 2:
            return None
        one = min(range(len(texts)), key=lambda i: len(texts[i]))
        copies = len(self._prompts) // len(texts)
        rest = {n: [v[one]] if isinstance(v, list) and len(v) == len(texts) else v for n, v in arguments.items()}
        extra: Any = rest.pop("kwargs", {})
        alone = pick_rows(stock(**rest, **extra), (0,), copies)
        together = not _alike(alone, pick_rows(self._encoded[0], (one * copies,), len(self._prompts)))
        if together or len({len(t) for t in texts}) > 1:  # equally long ones tell nothing of padding
            _TOGETHER[stock.__self__] = together
        return one * copies if together else None


@dataclass
class Repeats:
    """Stock calls for any rows of a first one, with the same draws and texts that are encoded once.

    Attributes:
        pipe: the pipeline.
        call: keyword arguments of the first call.
        prompts: of its rows; "" where there is no text.
        base: its rows.
    """

    pipe: DiffusionPipeline
    call: Mapping[str, Any]
    prompts: list[str]
    base: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.call = {
            k: [*v] if isinstance(v, list) else v for k, v in self.call.items()
        }  # some calls change their lists
        self.base = tuple(range(len(self.prompts)))
        self._draws = Draws(self.call.get("generator"), len(self.base))
        self._encoded: list[Any] = []
        self._first: Encoder | None = None

    @property
    def shares_a_picture(self) -> bool:
        """Whether rows with generators of their own have one input picture together."""
        several = len(self.base) > 1 and isinstance(self.call.get("generator"), list)
        return several and any(_single(v) for v in self.call.values())

    def with_a_picture_each(self) -> "Repeats":
        """The same call with a picture for each row, so that each is encoded with its row's random numbers."""
        pictures = {n: _repeated(v, len(self.base)) for n, v in self.call.items() if _single(v)}
        each = Repeats(self.pipe, {**self.call, **pictures}, self.prompts)
        each._draws, each._encoded, each._first = self._draws, self._encoded, self._first
        return each

    def again(self, generators: Sequence[torch.Generator] | None = None) -> dict[str, Any]:
        """The call itself once more, with the same draws, or with those of other generators [B] throughout."""
        call = {k: [*v] if isinstance(v, list) else v for k, v in self.call.items()}
        if generators is not None:
            call.pop("latents", None)
            return call | {"generator": list(generators)}
        if "generator" in call:
            call["generator"] = self._draws.again(self.base, self.base)
        return call

    def of(
        self, rows: tuple[int, ...], way: str, generators: Sequence[torch.Generator] | None = None
    ) -> dict[str, Any]:
        """The call for other rows, whose texts `encoder` supplies, in one of the WAYS."""
        traits, count = traits_of(self.pipe), len(self.base)
        drawn = self._draws.again(rows, self.base) if generators is None else list(generators)
        call = {k: v for k, v in self.call.items() if k != "latents"}
        if "generator" in traits.parameters:
            call["generator"] = drawn
        if way == "copies":
            if traits.copies is None or count != copies_of(self.call):
                raise ValueError("the call has several prompts, or cannot be asked for several samples")
            return call | {traits.copies: len(rows)}
        call = {k: v for k, v in call.items() if not k.startswith(_CONDITIONING)}
        if "prompt" in traits.parameters and (self.call.get("prompt") is not None or any(self.prompts)):
            call["prompt"] = [self.prompts[r] for r in rows]
        negative = self.call.get("negative_prompt")
        given = negative is not None or self.call.get("negative_prompt_embeds") is not None
        if given and traits.negatives:
            texts = list(negative) if isinstance(negative, list) else [negative or ""]
            call["negative_prompt"] = [texts[r * len(texts) // count] for r in rows]
        if traits.copies is not None:
            call[traits.copies] = 1
        if way == "texts":
            return call
        sizes = {count, count // copies_of(self.call)}
        for name, value in list(call.items()):
            if name in ("prompt", "negative_prompt", "generator"):
                continue
            if way == "pictures" and _single(value):
                call[name] = _repeated(value, len(rows))
            elif _length(value) in sizes:
                call[name] = _picked(value, [r * len(value) // count for r in rows])
        return call

    def encoder(self, rows: tuple[int, ...]) -> Encoder:
        """What encodes the prompts of a call for rows."""
        encoder = Encoder(self._encoded, rows, self.prompts)
        if not self._encoded:
            self._first = encoder
        return encoder

    @property
    def suspect(self) -> int | None:
        """A row whose prompt is encoded to something else alone than with the others, as is seen the first time."""
        return None if self._first is None else self._first.suspect


def _alike(first: Any, second: Any) -> bool:
    """Whether two encodings of a prompt are the same, but for what other kernels for other batches round."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first.shape == second.shape and close(first, second)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(_alike, first, second))
    return True


def _single(value: Any) -> bool:
    """Whether an argument is one picture, alone or in a list."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return isinstance(value, Image.Image) or (isinstance(value, Tensor | np.ndarray) and value.ndim in (2, 3))


def _repeated(value: Any, count: int) -> list[Any]:
    return [value[0] if isinstance(value, list) else value] * count


def _length(value: Any) -> int | None:
    """Entries of a batch of pictures, or of other things that are no numbers."""
    if isinstance(value, list) and value and not isinstance(value[0], int | float):
        return len(value)
    return len(value) if isinstance(value, Tensor | np.ndarray) and value.ndim > 1 else None


def _picked(value: Any, rows: list[int]) -> Any:
    return [value[r] for r in rows] if isinstance(value, list) else value[rows]

"""What a restarted call repeats of the first: its random draws and its encoded prompts."""

from typing import Any

import torch

from rsm_guidance.core.random import derive_seed
from rsm_guidance.engine.families import pick_rows


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

"""What stands in for parts of a pipeline while its stock call runs: a denoiser that does nothing, a flag."""

from typing import Any

import torch
from torch import Tensor


class FastForward:
    """Stands in for `pipe._interrupt`: true for the first `count` times it is asked, so that many steps are skipped."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left >= 0


class Named(tuple[Any, ...]):
    """A denoiser's answer as a tuple whose first entry has every name, for pipelines that read `.sample` or the like."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return self[0]


class Shapes:
    """How denoisers have answered: the shape of an answer without its batch, by the denoiser's name; for blanks to be like it.

    Before a denoiser has answered, its answer is taken to be like the latents, with as many channels as its configuration
    names where these are a multiple of theirs (a variance besides the noise).
    """

    def __init__(self) -> None:
        self._seen: dict[str, tuple[int, ...]] = {}

    def note(self, name: str, answer: Any) -> None:
        """Remember an answer."""
        first = answer[0] if isinstance(answer, tuple | list) else getattr(answer, "sample", answer)
        if isinstance(first, Tensor) and name not in self._seen and not isinstance(answer, list):
            self._seen[name] = tuple(first.shape[1:])

    def of(self, name: str, module: torch.nn.Module, latents: Tensor) -> tuple[int, ...]:
        """Shape of an answer of a denoiser."""
        shape = tuple(latents.shape[1:])
        channels = getattr(getattr(module, "config", None), "out_channels", None)
        if len(shape) == 3 and isinstance(channels, int) and channels % shape[0] == 0:
            shape = (channels, *shape[1:])
        return self._seen.get(name, shape)


class Blank:
    """Stands in for a denoiser whose output will not be used: zeros, at no cost."""

    def __init__(self, module: torch.nn.Module, latents: Tensor, shape: tuple[int, ...]) -> None:
        self._module, self._latents, self._shape = module, latents, shape

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Named:
        return Named((self._latents.new_zeros(batch_size(args, kwargs), *self._shape),))


_INPUTS = ("hidden_states", "sample", "x")


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Latents that a denoiser is called with: the length of its first input, by whatever name."""
    named = next((kwargs[n] for n in _INPUTS if n in kwargs), next(iter(kwargs.values()), ()))
    return len(args[0] if args else named)

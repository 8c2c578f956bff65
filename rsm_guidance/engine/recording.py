"""Recording: what a stock call does with its denoiser, level by level, with stand-ins that compute next to nothing."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rsm_guidance.core.random import derive_seed
from rsm_guidance.engine.families import denoisers_of
from rsm_guidance.engine.loop import Step
from rsm_guidance.engine.stand_ins import Named, Shapes, batch_size

_HELPERS = ("controlnet",)
"""Modules besides the denoiser that pipelines call inside of their loop, each time with the latents."""


@dataclass(frozen=True)
class Call:
    """One call of a module: its name in the pipeline, arguments and result."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass(frozen=True)
class Visit:
    """What happened at one level: the latents that the scheduler was given [B, ...], what it was told, the calls before."""

    sample: Tensor
    model_output: Tensor
    timestep: float
    calls: tuple[Call, ...]


Answer = Callable[[str, nn.Module, tuple[Any, ...], dict[str, Any]], Any]
Rehearse = Callable[[Mapping[str, Any]], Iterator[Step]]
"""Runs a call with stand-ins for modules, by their names in the pipeline."""


class Recorder:
    """Stands in for a module: notes each call and answers in its place; passes for it otherwise."""

    def __init__(self, name: str, module: nn.Module, calls: list[Call], answer: Answer) -> None:
        vars(self).update(_name=name, _module=module, _calls=calls, _answer=answer)

    @property
    def __class__(self) -> type:  # pipelines ask isinstance of a ControlNet
        return type(self._module)

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise TypeError("a recorder keeps its class")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._answer(self._name, self._module, args, kwargs)
        self._calls.append(Call(self._name, args, dict(kwargs), output))
        return output


def modules_of(pipe: Any) -> dict[str, nn.Module]:
    """The modules that a pipeline calls inside of its loop, by name."""
    helpers = {n: m for n in _HELPERS if isinstance(m := getattr(pipe, n, None), nn.Module)}
    return {**helpers, **denoisers_of(pipe)}


def visits(pipe: Any, rehearse: Rehearse, x: Tensor, answer: Answer) -> Iterator[Visit]:
    """The levels of a call that is rehearsed with latents x [R, ...] at each, its modules answered for by `answer`."""
    calls: list[Call] = []
    recorders = {name: Recorder(name, m, calls, answer) for name, m in modules_of(pipe).items()}
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices=devices):
        for step in rehearse(recorders):
            yield Visit(step.sample, step.model_output, first_number(step.timestep), tuple(calls))
            calls.clear()


def first_number(timestep: Any) -> float:
    """A timestep as a number, also where the scheduler is told one for each row."""
    return float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)


def ask(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer with the module itself."""
    output = module(*args, **kwargs)
    return Named(output.to_tuple()) if hasattr(output, "to_tuple") else output


@dataclass
class Blanks:
    """Answers for modules at no cost, shaped like what they answered when they were asked.

    Denoisers answer random numbers, so that what is done with them can be told from the result.  Where `seen` has no
    answer of a denoiser it gives zeros, or, if `drawn`, random numbers that only depend on its inputs; other modules are asked
    once.
    """

    sample: Tensor
    shapes: Shapes = field(default_factory=Shapes)
    drawn: bool = False
    seen: dict[str, tuple[Any, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._random = torch.Generator().manual_seed(0)

    def __call__(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        count = batch_size(args, kwargs)
        if name in _HELPERS:
            if name not in self.seen:
                self.seen[name] = (module(*args, **kwargs), count)
            return _markers(self.seen[name][0], count)
        if name not in self.seen:
            shape = (count, *self.shapes.of(name, module, self.sample))
            if not self.drawn:
                return Named((self.sample.new_zeros(shape),))
            told = [float(t.double().sum()) for t in (*args, *kwargs.values()) if isinstance(t, Tensor)]
            random = torch.Generator().manual_seed(derive_seed(name, count, str(told)))
            return Named((torch.randn(shape, generator=random).to(self.sample),))
        return self._like(self.seen[name][0], count)

    def _like(self, answer: Any, count: int) -> Any:
        if isinstance(answer, tuple):
            return Named(self._like(part, count) for part in answer)
        if isinstance(answer, list):
            return [self._drawn(answer[0], tuple(answer[0].shape)) for _ in range(count)]
        return self._drawn(answer, (count, *answer.shape[1:])) if isinstance(answer, Tensor) else answer

    def _drawn(self, like: Tensor, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self._random).to(like)


def _markers(answer: Any, count: int) -> Any:
    """Small tensors in the structure of an answer, by which the calls that receive them are recognised."""
    if isinstance(answer, tuple | list):
        return type(answer)(_markers(part, count) for part in answer)
    return answer.new_zeros(count, 1) if isinstance(answer, Tensor) else answer

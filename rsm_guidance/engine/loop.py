"""A stock pipeline call as a coroutine that pauses wherever it reaches `scheduler.step`.

The stock `__call__` runs in a greenlet.  At `scheduler.step(model_output, t, sample)` everything family-specific is
done, so the loop hands these three out and waits for the next latents.  While it waits, the pipeline and its scheduler
look exactly as they did before the call: their attributes are exchanged at every switch, so nothing has to be cleaned
up when a loop is abandoned, and the pipeline can be used for other things meanwhile.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor


@dataclass(frozen=True)
class Start:
    """The loop is ready to begin: `latents` [B, ...] and timesteps are prepared, the denoiser has not been called.

    `guided` says whether the call uses classifier-free guidance.
    """

    latents: Tensor
    guided: bool


@dataclass(frozen=True)
class Step:
    """The loop stands at `scheduler.step`; all tensors [B, ...], `timestep` a scalar."""

    model_output: Tensor
    timestep: Tensor
    sample: Tensor


@dataclass(frozen=True)
class Done:
    """The loop ran to its end and returned the stock output."""

    output: Any


Pause = Start | Step | Done


class _FastForward:
    """Stands in for `pipe._interrupt`: true for the first `count` times it is asked, so that many steps are skipped."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left >= 0


def _become(target: object, attributes: dict[str, Any]) -> None:
    """Replace an object's attributes; complete at every moment, should a signal arrive in between."""
    current = vars(target)
    current.update(attributes)
    for name in current.keys() - attributes.keys():
        del current[name]


def _denoiser_of(pipe: DiffusionPipeline) -> torch.nn.Module:
    for name in ("transformer", "unet"):
        module = getattr(pipe, name, None)
        if isinstance(module, torch.nn.Module):
            return module
    raise ValueError(f"{type(pipe).__name__} has neither a transformer nor a unet to denoise with")


class StockLoop:
    """One call of a stock pipeline, paused before its first step and at every `scheduler.step`.

    Args:
        pipe: the pipeline; its class's own `__call__` runs, without the `no_grad` around it, so that the caller's
            gradient mode holds.
        call: keyword arguments of that `__call__`.
        skip: number of leading steps to skip without calling the denoiser.
        encode_prompt: replaces `pipe.encode_prompt` during the call; it receives the original as first argument.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        call: dict[str, Any],
        skip: int = 0,
        encode_prompt: Callable[..., Sequence[Tensor | None]] | None = None,
    ) -> None:
        self.pipe = pipe
        self._denoiser = _denoiser_of(pipe)
        self.evaluations = 0
        self._latents: Tensor | None = None
        self._inner_pipe: dict[str, Any] = dict(vars(pipe))
        self._inner_scheduler: dict[str, Any] = dict(vars(pipe.scheduler))
        self._skip = skip
        self._install(encode_prompt)
        stock_call = type(pipe).stock_call if hasattr(type(pipe), "stock_call") else type(pipe).__call__
        run = getattr(stock_call, "__wrapped__", stock_call)
        self._greenlet: greenlet = greenlet(lambda: Done(run(pipe, **call)))

    def _install(self, encode_prompt: Callable[..., Sequence[Tensor | None]] | None) -> None:
        pipe, scheduler = self.pipe, self.pipe.scheduler
        inner = self._inner_pipe
        inner["_progress_bar_config"] = {"disable": True}
        stock_prepare, stock_encode, stock_bar = pipe.prepare_latents, pipe.encode_prompt, pipe.progress_bar
        stock_step, stock_set_timesteps = scheduler.step, scheduler.set_timesteps

        @functools.wraps(stock_prepare)
        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            prepared = stock_prepare(*args, **kwargs)
            self._latents = prepared[0] if isinstance(prepared, tuple) else prepared
            return prepared

        @functools.wraps(stock_bar)
        def progress_bar(*args: Any, **kwargs: Any) -> Any:
            # Opened right before the loop, when latents and timesteps are ready: the one place all families share.
            assert self._latents is not None
            self._pause(Start(self._latents, bool(getattr(pipe, "do_classifier_free_guidance", False))))
            return stock_bar(*args, **kwargs)

        @functools.wraps(stock_step)
        def step(model_output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            return (self._pause(Step(model_output, timestep, sample)),)

        @functools.wraps(stock_set_timesteps)
        def set_timesteps(*args: Any, **kwargs: Any) -> None:
            stock_set_timesteps(*args, **kwargs)
            if self._skip:
                pipe._interrupt = _FastForward(self._skip)

        inner |= {"prepare_latents": prepare_latents, "progress_bar": progress_bar}
        if encode_prompt is not None:
            inner["encode_prompt"] = functools.wraps(stock_encode)(functools.partial(encode_prompt, stock_encode))
        self._inner_scheduler |= {"step": step, "set_timesteps": set_timesteps}

    def _pause(self, pause: Pause) -> Any:
        """Called inside the greenlet: hand `pause` to whoever resumed the loop, and wait for the next latents."""
        parent = self._greenlet.parent
        assert parent is not None
        return parent.switch(pause)

    @property
    def alive(self) -> bool:
        """Whether the loop can be resumed."""
        return not self._greenlet.dead

    def resume(self, latents: Tensor | None = None) -> Pause:
        """Run to the next pause.  Exceptions of the stock call come through, and end the loop."""
        pipe, scheduler = self.pipe, self.pipe.scheduler
        outer_pipe, outer_scheduler = dict(vars(pipe)), dict(vars(scheduler))
        counter = self._denoiser.register_forward_pre_hook(self._count, with_kwargs=True)
        self._greenlet.parent = getcurrent()
        started = bool(self._greenlet)
        try:
            _become(pipe, self._inner_pipe)
            _become(scheduler, self._inner_scheduler)
            pause: Pause = self._greenlet.switch(latents) if started else self._greenlet.switch()
        finally:
            counter.remove()
            self._inner_pipe, self._inner_scheduler = dict(vars(pipe)), dict(vars(scheduler))
            _become(pipe, outer_pipe)
            _become(scheduler, outer_scheduler)
        return pause

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = args[0] if args else kwargs["hidden_states"]
        self.evaluations += len(batch)

    def scheduler_state(self) -> dict[str, Any]:
        """The scheduler's attributes as the loop left them (sigmas, timesteps)."""
        return self._inner_scheduler

    def close(self) -> None:
        """Abandon the loop; the pipeline's offload hooks are released as at the end of a stock call."""
        if self._greenlet and self.alive:
            self._greenlet.throw(GreenletExit)
            self.pipe.maybe_free_model_hooks()

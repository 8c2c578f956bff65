"""A stock pipeline call as a coroutine that pauses wherever it reaches `scheduler.step`.

The stock `__call__` runs in a greenlet.  At `scheduler.step(model_output, t, sample)` everything family-specific is
done, so the loop hands these three out and waits for the next latents.  While it waits, the pipeline and its scheduler
look exactly as they did before the call: their attributes are exchanged at every switch, so nothing has to be cleaned
up when a loop is abandoned, and the pipeline can be used for other things meanwhile.
"""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from rsm_guidance.engine.callbacks import Callbacks, ForEveryRow, replayed
from rsm_guidance.engine.families import denoisers_of, stock_call_of, traits_of, uses_guidance


@dataclass(frozen=True)
class Start:
    """The loop is ready to begin: `latents` [B, ...] and `steps` timesteps are prepared, no denoiser has been called.

    `guided` says whether the call uses classifier-free guidance, `size` is the image's height and width in pixels where the
    call names them.
    """

    latents: Tensor
    steps: int
    guided: bool
    size: tuple[int, int] | None


@dataclass(frozen=True)
class Step:
    """The loop stands at `scheduler.step`; all tensors [B, ...].

    `timestep` is what the scheduler was told; `following` holds the latents [B, ...] to which it has stepped, where it
    takes its own steps.
    """

    model_output: Tensor
    sample: Tensor
    timestep: Any
    following: Tensor | None = None


@dataclass(frozen=True)
class Done:
    """The loop ran to its end and returned the stock output."""

    output: Any


Pause = Start | Step | Done


@dataclass
class _SchedulerOutput(BaseOutput):
    """What `scheduler.step` returns, for pipelines that read it by name."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class _FastForward:
    """Stands in for `pipe._interrupt`: true for the first `count` times it is asked, so that many steps are skipped."""

    def __init__(self, count: int) -> None:
        self.left = count

    def __bool__(self) -> bool:
        self.left -= 1
        return self.left >= 0


class _Blank:
    """Stands in for a denoiser whose output will not be used: zeros like the latents, at no cost."""

    def __init__(self, module: torch.nn.Module, latents: Tensor) -> None:
        self._module, self._latents = module, latents

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        return (self._latents.new_zeros(batch_size(args, kwargs), *self._latents.shape[1:]),)


def batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Latents that a denoiser is called with: the length of its first input, by whatever name."""
    return len(args[0] if args else next(kwargs[n] for n in ("hidden_states", "sample", "x") if n in kwargs))


def stop_asked_of(pipe: DiffusionPipeline) -> bool:
    """Whether someone, perhaps in another thread, has set the flag by which stock calls end early."""
    return vars(pipe).get("_interrupt") is True


def _become(pipe: DiffusionPipeline, attributes: dict[str, Any]) -> None:
    """Replace a pipeline's attributes; complete at every moment, should a signal arrive in between.

    The flag that asks for an early end stays as it is: another thread may set it at any time.
    """
    current = vars(pipe)
    current.update({n: v for n, v in attributes.items() if n != "_interrupt"})
    for name in current.keys() - attributes.keys() - {"_interrupt"}:
        del current[name]


class StockLoop:
    """One call of a stock pipeline, paused before its first step and at every `scheduler.step`.

    Args:
        pipe: the pipeline; its class's own `__call__` runs, without the `no_grad` around it, so that the caller's
            gradient mode holds.
        call: keyword arguments of that `__call__`.
        callbacks: remember what the caller's callback was told.
        rows: of the call.
        latents: what the loop starts from, instead of the latents that the call prepares.
        skip: number of leading steps to skip without calling the denoiser.
        encode_prompt: replaces `pipe.encode_prompt` during the call; it receives the original as first argument.
        stand_ins: what to call inside of the loop instead of modules of the pipeline, by their names.

    Attributes:
        evaluations: denoiser evaluations so far.
        own_steps: whether the scheduler takes its own steps, pausing after each; set it before the first step.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        call: dict[str, Any],
        callbacks: Callbacks,
        rows: tuple[int, ...],
        latents: Tensor | None = None,
        skip: int = 0,
        encode_prompt: Callable[..., Any] | None = None,
        stand_ins: Mapping[str, Any] | None = None,
    ) -> None:
        self.pipe = pipe
        self._stand_ins = dict(stand_ins or {})
        self.evaluations = 0
        self.own_steps = False
        self._override = latents
        traits = traits_of(pipe)
        self._call = dict(call)
        end, old = call.get("callback_on_step_end"), call.get("callback")
        # diffusers' own callbacks change the run at certain steps, so they must see the steps that a jump passes, too;
        # others are told of the latents that the jump ends with.
        passes = replayed(end)
        if passes:
            self._call["callback_on_step_end"] = ForEveryRow(end, self._rows)
        elif end is not None:
            self._call["callback_on_step_end"] = callbacks.bound(end, rows, skip)
        if old is not None:
            self._call["callback"] = callbacks.plain(old, rows, skip)
        ends = traits.blends or old is not None or (end is not None and not passes)
        self._blank = min(skip, int(ends)) if traits.interrupts and not passes else skip
        self._jump = skip - self._blank
        self._latents: Tensor | None = None
        self._size: tuple[int, int] | None = None
        self._denoisers = denoisers_of(pipe)
        self._inner_pipe: dict[str, Any] = dict(vars(pipe))
        self._scheduler: Any = copy.copy(pipe.scheduler)  # others may use the pipeline's meanwhile
        self._inner_pipe["scheduler"] = self._scheduler
        self._install(encode_prompt)
        stock_call = stock_call_of(type(pipe))
        run = getattr(stock_call, "__wrapped__", stock_call)
        self._greenlet: greenlet = greenlet(lambda: Done(run(pipe, **self._call)))

    def _install(self, encode_prompt: Callable[..., Any] | None) -> None:
        pipe = self.pipe
        stock_prepare, stock_bar, stock_step = pipe.prepare_latents, pipe.progress_bar, self._scheduler.step
        draws = "generator" in inspect.signature(stock_step).parameters

        @functools.wraps(stock_prepare)
        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            arguments = inspect.signature(stock_prepare).bind(*args, **kwargs).arguments
            if "height" in arguments and "width" in arguments:
                self._size = int(arguments["height"]), int(arguments["width"])
            prepared = stock_prepare(*args, **kwargs)
            several = isinstance(prepared, tuple | list)
            own = prepared[0] if several else prepared
            self._latents = own if self._override is None else self._override
            return (self._latents, *prepared[1:]) if several else self._latents

        @functools.wraps(stock_bar)
        def progress_bar(iterable: Any = None, total: int | None = None, **kwargs: Any) -> Any:
            # Opened right before the loop, when latents and timesteps are ready: the one place all families share.
            latents = self._prepared()
            steps = self._steps(len(iterable) if total is None else total)
            self._pause(Start(latents, steps, uses_guidance(pipe, self._call), self._size))
            self._fast_forward()
            return stock_bar(iterable=iterable, total=total, **kwargs)

        @functools.wraps(stock_step)
        def step(model_output: Tensor, timestep: Tensor, sample: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.own_steps:
                if draws:
                    kwargs.setdefault("generator", self._call.get("generator"))
                result = stock_step(model_output, timestep, sample, *args, **kwargs)
                self._pause(Step(model_output, sample, timestep, result[0]))
                return result
            self._count_step(timestep)
            if self._blank:
                latents = self._pass_blank()
            else:
                latents = self._pause(Step(model_output, sample, timestep))
            # Twice, since one-step pipelines read the second entry, x0; after the last step both are that.
            return (latents, latents) if kwargs.get("return_dict") is False else _SchedulerOutput(latents, latents)

        inner = self._inner_pipe
        inner |= {"prepare_latents": prepare_latents, "progress_bar": progress_bar}
        inner["_progress_bar_config"] = {"disable": True}
        if encode_prompt is not None and hasattr(pipe, "encode_prompt"):
            stock_encode = pipe.encode_prompt
            inner["encode_prompt"] = functools.wraps(stock_encode)(functools.partial(encode_prompt, stock_encode))
        self._scheduler.step = step

    # --- inside the greenlet ---

    def _rows(self) -> int:
        return len(self._prepared())

    def _prepared(self) -> Tensor:
        """The latents that the loop starts from."""
        if self._latents is None:
            raise ValueError(
                f"{type(self.pipe).__name__} takes given latents without preparing them, so that the engine cannot set its "
                "own; leave `latents` out"
            )
        return self._latents

    def _pause(self, pause: Pause) -> Any:
        """Hand `pause` to whoever resumed the loop, and wait for the next latents."""
        parent = self._greenlet.parent
        assert parent is not None
        return parent.switch(pause)

    def _steps(self, total: int) -> int:
        """Steps of the loop, from the levels that its progress bar counts; some schedulers step more often than that."""
        scheduler = self.pipe.scheduler
        if getattr(scheduler, "custom_timesteps", False):
            return total
        if hasattr(scheduler, "begin_index"):
            return len(scheduler.timesteps) - (scheduler.begin_index or 0)
        return total + len(scheduler.timesteps) - (scheduler.num_inference_steps or total)

    def _fast_forward(self) -> None:
        """Arrange for the steps to be skipped: by the family's own interruption, else by denoisers that do nothing."""
        pipe, scheduler = self.pipe, self.pipe.scheduler
        vars(pipe).update(self._stand_ins)
        if self._jump:
            pipe._interrupt = _FastForward(self._jump)
            if hasattr(scheduler, "_step_index"):
                scheduler._step_index = (scheduler.begin_index or 0) + self._jump
        if self._blank:
            latents = self._prepared()
            vars(pipe).update({name: _Blank(module, latents) for name, module in self._denoisers.items()})

    def _pass_blank(self) -> Tensor:
        """One skipped step is over; after the last one the denoisers are the real ones again."""
        self._blank -= 1
        if not self._blank:
            vars(self.pipe).update(self._denoisers)
        return self._prepared()

    def _count_step(self, timestep: Tensor) -> None:
        """Advance the scheduler's own counter, on which its `scale_model_input` depends."""
        scheduler = self.pipe.scheduler
        if hasattr(scheduler, "_step_index"):
            if scheduler._step_index is None:
                scheduler._init_step_index(timestep)
            scheduler._step_index += 1

    # --- outside ---

    @property
    def alive(self) -> bool:
        """Whether the loop can be resumed."""
        return not self._greenlet.dead

    def resume(self, latents: Tensor | None = None) -> Pause:
        """Run to the next pause.  Exceptions of the stock call come through, and end the loop."""
        pipe, stop_asked = self.pipe, stop_asked_of(self.pipe)
        outer = dict(vars(pipe))
        counters = [m.register_forward_pre_hook(self._count, with_kwargs=True) for m in self._denoisers.values()]
        self._greenlet.parent = getcurrent()
        started = bool(self._greenlet)
        try:
            _become(pipe, self._inner_pipe)
            with warnings.catch_warnings():
                if self._override is not None:
                    warnings.simplefilter("ignore", FutureWarning)  # the first call has shown them
                pause: Pause = self._greenlet.switch(latents) if started else self._greenlet.switch()
        finally:
            for counter in counters:
                counter.remove()
            self._inner_pipe = dict(vars(pipe))
            _become(pipe, outer)
            if "_interrupt" in vars(pipe):
                pipe._interrupt = stop_asked or self.interrupted  # and not what stands in for it on a jump
        return pause

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getcurrent() is self._greenlet:  # others may use the module meanwhile
            self.evaluations += batch_size(args, kwargs)

    @property
    def interrupted(self) -> bool:
        """Whether `pipe._interrupt` was set inside, which asks a stock call to end early."""
        return self._inner_pipe.get("_interrupt") is True

    def scheduler_state(self) -> dict[str, Any]:
        """The scheduler's attributes as the loop left them (sigmas, timesteps)."""
        return vars(self._scheduler)

    def close(self) -> None:
        """Abandon the loop; the pipeline's offload hooks are released as at the end of a stock call."""
        if self._greenlet and self.alive:
            self._greenlet.throw(GreenletExit)
            self.pipe.maybe_free_model_hooks()

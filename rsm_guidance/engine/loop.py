"""A stock pipeline call as a coroutine that pauses wherever it reaches `scheduler.step`.

The stock `__call__` runs in a greenlet.  At `scheduler.step(model_output, t, sample)` everything family-specific is
done, so the loop hands these three out and waits for the next latents.  While it waits, the pipeline and its scheduler
look exactly as they did before the call: their attributes are exchanged at every switch, so nothing has to be cleaned
up when a loop is abandoned, and the pipeline can be used for other things meanwhile.
"""

import copy
import functools
import inspect
import operator
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from greenlet import GreenletExit, getcurrent, greenlet
from torch import Tensor

from rsm_guidance.core.random import derive_seed
from rsm_guidance.engine.borrowed import GlobalRandom, Processors, State
from rsm_guidance.engine.callbacks import Callbacks, ForEveryRow, replayed
from rsm_guidance.engine.families import denoisers_of, stock_call_of, traits_of, uses_guidance
from rsm_guidance.engine.schedulers import Stepper, idle_steps, stepper
from rsm_guidance.engine.stand_ins import Blank, FastForward, Shapes, batch_size


@dataclass(frozen=True)
class Start:
    """The loop is ready to begin: `latents` [B, ...] and `steps` timesteps are prepared, no denoiser has been called.

    `guided` says whether the call uses classifier-free guidance, `size` is the image's height and width in pixels where the
    call names them, `idle` the number of steps at the end that are made from clean latents.
    """

    latents: Tensor
    steps: int
    guided: bool
    size: tuple[int, int] | None
    idle: int = 0


@dataclass(frozen=True)
class Step:
    """The loop stands at `scheduler.step`; all tensors [B, ...].

    `timestep` is what the scheduler was told; `following` holds the latents [B, ...] to which it has stepped, where it
    takes its own steps; `stepper` is the step that it would have taken, where that was asked for.
    """

    model_output: Tensor
    sample: Tensor
    timestep: Any
    following: Tensor | None = None
    stepper: Stepper | None = None


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


@dataclass
class Surroundings:
    """What the loops of one call have in common.

    Attributes:
        processors: the attention processors of the pipeline's modules.
        random: torch's global generators.
        before: their states, from which restarts draw.
        key: names the draws inside of the loop.
        shapes: how denoisers have answered.
        callbacks: what the caller's callback was told.
        blends: whether the pipeline changes the latents after `scheduler.step` (inpainting pastes the known region), so that
            a jump has to run the end of the step before; until that is known, it is taken to do so.
    """

    processors: Processors
    random: GlobalRandom
    before: State
    key: int
    shapes: Shapes = field(default_factory=Shapes)
    callbacks: Callbacks = field(default_factory=Callbacks)
    blends: bool = True

    @staticmethod
    def of(pipe: DiffusionPipeline, seed: int | None = None) -> "Surroundings":
        """Those of a pipeline now; `seed` says what is drawn from the global generators, else their present state does."""
        random = GlobalRandom(pipe._execution_device)
        before = random.now() if seed is None else random.seeded(seed)
        return Surroundings(Processors(pipe.components.values()), random, before, int(before[0].long().sum()))


class StockLoop:
    """One call of a stock pipeline, paused before its first step and at every `scheduler.step`.

    Args:
        pipe: the pipeline; its class's own `__call__` runs, without the `no_grad` around it, so that the caller's
            gradient mode holds.
        call: keyword arguments of that `__call__`.
        latents: what the loop starts from, instead of the latents that the call prepares.
        skip: number of leading steps to skip without calling the denoiser.
        encode_prompt: replaces `pipe.encode_prompt` during the call; it receives the original as first argument.
        stand_ins: what to call inside of the loop instead of modules of the pipeline, by their names.
        around: what the loops of a call have in common.
        live: whether what is drawn outside of driven levels comes from torch's global generators as they are, as in the
            stock call; else from where those of the first loop began.
        rows: of the call.

    Attributes:
        evaluations: denoiser evaluations so far.
        own_steps: whether the scheduler takes its own steps, pausing after each; set it before the first step.
        watched: whether the next step says what the scheduler would have done.
        drew: whether a level drew from the generators of the call.
        drew_globally: whether its preparation drew from torch's global generators.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        call: dict[str, Any],
        latents: Tensor | None = None,
        skip: int = 0,
        encode_prompt: Callable[..., Any] | None = None,
        stand_ins: Mapping[str, Any] | None = None,
        around: Surroundings | None = None,
        live: bool = False,
        rows: tuple[int, ...] = (),
    ) -> None:
        self.pipe = pipe
        self._stand_ins = dict(stand_ins or {})
        self._around = around or Surroundings.of(pipe)
        self._live, self._random, self._level = live, self._around.before, 0
        self._inner_processors: list[Any] | None = None
        self._begun: Tensor | None = None
        self._before: State | None = None
        self.evaluations = 0
        self.own_steps = self.watched = self.drew = self.drew_globally = False
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
            self._call["callback_on_step_end"] = self._around.callbacks.bound(end, rows, skip)
        if old is not None:
            self._call["callback"] = self._around.callbacks.plain(old, rows, skip)
        ends = self._around.blends or old is not None or (end is not None and not passes)
        self._blank = min(skip, int(ends)) if traits.interrupts and not passes else skip
        self._jump = skip - self._blank
        self._opened = False
        self._latents: Tensor | None = None
        self._size: tuple[int, int] | None = None
        self._denoisers = denoisers_of(pipe)
        self._inner_pipe: dict[str, Any] = dict(vars(pipe))
        self._scheduler: Any = copy.copy(pipe.scheduler)  # others may use the pipeline's meanwhile
        self._inner_pipe["scheduler"] = self._scheduler
        self._inner_pipe.pop("_num_timesteps", None)  # of an earlier call
        self._install(encode_prompt)
        stock_call = stock_call_of(type(pipe))
        run = getattr(stock_call, "__wrapped__", stock_call)
        self._greenlet: greenlet = greenlet(lambda: Done(run(pipe, **self._call)))

    def _install(self, encode_prompt: Callable[..., Any] | None) -> None:
        pipe = self.pipe
        stock_prepare, stock_bar, stock_step = pipe.prepare_latents, pipe.progress_bar, self._scheduler.step
        signature = inspect.signature(stock_step)

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
            if self._opened:
                raise ValueError(
                    f"{type(pipe).__name__} cannot be guided: it opens several progress bars before its denoising loop, so that "
                    "the engine cannot tell where that begins"
                )
            self._opened = True
            steps = self._steps(None if iterable is None else len(iterable), total)
            idle = idle_steps(vars(pipe.scheduler))
            self._pause(Start(latents, steps, uses_guidance(pipe, self._call), self._size, idle))
            self._fast_forward()
            return stock_bar(iterable=iterable, total=total, **kwargs)

        @functools.wraps(stock_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            given = signature.bind(*args, **kwargs).arguments  # some take more than these three, in another order
            model_output, timestep, sample = (given[n] for n in ("model_output", "timestep", "sample"))
            if self.own_steps:
                if "generator" in signature.parameters:
                    kwargs.setdefault("generator", self._call.get("generator"))
                result = stock_step(*args, **kwargs)
                self._pause(Step(model_output, sample, timestep, result[0]))
                return result
            would = stepper(pipe.scheduler, args, kwargs) if self.watched and not self._blank else None
            self._count_step(timestep)
            self._level += 1
            if self._blank:
                latents = self._pass_blank()
            else:
                latents = self._pause(Step(model_output, sample, timestep, stepper=would))
            self._draw_at_level()
            # Twice, since one-step pipelines read the second entry, x0; after the last step both are that.
            return (latents, latents) if kwargs.get("return_dict") is False else _SchedulerOutput(latents, latents)

        inner = self._inner_pipe
        inner |= {"prepare_latents": prepare_latents, "progress_bar": progress_bar}
        inner["_progress_bar_config"] = {"disable": True}
        # Else the denoiser would go to and fro at every decode.
        inner["maybe_free_model_hooks"] = lambda: reset_caches(pipe)
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
                f"{type(self.pipe).__name__} cannot be guided: it starts from latents that its prepare_latents has not made "
                "(given ones, or those of an inverted image), so that the engine cannot set its own"
            )
        return self._latents

    def _pause(self, pause: Pause) -> Any:
        """Hand `pause` to whoever resumed the loop, and wait for the next latents."""
        parent = self._greenlet.parent
        assert parent is not None
        return parent.switch(pause)

    def _steps(self, iterated: int | None, total: int | None) -> int:
        """Steps of the loop: what it iterates over, where it says so; else from the levels that its progress bar counts."""
        told = vars(self.pipe).get("_num_timesteps")
        if iterated is not None or isinstance(told, int):
            return told if iterated is None else iterated
        scheduler, count = self.pipe.scheduler, total or 0
        if getattr(scheduler, "custom_timesteps", False):
            return count
        if hasattr(scheduler, "begin_index"):
            return len(scheduler.timesteps) - (scheduler.begin_index or 0)
        return count + len(scheduler.timesteps) - (getattr(scheduler, "num_inference_steps", None) or count)

    def _fast_forward(self) -> None:
        """Arrange for the steps to be skipped: by the family's own interruption, else by denoisers that do nothing."""
        pipe, scheduler = self.pipe, self.pipe.scheduler
        vars(pipe).update(self._stand_ins)
        self._level = self._jump
        self._draw_at_level()
        if self._jump:
            pipe._interrupt = FastForward(self._jump)
            if hasattr(scheduler, "_step_index"):
                scheduler._step_index = (scheduler.begin_index or 0) + self._jump
        if self._blank:
            latents = self._prepared()
            shapes = self._around.shapes
            vars(pipe).update({n: Blank(m, latents, shapes.of(n, m, latents)) for n, m in self._denoisers.items()})

    def _draw_at_level(self) -> None:
        """What a driven level draws does not depend on the levels before: a jump there draws the same."""
        if not self.own_steps:
            random = self._around.random
            random.put(random.seeded(derive_seed(self._around.key, self._level)))

    def _pass_blank(self) -> Tensor:
        """One skipped step is over; after the last one the denoisers are the real ones again."""
        self._blank -= 1
        if not self._blank:
            vars(self.pipe).update(self._denoisers | self._stand_ins)
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
    def skips(self) -> bool:
        """Whether steps are still to be skipped with a blank denoiser."""
        return self._blank > 0

    @property
    def alive(self) -> bool:
        """Whether the loop can be resumed."""
        return not self._greenlet.dead

    def resume(self, latents: Tensor | None = None) -> Pause:
        """Run to the next pause.  Exceptions of the stock call come through, and end the loop."""
        pipe, stop_asked = self.pipe, stop_asked_of(self.pipe)
        outer = dict(vars(pipe))
        hooks = [m.register_forward_pre_hook(self._count, with_kwargs=True) for m in self._denoisers.values()]
        hooks += [m.register_forward_hook(functools.partial(self._note, n)) for n, m in self._denoisers.items()]
        self._greenlet.parent = getcurrent()
        started = bool(self._greenlet)
        outside = self._enter(started)
        try:
            _become(pipe, self._inner_pipe)
            with warnings.catch_warnings():
                if self._override is not None:
                    warnings.simplefilter("ignore", FutureWarning)  # the first call has shown them
                pause: Pause = self._greenlet.switch(latents) if started else self._greenlet.switch()
        finally:
            for hook in hooks:
                hook.remove()
            self._inner_pipe = dict(vars(pipe))
            _become(pipe, outer)
            if "_interrupt" in vars(pipe):
                pipe._interrupt = stop_asked or self.interrupted  # and not what stands in for it on a jump
            self._leave(*outside)
        return pause

    def _enter(self, started: bool) -> tuple[list[Any], State, bool]:
        """Exchange what lies outside of the pipeline for the loop's own.

        Returns what it was, the random state to begin with, and whether that is the global generators' own.
        """
        around = self._around
        processors, outer = around.processors.now(), around.random.now()
        if self._inner_processors is not None and not _alike(processors, self._inner_processors):
            around.processors.put(self._inner_processors)
        driven = started and not self.own_steps
        live = self._live and not driven
        if driven:
            self._begun = self._own_random()
        if not live:
            around.random.put(self._random)
        self._before = None if started else outer if live else self._random
        return processors, outer, live

    def _leave(self, processors: list[Any], outer: State, live: bool) -> None:
        around = self._around
        self._inner_processors, self._random = around.processors.now(), around.random.now()
        if self._before is not None:
            pairs = zip(self._before, self._random, strict=True)
            self.drew_globally = not all(torch.equal(a, b) for a, b in pairs)
        if not _alike(processors, self._inner_processors):
            around.processors.put(processors)
        if self._begun is not None:
            now = self._own_random()
            self.drew = now is not None and not torch.equal(self._begun, now)
            self._begun = None
        if not live:
            around.random.put(outer)

    def _own_random(self) -> Tensor | None:
        """State of the first generator that the call was given."""
        given = self._call.get("generator")
        first = given[0] if isinstance(given, list) and given else given
        return first.get_state() if isinstance(first, torch.Generator) else None

    def _count(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getcurrent() is self._greenlet:  # others may use the module meanwhile
            self.evaluations += batch_size(args, kwargs)

    def _note(self, name: str, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._around.shapes.note(name, output)

    @property
    def interrupted(self) -> bool:
        """Whether `pipe._interrupt` was set inside, which asks a stock call to end early."""
        return self._inner_pipe.get("_interrupt") is True

    def scheduler_state(self) -> dict[str, Any]:
        """The scheduler's attributes as the loop left them (sigmas, timesteps)."""
        return vars(self._scheduler)

    def close(self) -> None:
        """Abandon the loop."""
        if self._greenlet and self.alive:
            self._greenlet.throw(GreenletExit)
            reset_caches(self.pipe)


def reset_caches(pipe: DiffusionPipeline) -> None:
    """Forget what modules keep from step to step, as at the end of a stock call."""
    for component in pipe.components.values():
        if hasattr(component, "_reset_stateful_cache"):
            component._reset_stateful_cache()


def _alike(first: list[Any], second: list[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return all(map(operator.is_, first, second))

"""Drives the stock loops of one call for any rows: the latents of a level in, the denoiser's answer out.

Other rows than the call's own are asked for in one call where there is a right way to do so (`engine.rows`); else they go through
the call itself, as it is, in as many turns as a row occurs: that is right for every pipeline, and slower where batches help.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rsm_guidance.core.contracts import StopRequested, UsageError
from rsm_guidance.engine.arguments import NotReplayable
from rsm_guidance.engine.callbacks import unwatched
from rsm_guidance.engine.families import denoisers_of, prompts_of
from rsm_guidance.engine.loop import Done, Pause, Start, Step, StockLoop, Surroundings, stop_asked_of
from rsm_guidance.engine.recording import Blanks, Recorder, Visit, first_number, visits
from rsm_guidance.engine.restart import WAYS, Repeats
from rsm_guidance.engine.rows import close, difference, picked_rows

Rows = tuple[int, ...]
Key = tuple[Rows, int]
"""Of a paused call: its rows, and which of the turns that take the same rows it is."""

_KEPT = 3
"""For how many kinds of rows calls stay paused, to go on when they are asked for again."""


@dataclass
class Known:
    """What was found out about calls of one form of a pipeline, so that it is found out once.

    Attributes:
        way: how to ask for other rows; "" where there is none, None before it was tried.
        pictures: how rows of a call with one picture get it: "shared", "each" one of their own, or "mixed", where neither makes
            a row what it is alone; None before it was tried.
        sign: of model outputs, once a step was compared with the scheduler's own; None before.
        distinct: whether `scheduler.step` was seen to be called once per level.
        blends: as in `Surroundings`; None before it was seen.
        moved: whether the call changes the latents between `prepare_latents` and its first step; None before it was seen.
        memory: what the denoiser is given, or makes, at a level that depends on the levels before; "" if there is no such thing,
            None before it was tried.
        together: whether a row is denoised to something else than alone; None before it was tried.
        decoding: how the output is made to images; None before it was tried.
    """

    way: str | None = None
    pictures: str | None = None
    sign: int | None = None
    distinct: bool = False
    blends: bool | None = None
    moved: bool | None = None
    memory: str | None = None
    together: bool | None = None
    decoding: str | None = None


_KNOWN: "weakref.WeakKeyDictionary[DiffusionPipeline, dict[Any, Known]]" = weakref.WeakKeyDictionary()


def known_of(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> Known:
    """What is known of calls with the same scheduler and the same kinds of arguments."""
    form = tuple(sorted((name, _kind(value)) for name, value in call.items() if value is not None))
    scheduler = pipe.scheduler
    return _KNOWN.setdefault(pipe, {}).setdefault((type(scheduler), str(dict(scheduler.config)), form), Known())


def _kind(value: Any) -> str:
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, list | tuple):
        return f"{type(value).__name__}{[_kind(v) for v in value]}"
    return f"{type(value).__name__}{list(value.shape) if hasattr(value, 'shape') else ''}"


def rows_of(pipe: DiffusionPipeline, call: Mapping[str, Any]) -> list[str]:
    """The prompt of every sample that a stock call makes, "" for those without; counted from what it prepares, if need be.

    Raises:
        ValueError: if it cannot be counted, as the call raises something, or prepares nothing.
    """
    prompts = prompts_of(call)
    if prompts:
        return prompts
    own = {"generator": torch.Generator().manual_seed(0)} if call.get("generator") is not None else {}
    loop = StockLoop(pipe, dict(call) | own)
    try:
        return [""] * len(start_of(loop).latents)
    finally:
        loop.close()


@dataclass
class _Paused:
    """A paused stock call: at which level, with which latents, whether these were set, and what the denoiser said of them."""

    loop: StockLoop
    start: Start
    level: int
    sample: Tensor
    given: bool = False
    step: Step | None = None
    version: int = 0

    def answer_to(self, x: Tensor) -> Step | None:
        """The known answer about latents, where it is what the denoiser would say now.

        Known latents are the same object, not changed in place since.  An answer with an autograd graph is given once.
        """
        step = self.step
        if step is None or step.following is not None or x is not self.sample or x._version != self.version:
            return None
        graph = step.model_output.requires_grad or (torch.is_grad_enabled() and x.requires_grad)
        return None if graph else step


@dataclass(frozen=True)
class _Turn:
    """One stock call for some of the rows that were asked for.

    Attributes:
        rows: of the call.
        places: for each of these, which of the wanted rows it serves; -1 where it serves none.
        way: of asking for them; "" for the call itself.
    """

    rows: Rows
    places: tuple[int, ...]
    way: str

    def takes(self, x: Tensor) -> Tensor:
        """What of x [R, ...] the rows of the call are given; those that serve none get what another one gets."""
        return x if self.places == tuple(range(len(x))) else x[self.indices]

    @property
    def indices(self) -> list[int]:
        """Which of the wanted rows each row of the call is given."""
        return [max(self.places) if p < 0 else p for p in self.places]


@dataclass
class Driver:
    """The stock loops of one call.

    Attributes:
        pipe: the pipeline.
        repeats: the call.
        around: what its loops have in common.
        seed: of what is drawn from torch's global generators; None to draw from them as they are.
        stand_ins: what to call inside of the loops instead of modules of the pipeline, by their names.
        evaluations: denoiser evaluations so far, by latents.
        per_row: of one row and level, as last counted.
    """

    pipe: DiffusionPipeline
    repeats: Repeats
    seed: int | None = None
    stand_ins: Mapping[str, Any] | None = None
    evaluations: float = 0.0
    per_row: float = 0.0
    around: Surroundings = field(init=False)
    known: Known = field(init=False)
    scheduler_state: dict[str, Any] = field(default_factory=dict, init=False)
    _start: Start | None = field(default=None, init=False)
    _paused: dict[Key, _Paused] = field(default_factory=dict, init=False)
    _closed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.around = Surroundings.of(self.pipe, self.seed)
        self.known = known_of(self.pipe, self.repeats.call)
        self.around.blends = self.known.blends is not False

    @property
    def base(self) -> Rows:
        """The rows of the call."""
        return self.repeats.base

    def started(self) -> Start:
        """What the call had prepared before its loop.

        Raises:
            ValueError: if it prepares other than a row of latents for each prompt.
        """
        if self._start is None:
            if self.repeats.shares_a_picture:
                self._share_picture()
            paused = self._restart((self.base, 0), _Turn(self.base, self.base, ""), first=True)
            start = paused.start
            if len(start.latents) != len(self.base):
                raise ValueError(
                    f"{type(self.pipe).__name__} cannot be guided: it prepares latents of shape {list(start.latents.shape)} for "
                    f"{len(self.base)} samples; call it with sampler=None"
                )
            self._start, self.scheduler_state = start, paused.loop.scheduler_state()
            self.per_row = self.per_row or (2.0 if start.guided else 1.0)
            if (
                paused.loop.drew_globally
                and len(self.base) > 1
                and isinstance(self.repeats.call.get("generator"), list)
            ):
                warnings.warn(
                    f"{type(self.pipe).__name__} draws from torch's global generator for its whole batch, so that an image depends "
                    "on the size of its batch; for the same image in any batch pass one prompt at a time",
                    stacklevel=2,
                )
            if self.repeats.suspect is not None:
                self._compare_alone(self.repeats.suspect)
        return self._start

    @property
    def steps(self) -> int:
        """Steps of the call whose latents are not clean already."""
        return self.started().steps - self.started().idle

    # --- driven level by level ---

    def step_at(self, x: Tensor, level: int, rows: Rows) -> Step:
        """The denoiser's answer about latents x [R, ...] of rows at a level."""
        self._require_levels()
        turns = self._turns(rows)
        steps = [self._turn((turn.rows, i), turn, turn.takes(x), level) for i, turn in enumerate(turns)]
        if len(turns) == 1 and turns[0].places == tuple(range(len(rows))):
            return steps[0]
        order = order_of(turns, len(rows))
        joined = torch.cat([s.model_output for s in steps])[order], torch.cat([s.sample for s in steps])[order]
        return Step(*joined, steps[0].timestep, stepper=steps[0].stepper)

    def _turn(self, key: Key, turn: _Turn, x: Tensor, level: int) -> Step:
        paused = self._paused.get(key)
        if paused is not None and paused.loop.alive:
            self._paused[key] = self._paused.pop(key)  # the last one is the one that was used last
            if level == paused.level and x is paused.sample and paused.step is None:
                return self._advance(key, None)
            if level == paused.level and (known := paused.answer_to(x)) is not None:
                return known
            if level == paused.level + 1 and paused.step is not None and paused.step.following is None:
                return self._advance(key, x)
        self._restart(key, turn, x, level)
        return self._advance(key, None)

    def _turns(self, rows: Rows) -> list[_Turn]:
        """The calls that serve some rows together."""
        if rows == self.base or not rows:
            return [_Turn(rows, rows, "" if rows else WAYS[0])]
        way = self._way()
        if way:
            return [_Turn(rows, tuple(range(len(rows))), way)]
        turns: list[dict[int, int]] = []
        seen = dict.fromkeys(self.base, 0)
        for place, row in enumerate(rows):
            if seen[row] == len(turns):
                turns.append({})
            turns[seen[row]][row] = place
            seen[row] += 1
        return [_Turn(self.base, tuple(t.get(r, -1) for r in self.base), "") for t in turns]

    # --- the scheduler's own steps ---

    def follow(
        self, rows: Rows, generators: Sequence[torch.Generator] | None, start: Tensor | None
    ) -> Iterator[tuple[Step, Tensor]]:
        """Each step of the call with the scheduler's own steps, and the latents that follow, [R, ...]."""
        turns, whole = self._turns(rows), generators is None and start is None and rows == self.base
        keys = [(turn.rows, index) for index, turn in enumerate(turns)]
        for key, turn in zip(keys, turns, strict=True):
            paused = self._paused.get(key)
            fresh = paused and paused.loop.alive and (paused.level, paused.step) == (0, None)
            if not (whole and fresh):
                drawn = None if generators is None else _for_places(generators, turn.indices)
                latents = None if start is None else turn.takes(start)
                paused = self._restart(key, turn, latents, generators=drawn)
            assert paused is not None
            paused.loop.own_steps = True
        order = order_of(turns, len(rows))
        for level in range(self.steps):
            steps = [self._followed(key, level) for key in keys]
            if level == self.steps - 1:
                for _ in range(self.started().idle):
                    steps = [self._followed(key, level) for key in keys]
            if len(turns) == 1 and turns[0].places == tuple(range(len(rows))):
                joined = steps[0]
            else:
                parts = [
                    torch.cat([getattr(s, n) for s in steps])[order] for n in ("model_output", "sample", "following")
                ]
                joined = Step(parts[0], parts[1], steps[0].timestep, parts[2])
            if joined.following is None:
                raise RuntimeError("a call that takes its scheduler's steps paused before one")
            yield joined, joined.following

    def _followed(self, key: Key, level: int) -> Step:
        paused = self._paused[key]
        following = None if paused.step is None else paused.step.following
        step = self._advance(key, None)
        self._note_blend(following, step.sample)
        paused.level, paused.sample = level, step.following if step.following is not None else step.sample
        return step

    # --- outputs ---

    def outputs(
        self, x0: Tensor, output_type: str, rows: Rows, stand_ins: Mapping[str, Any] | None = None, told: bool = False
    ) -> tuple[list[Any], list[int] | None]:
        """Stock outputs of calls whose every step is skipped, which decode x0 [R, ...].

        With several, also where in them, one after the other, the rows are.  The callback is `told` of the last step, where
        these are the final latents.
        """
        outputs, turns = [], self._turns(rows)
        for turn in turns:
            call = self._call_of(turn) | {"output_type": output_type}
            call = call if told else unwatched(call)
            outputs.append(self._ended_at_once(call, turn.rows, turn.takes(x0), stand_ins))
        whole = len(turns) == 1 and turns[0].places == tuple(range(len(x0)))
        return outputs, None if whole else order_of(turns, len(x0))

    def _ended_at_once(
        self, call: dict[str, Any], rows: Rows, latents: Tensor, stand_ins: Mapping[str, Any] | None
    ) -> Any:
        """The stock output of a call whose every step is skipped.

        Some read what the last step has left besides latents, so that they need its end; what others keep of their denoiser's
        evaluations cannot be had.
        """
        held = None if stand_ins is None else {**(self.stand_ins or {}), **stand_ins}
        loop = self._loop(call, rows, latents, self.started().steps, held)
        try:
            with self._told_of_blanks(loop):
                pause = loop.resume()
                while not isinstance(pause, Done):
                    pause = loop.resume()
            return pause.output
        except UnboundLocalError:
            if self.around.blends:
                raise
            self.around.blends = self.known.blends = True
            return self._ended_at_once(call, rows, latents, stand_ins)
        finally:
            loop.close()

    def ended(self, x0: Tensor) -> Any | None:
        """The stock output for final latents where the paused call is at its last step; None where it is not."""
        paused = self._paused.get((self.base, 0))
        if paused is None or not paused.loop.alive or paused.step is None:
            return None
        following = paused.step.following
        if paused.level != self.steps - 1 or (following is None and self.started().idle):
            return None
        if following is not None and following is not x0:
            return None
        pause = self._resume(paused.loop, x0)
        return pause.output if isinstance(pause, Done) else None

    # --- loops ---

    def initial(self, generators: Sequence[torch.Generator]) -> Tensor:
        """The latents [B, ...] that the call prepares with other generators [B]."""
        loop = self._loop(self.repeats.again(generators), self.base)
        try:
            return start_of(loop).latents
        finally:
            loop.close()

    def rehearse(
        self,
        x: Tensor,
        rows: Rows,
        stand_ins: Mapping[str, Any],
        call: dict[str, Any] | None = None,
        skip: int = 0,
    ) -> Iterator[Step]:
        """The call from its first level on, or after `skip`, with stand-ins for modules (see `StockLoop`) and latents x [R, ...] at each level.

        It is apart from the paused calls.  A callback of the caller's own is left out, diffusers' stay.

        Raises:
            NotReplayable: if there is no way to ask for these rows in one call.
        """
        if call is None:
            turn = self._turns(rows)
            if len(turn) > 1 or turn[0].rows != rows:
                raise NotReplayable(f"{type(self.pipe).__name__} cannot be asked for other rows in one call")
            call = self._call_of(turn[0])
        loop = self._loop(unwatched(call, told=True), rows, x, skip, stand_ins)
        try:
            start = start_of(loop)
            for level in range(skip, start.steps - start.idle):  # and not to the end of the call, where it decodes
                pause = loop.resume(x if level > skip else None)
                if not isinstance(pause, Step):
                    return
                yield pause
        finally:
            self.evaluations += loop.evaluations
            loop.close()

    def answer_at_random(self) -> None:
        """Let random numbers, which depend on what it is given, stand in for the denoiser's answers."""
        blanks = Blanks(self.started().latents, self.around.shapes, drawn=True)
        calls: list[Any] = []
        self.stand_ins = {n: Recorder(n, m, calls, blanks) for n, m in denoisers_of(self.pipe).items()}
        self.discard()

    @property
    def batches(self) -> bool:
        """Whether there is a way to ask for other rows in one call."""
        return bool(self._way())

    def discard(self) -> None:
        """Abandon the paused calls."""
        while self._paused:
            self._paused.popitem()[1].loop.close()

    def close(self) -> None:
        """Abandon the paused calls; offload hooks are released as at the end of a stock call."""
        self.discard()
        if self._start is not None and not self._closed:
            self._closed = True
            self.pipe.maybe_free_model_hooks()

    def _call_of(self, turn: _Turn, generators: Sequence[torch.Generator] | None = None) -> dict[str, Any]:
        return self.repeats.of(turn.rows, turn.way, generators) if turn.way else self.repeats.again(generators)

    def _loop(
        self,
        call: dict[str, Any],
        rows: Rows,
        latents: Tensor | None = None,
        skip: int = 0,
        stand_ins: Mapping[str, Any] | None = None,
        live: bool = False,
    ) -> StockLoop:
        held = self.stand_ins if stand_ins is None else stand_ins
        return StockLoop(self.pipe, call, latents, skip, self.repeats.encoder(rows), held, self.around, live, rows)

    def _restart(
        self,
        key: Key,
        turn: _Turn,
        latents: Tensor | None = None,
        skip: int = 0,
        generators: Sequence[torch.Generator] | None = None,
        first: bool = False,
    ) -> _Paused:
        """Begin a stock call and stop before its first step."""
        self._make_room(key)
        call = dict(self.repeats.call) if first else self._call_of(turn, generators)
        loop = self._loop(call, turn.rows, latents, skip, live=first and self.seed is None)
        start = start_of(loop)
        self._paused[key] = _Paused(loop, start, skip, start.latents, latents is not None)
        return self._paused[key]

    def _make_room(self, key: Key) -> None:
        """Abandon the paused call of a key, those that hold an autograd graph, and those that were used long ago."""
        kinds = list(dict.fromkeys(rows for rows, _ in reversed(self._paused) if rows != key[0]))[: _KEPT - 1]
        for other, paused in list(self._paused.items()):
            graph = paused.step is not None and paused.step.model_output.requires_grad
            if other == key or graph or other[0] not in (key[0], *kinds):
                self._paused.pop(other).loop.close()

    def _advance(self, key: Key, x: Tensor | None) -> Step:
        """Run to the next `scheduler.step`: the pending one (x is None), or the one after handing over x."""
        paused = self._paused[key]
        stopped = f"{type(self.pipe).__name__} was interrupted"
        if stop_asked_of(self.pipe):
            raise StopRequested(stopped)
        before = paused.loop.evaluations
        paused.loop.watched = self.known.sign is None
        try:
            pause = self._resume(paused.loop, x)
        except Exception as error:  # stock runs to its end and decodes, as it cannot under gradient
            if not paused.loop.interrupted:
                raise
            raise StopRequested(stopped) from error
        if not isinstance(pause, Step):
            del self._paused[key]
            if paused.loop.interrupted:
                raise StopRequested(stopped)
            raise ValueError(
                f"{type(self.pipe).__name__} ended without calling scheduler.step; the engine needs a pipeline with "
                "one denoising loop and num_inference_steps > 0"
            )
        if paused.loop.drew:
            raise ValueError(
                f"{type(self.pipe).__name__} cannot be guided from level to level: it draws random numbers at each of them, so that "
                "none can be visited again; use 'none' or 'best-of-n' with the transition 'scheduler'"
            )
        self._check(paused, pause, advanced=x is not None or paused.step is not None)
        self.per_row = (paused.loop.evaluations - before) / len(pause.sample)
        if x is not None:
            paused.level, paused.sample = paused.level + 1, x
            self._note_blend(x, pause.sample)
        paused.step, paused.version = pause, paused.sample._version
        return pause

    def _check(self, paused: _Paused, step: Step, advanced: bool) -> None:
        """Refuse a pipeline whose step is not one of all latents from one level to the next."""
        name, whole = type(self.pipe).__name__, paused.start.latents.shape
        if step.sample.shape != whole:
            raise ValueError(
                f"{name} cannot be guided: its scheduler.step is given latents of shape {list(step.sample.shape)}, a part or "
                f"another arrangement of the {list(whole)} that it prepares; call it with sampler=None"
            )
        if not advanced and paused.level == 0:
            self._check_start(paused, step)
        if self.known.distinct:
            return
        timestep = first_number(step.timestep)
        if advanced and paused.step is not None:
            listed = [float(t) for t in self.scheduler_state.get("timesteps", [])]
            if timestep == first_number(paused.step.timestep) and len(set(listed)) == len(listed):
                raise ValueError(
                    f"{name} cannot be guided: it calls scheduler.step several times per level (timestep {timestep:g} again); "
                    "call it with sampler=None"
                )
            self.known.distinct = True

    def _check_start(self, paused: _Paused, step: Step) -> None:
        """See whether the first step is from the latents that were prepared, or set; if not, only whole runs are possible."""
        if self.known.moved is None:
            close = 1e-4 if step.sample.dtype.itemsize >= 4 else 2e-2
            prepared = paused.start.latents.to(step.sample)
            self.known.moved = not torch.allclose(prepared, step.sample, rtol=close, atol=close)
        if self.known.moved:
            self.around.blends = self.known.blends = True  # so that the end of a step sets them as they are
            if paused.given or not paused.loop.own_steps:
                raise ValueError(
                    f"{type(self.pipe).__name__} changes its latents between preparing them and its first step, so that the "
                    "engine cannot set its own; use 'none' or 'best-of-n' with the transition 'scheduler'"
                )

    def _note_blend(self, given: Tensor | None, sample: Tensor) -> None:
        """See whether latents come to the scheduler as they were handed over."""
        if given is not None and self.known.blends is not True and not self.known.moved:
            self.known.blends = not (given is sample or torch.equal(given, sample))
            self.around.blends = self.known.blends

    def _resume(self, loop: StockLoop, x: Tensor | None) -> Pause:
        before = loop.evaluations
        try:
            with self._told_of_blanks(loop):
                return loop.resume(x)
        finally:
            self.evaluations += loop.evaluations - before

    @contextmanager
    def _told_of_blanks(self, loop: StockLoop) -> Iterator[None]:
        """Say of an error in skipped steps that it is from skipping them."""
        try:
            yield
        except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            if not loop.skips or isinstance(error, torch.OutOfMemoryError | UnboundLocalError):
                raise
            raise UsageError(
                f"{type(self.pipe).__name__} cannot be guided: its steps cannot be skipped without evaluating its denoiser "
                f"({type(error).__name__}: {error}); call it with sampler=None"
            ) from error

    # --- what is tried once ---

    def _require_levels(self) -> None:
        """Refuse to drive a call level by level where a jump to a level is not the same as arriving there.

        Raises:
            ValueError: naming what differs.
        """
        if self.known.memory is None:
            self.known.memory = ""
            x = self._noise()
            arrived = self._visits(self.repeats.again, self.base, x, drawn=True) if self.steps > 1 else []
            if arrived[1:]:
                self._note_blend(x, arrived[1].sample)
            jumped = self._visits(self.repeats.again, self.base, x, drawn=True, skip=1) if arrived else []
            if arrived[1:] and jumped:
                calls = jumped[0].calls[
                    -len(arrived[1].calls) :
                ]  # without those of a step that was passed with a blank denoiser
                there = [replace(jumped[0], calls=calls)]
                self.known.memory = difference(arrived[1:], there, self.base, len(self.base)) or ""
        if self.known.memory:
            raise ValueError(
                f"{type(self.pipe).__name__} cannot be guided from level to level: {self.known.memory} depends on the levels before; "
                "use 'none' or 'best-of-n' with the transition 'scheduler'"
            )

    def _noise(self) -> Tensor:
        """Some latents [B, ...]."""
        like = self.started().latents
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(1)).to(like)

    def _way(self) -> str:
        """How to ask for other rows in one call; "" if there is no right way."""
        if self.known.way is None:
            rows = picked_rows(len(self.base))
            x = self._noise()
            whole = self._visits(self.repeats.again, self.base, x)
            self.known.way = ""
            for way in WAYS if whole else ():
                if self._right(way, rows, whole, x):
                    self.known.way = way
                    break
        return self.known.way

    def _right(self, way: str, rows: Rows, whole: list[Visit], x: Tensor) -> bool:
        picked = self._visits(partial(self.repeats.of, rows, way), rows, x[list(rows)])
        return bool(picked) and difference(whole, picked, rows, len(self.base)) is None

    def _share_picture(self) -> None:
        """Give each row a picture of its own, if only then the last row is what it is alone."""
        if self.known.pictures is None:
            last, each = self.base[-1:], self.repeats.with_a_picture_each()
            shared = self._visits(self.repeats.again, self.base, None)
            self.known.pictures = "mixed" if shared else "shared"
            if self._last_is_alone(shared, last):
                self.known.pictures = "shared"
            else:
                whole = self._visits(each.again, self.base, None)
                if self._last_is_alone(whole, last) or (whole and not shared):
                    self.known.pictures = "each"
        if self.known.pictures == "each":
            self.repeats = self.repeats.with_a_picture_each()
        elif self.known.pictures == "mixed":
            warnings.warn(
                f"{type(self.pipe).__name__} makes something else of one picture for several prompts than for each alone, so that "
                "an image depends on the other prompts of its batch; for the same image in any batch pass one prompt at a time",
                stacklevel=2,
            )

    def _compare_alone(self, row: int) -> None:
        """Warn if a row whose text is encoded to something else with others than alone is denoised to something else.

        Each is denoised once, the first time that a pipeline is asked, and not counted.
        """
        if self.known.together is None:
            x = self.started().latents
            loops = [
                self._loop(self.repeats.again(), self.base, x, stand_ins={}),
                StockLoop(self.pipe, self.repeats.of((row,), "texts"), x[row : row + 1], around=self.around),
            ]
            answers = []
            try:
                with torch.no_grad():
                    for loop in loops:
                        start_of(loop)
                        pause = loop.resume()
                        answers.append(pause.model_output if isinstance(pause, Step) else None)
            except (TypeError, ValueError, LookupError, RuntimeError):  # what a stock call cannot do alone
                answers = []
            finally:
                for loop in loops:
                    loop.close()
            whole, alone = answers if len(answers) == 2 else (None, None)
            self.known.together = whole is not None and alone is not None and not close(whole[row : row + 1], alone)
        if self.known.together:
            warnings.warn(
                f"{type(self.pipe).__name__} encodes the prompts of a batch together, so that an image depends on the other prompts "
                "of its batch; for the same image in any batch pass one prompt at a time",
                stacklevel=2,
            )

    def _last_is_alone(self, whole: list[Visit], last: Rows) -> bool:
        """Whether the last row of a call is what it is in a call of its own."""
        if not whole:
            return False
        alone = self._visits(
            partial(self.repeats.of, last, "texts"), last, None
        )  # from the latents that it starts from
        return bool(alone) and difference(whole, alone, last, len(self.base)) is None

    def _visits(
        self, call: Callable[[], dict[str, Any]], rows: Rows, x: Tensor | None, drawn: bool = False, skip: int = 0
    ) -> list[Visit]:
        """Two levels of a call, the first or those after `skip`, with blanks for its denoiser; empty where it fails."""
        loop = None
        try:
            if x is None:
                loop = self._loop(call(), rows)
                x = start_of(loop).latents
            blanks = Blanks(x, self.around.shapes, drawn)
            seen = []
            for visit in visits(self.pipe, partial(self.rehearse, x, rows, call=call(), skip=skip), x, blanks):
                seen.append(visit)
                if len(seen) == 2:
                    break
            return seen
        except Exception:  # whatever a stock call says to arguments that do not suit it
            return []
        finally:
            if loop is not None:
                loop.close()


def start_of(loop: StockLoop) -> Start:
    """Run a new loop to where its first step would begin."""
    pause = loop.resume()
    if not isinstance(pause, Start):
        loop.close()
        raise ValueError(f"{type(loop.pipe).__name__} opened no progress bar before its loop; it cannot be driven")
    return pause


def order_of(turns: Sequence[_Turn], count: int) -> list[int]:
    """Where in the rows of all turns, one after the other, each of the wanted rows is."""
    places = [place for turn in turns for place in turn.places]
    return [places.index(i) for i in range(count)]


def _for_places(generators: Sequence[torch.Generator], places: Sequence[int]) -> list[torch.Generator]:
    """Generators for the rows of a turn; one that serves twice is copied."""
    used: set[int] = set()
    chosen = []
    for place in places:
        generator = generators[place]
        if place in used:
            copy = torch.Generator(generator.device)
            copy.set_state(generator.get_state())
            generator = copy
        used.add(place)
        chosen.append(generator)
    return chosen

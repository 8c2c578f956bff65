"""Drives the stock loops of one call for any rows: the latents of a level in, the denoiser's answer out.

Other rows than the call's own are asked for in one call where there is a right way to do so (`engine.rows`); else they go through
the call itself, as it is, in as many turns as a row occurs: that is right for every pipeline, and slower where batches help.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rsm_guidance.core.contracts import StopRequested
from rsm_guidance.engine.arguments import NotReplayable
from rsm_guidance.engine.borrowed import Surroundings
from rsm_guidance.engine.callbacks import unwatched
from rsm_guidance.engine.families import denoisers_of, prompts_of
from rsm_guidance.engine.known import Known, known_of
from rsm_guidance.engine.loop import Done, Start, Step, StockLoop, keeps_caches, stop_asked_of
from rsm_guidance.engine.loops import Loops, start_of
from rsm_guidance.engine.recording import Blanks, Recorder
from rsm_guidance.engine.restart import WAYS, Repeats
from rsm_guidance.engine.trials import Trials
from rsm_guidance.engine.turns import Rows, Turn, for_places, order_of, turns_of

Key = tuple[Rows, int]
"""Of a paused call: its rows, and which of the turns that take the same rows it is."""

_KEPT = 3
"""For how many kinds of rows calls stay paused, to go on when they are asked for again."""


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


@dataclass
class Driver:
    """The stock loops of one call.

    Args:
        pipe: the pipeline.
        repeats: the call.
        seed: of what is drawn from torch's global generators; None to draw from them as they are.

    Attributes:
        loops: what opens its loops.
        known: what was found out about calls like this one.
        scheduler_state: the scheduler's attributes in the call.
        per_row: denoiser evaluations of one row and level, as last counted.
    """

    pipe: DiffusionPipeline
    repeats: InitVar[Repeats]
    seed: int | None = None
    loops: Loops = field(init=False)
    known: Known = field(init=False)
    scheduler_state: dict[str, Any] = field(default_factory=dict, init=False)
    per_row: float = field(default=0.0, init=False)
    _trials: Trials = field(init=False)
    _start: Start | None = field(default=None, init=False)
    _paused: dict[Key, _Paused] = field(default_factory=dict, init=False)
    _drew: bool = field(default=False, init=False)
    _closed: bool = field(default=False, init=False)

    def __post_init__(self, repeats: Repeats) -> None:
        self.loops = Loops(self.pipe, repeats, Surroundings.of(self.pipe, self.seed))
        self.known = known_of(self.pipe, repeats.call)
        self.loops.around.blends = self.known.blends is not False
        self._trials = Trials(self.loops, self.known)

    @property
    def call(self) -> Repeats:
        """The call."""
        return self.loops.repeats

    @property
    def base(self) -> Rows:
        """The rows of the call."""
        return self.call.base

    def started(self) -> Start:
        """What the call had prepared before its loop.

        Raises:
            ValueError: if it prepares other than a row of latents for each prompt.
        """
        if self._start is None:
            if self.call.shares_a_picture:
                self._trials.share_picture()
            paused = self._restart((self.base, 0), Turn(self.base, self.base, ""), first=True)
            start = paused.start
            if len(start.latents) != len(self.base):
                raise ValueError(
                    f"{type(self.pipe).__name__} cannot be guided: it prepares latents of shape {list(start.latents.shape)} for "
                    f"{len(self.base)} samples; call it with sampler=None"
                )
            self._start, self.scheduler_state = start, paused.loop.scheduler_state()
            self.per_row = self.per_row or (2.0 if start.guided else 1.0)
            self._drew = paused.loop.drew_globally
        return self._start

    @property
    def steps(self) -> int:
        """Steps of the call whose latents are not clean already."""
        return self.started().steps - self.started().idle

    # --- driven level by level ---

    def step_at(self, x: Tensor, level: int, rows: Rows) -> Step:
        """The denoiser's answer about latents x [R, ...] of rows at a level."""
        self._trials.require_levels(self.started())
        self._trials.compare_alone(self.started(), self._drew)
        turns = self._turns(rows)
        steps = [self._turn((turn.rows, i), turn, turn.takes(x), level) for i, turn in enumerate(turns)]
        if len(turns) == 1 and turns[0].places == tuple(range(len(rows))):
            return steps[0]
        order = order_of(turns, len(rows))
        joined = torch.cat([s.model_output for s in steps])[order], torch.cat([s.sample for s in steps])[order]
        return Step(*joined, steps[0].timestep, stepper=steps[0].stepper)

    def _turn(self, key: Key, turn: Turn, x: Tensor, level: int) -> Step:
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

    def _turns(self, rows: Rows) -> list[Turn]:
        """The calls that serve some rows together."""
        if rows == self.base:
            return [Turn(rows, rows, "")]
        return turns_of(rows, self.base, self._trials.way(self.started()) if rows else WAYS[0])

    # --- the scheduler's own steps ---

    def follow(
        self, rows: Rows, generators: Sequence[torch.Generator] | None, start: Tensor | None
    ) -> Iterator[tuple[Step, Tensor]]:
        """Each step of the call with the scheduler's own steps, and the latents that follow, [R, ...]."""
        self._trials.compare_alone(self.started(), self._drew)
        turns, whole = self._turns(rows), generators is None and start is None and rows == self.base
        keys = [(turn.rows, index) for index, turn in enumerate(turns)]
        for key, turn in zip(keys, turns, strict=True):
            paused = self._paused.get(key)
            fresh = paused and paused.loop.alive and (paused.level, paused.step) == (0, None)
            if not (whole and fresh):
                drawn = None if generators is None else for_places(generators, turn.indices)
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
        self._trials.note_blend(following, step.sample)
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
            outputs.append(self.loops.ended_at_once(call, turn.rows, turn.takes(x0), self.started().steps, stand_ins))
        if self.loops.around.blends and self.known.blends is False:
            self.known.blends = True
        whole = len(turns) == 1 and turns[0].places == tuple(range(len(x0)))
        return outputs, None if whole else order_of(turns, len(x0))

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
        pause = self.loops.resume(paused.loop, x0)
        return pause.output if isinstance(pause, Done) else None

    # --- loops ---

    def initial(self, generators: Sequence[torch.Generator]) -> Tensor:
        """The latents [B, ...] that the call prepares with other generators [B]."""
        loop = self.loops.open(self.call.again(generators), self.base)
        try:
            return start_of(loop).latents
        finally:
            loop.close()

    def rehearse(self, x: Tensor, rows: Rows, stand_ins: Mapping[str, Any]) -> Iterator[Step]:
        """The call for rows with latents x [R, ...] at each level; see `Loops.rehearse`.

        What other rows than the call's own are given is theirs in shape; where they draw other numbers, not in content.

        Raises:
            NotReplayable: if there is no way to ask for these rows in one call.
        """
        way = "" if rows == self.base else self._trials.any_way(rows, self.started())
        if not way and rows != self.base:
            raise NotReplayable(f"{type(self.pipe).__name__} cannot be asked for other rows in one call")
        return self.loops.rehearse(self._call_of(Turn(rows, rows, way)), rows, x, stand_ins)

    def answer_at_random(self) -> None:
        """Let random numbers, which depend on what it is given, stand in for the denoiser's answers."""
        blanks = Blanks(self.started().latents, self.loops.around.shapes, drawn=True)
        calls: list[Any] = []
        self.loops.stand_ins = {n: Recorder(n, m, calls, blanks) for n, m in denoisers_of(self.pipe).items()}
        self.discard()

    @property
    def batches(self) -> bool:
        """Whether there is a way to ask for other rows in one call."""
        return bool(self._trials.way(self.started()))

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

    def _call_of(self, turn: Turn, generators: Sequence[torch.Generator] | None = None) -> dict[str, Any]:
        return self.call.of(turn.rows, turn.way, generators) if turn.way else self.call.again(generators)

    def _restart(
        self,
        key: Key,
        turn: Turn,
        latents: Tensor | None = None,
        skip: int = 0,
        generators: Sequence[torch.Generator] | None = None,
        first: bool = False,
    ) -> _Paused:
        """Begin a stock call and stop before its first step."""
        self._make_room(key)
        call = dict(self.call.call) if first else self._call_of(turn, generators)
        loop = self.loops.open(call, turn.rows, latents, skip, live=first and self.seed is None)
        start = start_of(loop)
        self._paused[key] = _Paused(loop, start, skip, start.latents, latents is not None)
        return self._paused[key]

    def _make_room(self, key: Key) -> None:
        """Abandon the paused call of a key, those that hold an autograd graph, and those that were used long ago.

        All, where modules keep something from step to step: it is of the call that went on last.
        """
        kinds = list(dict.fromkeys(rows for rows, _ in reversed(self._paused) if rows != key[0]))[: _KEPT - 1]
        caches = keeps_caches(self.pipe)
        for other, paused in list(self._paused.items()):
            graph = paused.step is not None and paused.step.model_output.requires_grad
            if other == key or graph or caches or other[0] not in (key[0], *kinds):
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
            pause = self.loops.resume(paused.loop, x)
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
        self._trials.check(paused.start, pause, paused.step, self.scheduler_state.get("timesteps", ()))
        if paused.level == 0 and paused.step is None:
            self._trials.check_start(paused.start, pause, paused.given or not paused.loop.own_steps)
        self.per_row = (paused.loop.evaluations - before) / len(pause.sample)
        if x is not None:
            paused.level, paused.sample = paused.level + 1, x
            self._trials.note_blend(x, pause.sample)
        paused.step, paused.version = pause, paused.sample._version
        return pause

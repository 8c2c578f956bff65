"""Opens the stock loops of one call, and runs those that are no part of driving it."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.engine.borrowed import Surroundings
from rsm_guidance.engine.callbacks import unwatched
from rsm_guidance.engine.loop import Done, Pause, Start, Step, StockLoop
from rsm_guidance.engine.restart import Repeats
from rsm_guidance.engine.turns import Rows


@dataclass
class Loops:
    """What opens loops.

    Attributes:
        pipe: the pipeline.
        repeats: the call.
        around: what its loops have in common.
        stand_ins: what to call inside of the loops instead of modules of the pipeline, by their names.
        evaluations: denoiser evaluations so far, by latents.
    """

    pipe: DiffusionPipeline
    repeats: Repeats
    around: Surroundings
    stand_ins: Mapping[str, Any] | None = None
    evaluations: float = 0.0

    def open(
        self,
        call: dict[str, Any],
        rows: Rows,
        latents: Tensor | None = None,
        skip: int = 0,
        stand_ins: Mapping[str, Any] | None = None,
        live: bool = False,
    ) -> StockLoop:
        """A new loop of a call for rows; see `StockLoop`."""
        held = self.stand_ins if stand_ins is None else stand_ins
        return StockLoop(self.pipe, call, latents, skip, self.repeats.encoder(rows), held, self.around, live, rows)

    def resume(self, loop: StockLoop, x: Tensor | None) -> Pause:
        """Run a loop to its next pause, and count."""
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

    def rehearse(
        self, call: dict[str, Any], rows: Rows, x: Tensor, stand_ins: Mapping[str, Any], skip: int = 0
    ) -> Iterator[Step]:
        """A call from its first level on, or after `skip`, with latents x [R, ...] at each level.

        It is apart from the paused calls.  A callback of the caller's own is left out, diffusers' stay.
        """
        loop = self.open(unwatched(call, told=True), rows, x, skip, stand_ins)
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

    def ended_at_once(
        self, call: dict[str, Any], rows: Rows, latents: Tensor, steps: int, stand_ins: Mapping[str, Any] | None = None
    ) -> Any:
        """The stock output of a call whose every one of `steps` is skipped.

        Some read what the last step has left besides latents, so that they need its end; what others keep of their denoiser's
        evaluations cannot be had.
        """
        held = None if stand_ins is None else {**(self.stand_ins or {}), **stand_ins}
        loop = self.open(call, rows, latents, steps, held)
        try:
            with self._told_of_blanks(loop):
                pause = loop.resume()
                while not isinstance(pause, Done):
                    pause = loop.resume()
            return pause.output
        except UnboundLocalError:
            if self.around.blends:
                raise
            self.around.blends = True
            return self.ended_at_once(call, rows, latents, steps, stand_ins)
        finally:
            loop.close()


def start_of(loop: StockLoop) -> Start:
    """Run a new loop to where its first step would begin."""
    pause = loop.resume()
    if not isinstance(pause, Start):
        loop.close()
        raise ValueError(f"{type(loop.pipe).__name__} opened no progress bar before its loop; it cannot be driven")
    return pause

"""What is tried of a call before it is driven, with stand-ins for its denoiser, and checked of its first steps.

Nothing here is kept with the call: what was found is kept with the pipeline (`engine.known`), and what is tried leaves it as it was.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.engine.known import Known
from rsm_guidance.engine.loop import Start, Step, StockLoop
from rsm_guidance.engine.loops import Loops, start_of
from rsm_guidance.engine.recording import Blanks, Visit, first_number, visits
from rsm_guidance.engine.restart import WAYS
from rsm_guidance.engine.rows import close, difference, picked_rows
from rsm_guidance.engine.turns import Rows


@dataclass
class Trials:
    """Tries a call.

    Attributes:
        loops: of the call.
        known: what was found out before; added to.
    """

    loops: Loops
    known: Known
    _compared: bool = False

    @property
    def _base(self) -> Rows:
        return self.loops.repeats.base

    @property
    def _name(self) -> str:
        return type(self.loops.pipe).__name__

    def check(self, start: Start, step: Step, before: Step | None, timesteps: Any) -> None:
        """Refuse a pipeline whose step is not one of all latents from one level to the next.

        Args:
            start: of its call.
            step: the step.
            before: the one of the level before, if the call has made it.
            timesteps: of the scheduler.

        Raises:
            ValueError: naming what is wrong.
        """
        whole = start.latents.shape
        if step.sample.shape != whole:
            raise ValueError(
                f"{self._name} cannot be guided: its scheduler.step is given latents of shape {list(step.sample.shape)}, a part or "
                f"another arrangement of the {list(whole)} that it prepares; call it with sampler=None"
            )
        if self.known.distinct or before is None:
            return
        timestep, listed = first_number(step.timestep), [float(t) for t in timesteps]
        if timestep == first_number(before.timestep) and len(set(listed)) == len(listed):
            raise ValueError(
                f"{self._name} cannot be guided: it calls scheduler.step several times per level (timestep {timestep:g} again); "
                "call it with sampler=None"
            )
        self.known.distinct = True

    def check_start(self, start: Start, step: Step, driven: bool) -> None:
        """See whether the first step is from the latents that were prepared, or set; if not, only whole runs are possible.

        Raises:
            ValueError: if the call is `driven`, or its latents were set.
        """
        if self.known.moved is None:
            close = 1e-4 if step.sample.dtype.itemsize >= 4 else 2e-2
            prepared = start.latents.to(step.sample)
            self.known.moved = not torch.allclose(prepared, step.sample, rtol=close, atol=close)
        if self.known.moved:
            self.loops.around.blends = self.known.blends = True  # so that the end of a step sets them as they are
            if driven:
                raise ValueError(
                    f"{self._name} changes its latents between preparing them and its first step, so that the "
                    "engine cannot set its own; use 'none' or 'best-of-n' with the transition 'scheduler'"
                )

    def note_blend(self, given: Tensor | None, sample: Tensor) -> None:
        """See whether latents come to the scheduler as they were handed over."""
        if given is not None and self.known.blends is not True and not self.known.moved:
            self.known.blends = not (given is sample or torch.equal(given, sample))
            self.loops.around.blends = self.known.blends

    def require_levels(self, start: Start) -> None:
        """Refuse to drive a call level by level where a jump to a level is not the same as arriving there.

        Raises:
            ValueError: naming what differs.
        """
        if self.known.memory is None:
            self.known.memory = ""
            x = _noise(start)
            arrived = (
                self._visits(self.loops.repeats.again, self._base, x, drawn=True)
                if start.steps - start.idle > 1
                else []
            )
            if arrived[1:]:
                self.note_blend(x, arrived[1].sample)
            jumped = self._visits(self.loops.repeats.again, self._base, x, drawn=True, skip=1) if arrived else []
            if arrived[1:] and jumped:
                calls = jumped[0].calls[
                    -len(arrived[1].calls) :
                ]  # without those of a step that was passed with a blank denoiser
                there = [replace(jumped[0], calls=calls)]
                self.known.memory = difference(arrived[1:], there, self._base, len(self._base)) or ""
        if self.known.memory:
            raise ValueError(
                f"{self._name} cannot be guided from level to level: {self.known.memory} depends on the levels before; "
                "use 'none' or 'best-of-n' with the transition 'scheduler'"
            )

    def way(self, start: Start) -> str:
        """How to ask for other rows in one call; "" if there is no right way."""
        if self.known.way is None:
            rows, x = picked_rows(len(self._base)), _noise(start)
            whole = self._visits(self.loops.repeats.again, self._base, x)
            self.known.way = next((w for w in WAYS if whole and self._right(w, rows, whole, x)), "")
        return self.known.way

    def any_way(self, rows: Rows, start: Start) -> str:
        """A way to ask for other rows, if only for the shapes of what they are given; "" if there is none."""
        x = _noise(start)[list(rows)]
        return self.way(start) or next(
            (w for w in WAYS if self._visits(partial(self.loops.repeats.of, rows, w), rows, x)), ""
        )

    def _right(self, way: str, rows: Rows, whole: list[Visit], x: Tensor) -> bool:
        picked = self._visits(partial(self.loops.repeats.of, rows, way), rows, x[list(rows)])
        return bool(picked) and difference(whole, picked, rows, len(self._base)) is None

    def share_picture(self) -> None:
        """Give each row a picture of its own, if only then the last row is what it is alone."""
        if self.known.pictures is None:
            last, each = self._base[-1:], self.loops.repeats.with_a_picture_each()
            shared = self._visits(self.loops.repeats.again, self._base, None)
            self.known.pictures = "mixed" if shared else "shared"
            if self._last_is_alone(shared, last):
                self.known.pictures = "shared"
            else:
                whole = self._visits(each.again, self._base, None)
                if self._last_is_alone(whole, last) or (whole and not shared):
                    self.known.pictures = "each"
        if self.known.pictures == "each":
            self.loops.repeats = self.loops.repeats.with_a_picture_each()
        elif self.known.pictures == "mixed":
            self._warn(
                "makes something else of one picture for several prompts than for each alone", "the other prompts"
            )

    def compare_alone(self, start: Start, drew_globally: bool) -> None:
        """Warn if a row depends on the others: by what was drawn for all, or as its text is encoded otherwise with others than alone.

        Where texts are encoded otherwise, the row is denoised with the others and alone, once for a pipeline, to see whether
        that matters; it is not counted.
        """
        if self._compared:
            return
        self._compared = True
        if drew_globally and len(self._base) > 1 and isinstance(self.loops.repeats.call.get("generator"), list):
            self._warn("draws from torch's global generator for its whole batch", "the size")
        row = self.loops.repeats.suspect
        if row is None:
            return
        if self.known.together is None:
            x = start.latents
            loops = [
                self.loops.open(self.loops.repeats.again(), self._base, x, stand_ins={}),
                StockLoop(
                    self.loops.pipe, self.loops.repeats.of((row,), "texts"), x[row : row + 1], around=self.loops.around
                ),
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
            self._warn("encodes the prompts of a batch together", "the other prompts")

    def _warn(self, what: str, on: str) -> None:
        """Say that the rows of a batch are not independent."""
        warnings.warn(
            f"{self._name} {what}, so that an image depends on {on} of its batch; for the same image in any batch pass one prompt at "
            "a time",
            stacklevel=2,
        )

    def _last_is_alone(self, whole: list[Visit], last: Rows) -> bool:
        """Whether the last row of a call is what it is in a call of its own."""
        if not whole:
            return False
        alone = self._visits(
            partial(self.loops.repeats.of, last, "texts"), last, None
        )  # from the latents that it starts from
        return bool(alone) and difference(whole, alone, last, len(self._base)) is None

    def _visits(
        self, call: Callable[[], dict[str, Any]], rows: Rows, x: Tensor | None, drawn: bool = False, skip: int = 0
    ) -> list[Visit]:
        """Two levels of a call, the first or those after `skip`, with blanks for its denoiser; empty where it fails."""
        loop = None
        try:
            if x is None:
                loop = self.loops.open(call(), rows)
                x = start_of(loop).latents
            blanks = Blanks(x, self.loops.around.shapes, drawn)
            seen = []
            for visit in visits(self.loops.pipe, partial(self.loops.rehearse, call(), rows, x, skip=skip), x, blanks):
                seen.append(visit)
                if len(seen) == 2:
                    break
            return seen
        except Exception:  # whatever a stock call says to arguments that do not suit it
            return []
        finally:
            if loop is not None:
                loop.close()


def _noise(start: Start) -> Tensor:
    """Some latents like those of a call."""
    return torch.randn(start.latents.shape, generator=torch.Generator().manual_seed(1)).to(start.latents)

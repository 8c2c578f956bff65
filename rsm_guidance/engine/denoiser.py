"""`PipelineDenoiser`: any supported diffusers pipeline as a `core.contracts.Denoiser`."""

import copy
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import DiffusionPipeline
from torch import Tensor

from rsm_guidance.core.contracts import StopRequested
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.engine.callbacks import NAMES as CALLBACKS
from rsm_guidance.engine.callbacks import Callbacks, replayed
from rsm_guidance.engine.families import denoisers_of, require_drivable, stock_call_of
from rsm_guidance.engine.loop import Done, Pause, Start, Step, StockLoop, stop_asked_of
from rsm_guidance.engine.memory import MicroBatch, under_gradient
from rsm_guidance.engine.restart import Repeats
from rsm_guidance.engine.schedulers import Levels, read_levels, refusal

_DECODED_AT_ONCE = 2**18  # latent elements: four latents of 1024x1024 pixels at a time
_REFUSED = {
    "denoising_end": "it stops before the latents are clean, and nothing could judge them",
    "padding_mask_crop": "it pastes the result into the picture outside of the denoising loop",
}


@dataclass
class _Paused:
    """A paused stock call: the rows it holds, at which level, with which latents, and what the denoiser said of them."""

    loop: StockLoop
    start: Start
    rows: tuple[int, ...]
    level: int
    sample: Tensor
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


class PipelineDenoiser:
    """A stock pipeline call, resumed level by level, or restarted where the caller jumps or changes the batch.

    Prompts are encoded once.  Outside of its methods the pipeline is exactly as it was.

    Args:
        pipe: a diffusers pipeline whose class the engine can drive.
        call: keyword arguments of the pipeline's stock `__call__`.

    Attributes:
        evaluations: forward passes of the denoiser so far, by latents.
        checkpointing: under gradient, denoiser and decoder recompute their activations on the way back instead of keeping
            them, where diffusers supports it.

    Latents go through in micro-batches that shrink when memory runs out.

    Raises:
        ValueError: if the pipeline cannot be driven, saying why.
    """

    def __init__(self, pipe: DiffusionPipeline, call: Mapping[str, Any]) -> None:
        require_drivable(pipe)
        for argument, reason in _REFUSED.items():
            if call.get(argument) is not None:
                raise ValueError(f"{argument} cannot be guided: {reason}; call the pipeline with sampler=None")
        self.pipe = pipe
        self.evaluations = 0.0
        self.checkpointing = False
        self._fitting, self._decoding = MicroBatch(sys.maxsize), MicroBatch(sys.maxsize)
        self._repeats = Repeats(pipe, call)
        self.prompts = self._repeats.prompts
        self._others: list[PipelineDenoiser] = []
        self._levels: Levels | None = None
        self._start: Start | None = None
        self._scheduler_state: dict[str, Any] = {}
        self._per_row = 0.0
        self._paused: _Paused | None = None
        self._wide: Any = None  # the decoder in float32
        self._callbacks = Callbacks()
        self.aside = self._callbacks.aside
        if stop_asked_of(pipe):  # of a call before this one
            pipe._interrupt = False

    # --- Denoiser ---

    @property
    def steps(self) -> int:
        """Number of levels that the call visits; with some schedulers more than `num_inference_steps`."""
        return self._started().steps

    @property
    def schedule(self) -> NoiseSchedule:
        """The levels that the pipeline's scheduler gives for this call.

        Raises:
            ValueError: if the scheduler takes no single steps from level to level, saying what to do.
        """
        return self._read().schedule

    @property
    def evaluations_per_row(self) -> float:
        """Denoiser evaluations per latent and level, as counted on the last one; before the first, as the call asks."""
        self.initial()
        return self._per_row

    def initial(self, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """The latents [B, ...] the stock call starts from: its own, or those it prepares with other generators [B]."""
        own = self._started().latents
        if generators is None:
            return own
        base = self._repeats.base
        loop = self._new_loop(self._repeats.of(base, list(generators)), base)
        try:
            return _start_of(loop).latents
        finally:
            loop.close()

    def predict(self, x: Tensor, level: int, rows: Tensor | None = None) -> Prediction:
        """Denoise x [R, ...] at a level; see `core.contracts.Denoiser`.

        What is free: asking again about the tensor that was asked about last (the object itself, unchanged, without a
        graph).  What costs a denoiser evaluation and no more: latents one level on, for the same rows.  All else, also a
        clone of known latents, restarts the stock call at the level: its prompts are not encoded again, but input images
        are.

        Raises:
            ValueError: at the clean level, and if latents and rows are not as many.
        """
        levels = self._read()
        levels.schedule.coefficients(level)
        if level == self.steps:
            raise ValueError(f"level {level} is clean; there is nothing to predict")
        wanted = self._repeats.base if rows is None else tuple(rows.tolist())
        if len(wanted) != len(x):
            raise ValueError(f"{len(x)} latents were given for {len(wanted)} rows; they must be as many")
        with self._under_gradient():
            steps = self._fitting(lambda piece: self._step_at(_part(x, piece), level, wanted[piece]), len(x))
        read = [levels.read(s.sample, s.model_output, level) for s in steps]
        return read[0] if len(read) == 1 else _joined(x, read)

    def follow(
        self,
        rows: Tensor | None = None,
        generators: Sequence[torch.Generator] | None = None,
        start: Tensor | None = None,
    ) -> Iterator[tuple[Prediction | None, Tensor]]:
        """Run the call with the scheduler's own steps; see `core.contracts.Denoiser`.

        Without generators and start this is the stock call, bit for bit.
        """
        initial = self.initial()
        base, readable = self._repeats.base, refusal(self.pipe.scheduler) is None
        wanted = base if rows is None else tuple(rows.tolist())
        if start is not None and len(start) != len(wanted):
            raise ValueError(f"{len(start)} starting latents were given for {len(wanted)} rows; they must be as many")
        paused = self._paused
        if generators is not None:
            paused = self._restart(self._repeats.of(wanted, list(generators)), wanted, start)
        elif start is not None:
            paused = self._restart(self._repeats.of(wanted), wanted, start)
        elif not (paused and paused.loop.alive and paused.level == 0 and paused.step is None and paused.rows == base):
            paused = self._restart(self._repeats.of(base), base, initial)
        paused.loop.own_steps = True
        for level in range(self.steps):
            step = self._advance(paused, None)
            following = step.following
            if following is None:
                raise RuntimeError("a call that takes its scheduler's steps paused before one")
            prediction = self._read().read(step.sample, step.model_output, level) if readable else None
            paused.level, paused.sample = level, following
            yield prediction, following

    def decode(self, x0: Tensor, rows: Tensor | None = None) -> Tensor:
        """Clean latents [R, ...] to images [R, 3, H, W] in [0, 1] (videos [R, F, 3, H, W]), differentiable.

        It is the pipeline's own decoder, and inpainting pastes the known region of each row.  Rewards judge images before
        safety checkers and watermarks, which are for those handed out.
        """
        wanted = self._repeats.base if rows is None else tuple(rows.tolist())

        plain = self._plain_decoding()
        x0 = x0.float() if "vae" in plain else x0

        def decoded(piece: slice) -> Tensor:
            images: Tensor = self._zero_step(x0[piece], "pt", wanted[piece], plain)[0]
            return images

        self._decoding.size = min(self._decoding.size, max(1, _DECODED_AT_ONCE // x0[0].numel()))
        with self._under_gradient():
            return torch.cat(self._decoding(decoded, len(x0))).float()

    # --- what pipelines need besides ---

    def finish(self, x0: Tensor) -> Any:
        """The stock output for final latents [B, ...], in the output type the call asked for."""
        paused, base = self._paused, self._repeats.base
        if paused and paused.loop.alive and paused.rows == base and paused.level == self.steps - 1 and paused.step:
            if paused.step.following is None or paused.step.following is x0:
                pause = self._resume(paused.loop, x0)
                if isinstance(pause, Done):
                    return pause.output
        return self._zero_step(x0, None, base, told=True)

    @property
    def token_grid(self) -> tuple[int, int] | None:
        """Rows and columns of packed latents [B, S, C]; None where latents are planes."""
        start = self._started()
        if start.latents.ndim != 3 or start.size is None:
            return None
        patch = 2 * self.pipe.vae_scale_factor
        return start.size[0] // patch, start.size[1] // patch

    def _under_gradient(self) -> AbstractContextManager[None]:
        """Where there is a gradient: checkpointing of denoiser and decoder, if asked for, and weights as they were cast."""
        modules: list[Any] = [*denoisers_of(self.pipe).values(), getattr(self.pipe, "vae", None)]
        return under_gradient([m for m in modules if isinstance(m, torch.nn.Module)], self.checkpointing)

    @property
    def levels(self) -> Levels:
        """The levels of the call, and how model outputs are read at them.

        Raises:
            ValueError: if the scheduler takes no single steps from level to level.
        """
        return self._read()

    @property
    def guidance_scales(self) -> list[float]:
        """The guidance scales that the call names, or its defaults."""
        parameters = inspect.signature(stock_call_of(type(self.pipe))).parameters
        names = [n for n in ("guidance_scale", "true_cfg_scale") if n in parameters]
        values = [self._repeats.call.get(n, parameters[n].default) for n in names]
        return [float(v) for v in values if isinstance(v, int | float)]

    def rehearse(self, x: Tensor, rows: tuple[int, ...], stand_ins: Mapping[str, Any]) -> Iterator[Step]:
        """The call from its first level on, with stand-ins for modules (see `StockLoop`) and latents x [R, ...] at each level.

        It is apart from the paused call.  A callback of the caller's own is left out, diffusers' stay.
        """
        self.initial()
        call = {k: v for k, v in self._repeats.of(rows).items() if k not in CALLBACKS or replayed(v)}
        loop = self._new_loop(call, rows, x, stand_ins=stand_ins)
        try:
            _start_of(loop)
            for level in range(self.steps):  # and not to the end of the call, where it decodes
                pause = loop.resume(x if level else None)
                if not isinstance(pause, Step):
                    return
                yield pause
        finally:
            self.evaluations += loop.evaluations
            loop.close()

    def over(self, pipe: DiffusionPipeline | None) -> "PipelineDenoiser":
        """The denoiser of another pipeline, or of this one, for the same call; closed with this one."""
        call, stop_asked = self._repeats.call, stop_asked_of(self.pipe)
        other = PipelineDenoiser(
            pipe or self.pipe, {k: v for k, v in call.items() if k not in CALLBACKS or replayed(v)}
        )
        if stop_asked:
            self.pipe._interrupt = True
        self._others.append(other)
        return other

    def close(self) -> None:
        """Abandon the paused call, if there is one."""
        while self._others:
            self._others.pop().close()
        self._abandon()

    def _abandon(self) -> None:
        if self._paused is not None:
            self._paused.loop.close()
            self._paused = None

    # --- driving the loop ---

    def _started(self) -> Start:
        """What the first call had prepared before its loop."""
        if self._start is None:
            paused = self._restart(self._repeats.first(), self._repeats.base)
            self._start, self._scheduler_state = paused.start, paused.loop.scheduler_state()
        return self._start

    def _read(self) -> Levels:
        steps = self.steps
        if self._levels is None:
            self._levels = read_levels(self.pipe.scheduler, self._scheduler_state, steps)
        return self._levels

    def _step_at(self, x: Tensor, level: int, rows: tuple[int, ...]) -> Step:
        paused = self._paused
        if paused is not None and paused.loop.alive and rows == paused.rows:
            if level == paused.level and x is paused.sample and paused.step is None:
                return self._advance(paused, None)
            if level == paused.level and (known := paused.answer_to(x)) is not None:
                return known
            if level == paused.level + 1 and paused.step is not None and paused.step.following is None:
                return self._advance(paused, x)
        return self._advance(self._restart(self._repeats.of(rows), rows, x, level), None)

    def _new_loop(
        self,
        call: dict[str, Any],
        rows: tuple[int, ...],
        latents: Tensor | None = None,
        skip: int = 0,
        stand_ins: Mapping[str, Any] | None = None,
    ) -> StockLoop:
        return StockLoop(self.pipe, call, self._callbacks, rows, latents, skip, self._repeats.encoder(rows), stand_ins)

    def _restart(
        self, call: dict[str, Any], rows: tuple[int, ...], latents: Tensor | None = None, skip: int = 0
    ) -> _Paused:
        """Begin a stock call and stop before its first step."""
        self._abandon()
        loop = self._new_loop(call, rows, latents, skip)
        start = _start_of(loop)
        self._per_row = self._per_row or (2.0 if start.guided else 1.0)
        self._paused = _Paused(loop, start, rows, skip, start.latents)
        return self._paused

    def _advance(self, paused: _Paused, x: Tensor | None) -> Step:
        """Run to the next `scheduler.step`: the pending one (x is None), or the one after handing over x."""
        stopped = f"{type(self.pipe).__name__} was interrupted"
        if stop_asked_of(self.pipe):
            raise StopRequested(stopped)
        before = paused.loop.evaluations
        try:
            pause = self._resume(paused.loop, x)
        except Exception as error:  # stock runs to its end and decodes, as it cannot under gradient
            if not paused.loop.interrupted:
                raise
            raise StopRequested(stopped) from error
        if not isinstance(pause, Step):
            self._paused = None
            if paused.loop.interrupted:
                raise StopRequested(stopped)
            raise ValueError(
                f"{type(self.pipe).__name__} ended without calling scheduler.step; the engine needs a pipeline with "
                "one denoising loop and num_inference_steps > 0"
            )
        self._per_row = (paused.loop.evaluations - before) / len(pause.sample)
        if x is not None:
            paused.level, paused.sample = paused.level + 1, x
        paused.step, paused.version = pause, paused.sample._version
        return pause

    def _resume(self, loop: StockLoop, x: Tensor | None) -> Pause:
        before = loop.evaluations
        try:
            return loop.resume(x)
        finally:
            self.evaluations += loop.evaluations - before

    def _plain_decoding(self) -> dict[str, Any]:
        """Stand-ins for what comes after the decoder, and under gradient for one that stock casts up and back again."""
        stand_ins = {n: None for n in ("watermark", "watermarker") if hasattr(self.pipe, n)}
        if hasattr(self.pipe, "run_safety_checker"):
            stand_ins["safety_checker"] = None
        vae: Any = getattr(self.pipe, "vae", None)
        if torch.is_grad_enabled() and isinstance(vae, torch.nn.Module) and vae.dtype == torch.float16:
            if getattr(vae.config, "force_upcast", False):
                if self._wide is None:
                    self._wide = remove_hook_from_module(copy.deepcopy(vae), recurse=True).float()
                stand_ins["vae"] = self._wide.to(self._started().latents.device)
        return stand_ins

    def _zero_step(
        self,
        x0: Tensor,
        output_type: str | None,
        rows: tuple[int, ...],
        stand_ins: Mapping[str, Any] | None = None,
        told: bool = False,
    ) -> Any:
        """The stock output of a call with every step skipped: decodes x0 [R, ...] of some rows.

        The callback is `told` of the last step, where these are the final latents.
        """
        call = self._repeats.of(rows) | ({} if output_type is None else {"output_type": output_type})
        call = call if told else {k: v for k, v in call.items() if k not in CALLBACKS}
        loop = self._new_loop(call, rows, x0, self.steps, stand_ins)
        pause = loop.resume()
        while not isinstance(pause, Done):
            pause = loop.resume()
        return pause.output


def _start_of(loop: StockLoop) -> Start:
    """Run a new loop to where its first step would begin."""
    pause = loop.resume()
    if not isinstance(pause, Start):
        loop.close()
        raise ValueError(f"{type(loop.pipe).__name__} opened no progress bar before its loop; it cannot be driven")
    return pause


def _part(x: Tensor, piece: slice) -> Tensor:
    """Some rows of x; x itself where these are all, by which the loop knows the latents it handed out."""
    return x if piece == slice(0, len(x)) else x[piece]


def _joined(x: Tensor, predictions: list[Prediction]) -> Prediction:
    """One prediction for x from those of its pieces."""
    velocities = [p.velocity for p in predictions if p.velocity is not None]
    return Prediction(
        x,
        torch.cat([p.x0 for p in predictions]),
        torch.cat([p.eps for p in predictions]),
        torch.cat(velocities) if velocities else None,
    )

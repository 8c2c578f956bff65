"""`PipelineDenoiser`: any supported diffusers pipeline as a `core.denoiser.Denoiser`."""

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from rsm_guidance.core.contracts import StopRequested
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.engine.families import denoisers_of, pick_rows, prompts_of, require_drivable, stock_call_of, traits_of
from rsm_guidance.engine.loop import Done, Pause, Start, Step, StockLoop
from rsm_guidance.engine.memory import MicroBatch, cast_weights_kept
from rsm_guidance.engine.restart import Draws, Encoder
from rsm_guidance.engine.schedulers import Levels, read_levels, refusal

_DECODED_AT_ONCE = 2**18  # latent elements: four latents of 1024x1024 pixels at a time
_REFUSED = {
    "denoising_end": "it stops before the latents are clean, and nothing could judge them",
    "padding_mask_crop": "it pastes the result into the picture outside of the denoising loop",
}
_CONDITIONING = ("prompt", "negative_prompt", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


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
        self.prompts = prompts_of(call)
        self._call = {k: [*v] if isinstance(v, list) else v for k, v in call.items()}  # some calls change their lists
        self._draws = Draws(call.get("generator"))
        self._encoded: list[Any] = []
        self._others: list[PipelineDenoiser] = []
        self._levels: Levels | None = None
        self._initial: Tensor | None = None
        self._scheduler_state: dict[str, Any] = {}
        self._size: tuple[int, int] | None = None
        self._steps = 0
        self._per_row = 0.0
        # The paused loop: which rows it holds, at which level, with which latents, and what the denoiser said of them.
        self._loop: StockLoop | None = None
        self._base = tuple(range(len(self.prompts)))
        self._rows = self._base
        self._level = 0
        self._sample: Tensor | None = None
        self._step: Step | None = None
        self._version = 0

    # --- Denoiser ---

    @property
    def steps(self) -> int:
        """Number of levels that the call visits; with some schedulers more than `num_inference_steps`."""
        self.initial()
        return self._steps

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
        if self._initial is None:
            call = self._call
            if isinstance(call.get("generator"), list) and traits_of(self.pipe).draws:
                # An image for each row, so that each is encoded with its row's random numbers and not with the first's.
                call = call | self._images(self._base)
            self._initial = self._restart(call, self._base)
        if generators is None:
            return self._initial
        loop = self._new_loop(self._call_for(self._base, list(generators)), self._base)
        pause = loop.resume()
        loop.close()
        assert isinstance(pause, Start)
        return pause.latents

    def predict(self, x: Tensor, level: int, rows: Tensor | None = None) -> Prediction:
        """Denoise x at a level; see `core.denoiser.Denoiser`."""
        levels = self._read()
        levels.schedule.coefficients(level)
        if level == self._steps:
            raise ValueError(f"level {level} is clean; there is nothing to predict")
        wanted = self._base if rows is None else tuple(rows.tolist())
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
        """Run the call with the scheduler's own steps; see `core.denoiser.Denoiser`.

        Without generators and start this is the stock call, bit for bit.
        """
        self.initial()
        readable = refusal(self.pipe.scheduler) is None
        wanted = self._base if rows is None else tuple(rows.tolist())
        if start is not None and len(start) != len(wanted):
            raise ValueError(f"{len(start)} starting latents were given for {len(wanted)} rows; they must be as many")
        if generators is not None:
            self._restart(self._call_for(wanted, list(generators)), wanted, start)
        elif start is not None:
            self._restart(self._call_for(wanted, self._draws.again(wanted, self._base)), wanted, start)
        elif (
            self._loop is None
            or not self._loop.alive
            or self._level
            or self._step is not None
            or self._rows != self._base
        ):
            self._restart(
                self._call_for(self._base, self._draws.again(self._base, self._base)), self._base, self._initial
            )
        assert self._loop is not None
        self._loop.own_steps = True
        for level in range(self._steps):
            step = self._advance(None)
            assert step.following is not None
            prediction = self._read().read(step.sample, step.model_output, level) if readable else None
            self._level, self._sample = level, step.following
            yield prediction, step.following

    def decode(self, x0: Tensor, rows: Tensor | None = None) -> Tensor:
        """Clean latents [R, ...] to images [R, 3, H, W] in [0, 1] (videos [R, F, 3, H, W]), differentiable.

        It is the pipeline's own decoder, and inpainting pastes the known region of each row.
        """
        wanted = self._base if rows is None else tuple(rows.tolist())

        def decoded(piece: slice) -> Tensor:
            images: Tensor = self._zero_step(x0[piece], "pt", wanted[piece])[0]
            return images

        self._decoding.size = min(self._decoding.size, max(1, _DECODED_AT_ONCE // x0[0].numel()))
        with self._under_gradient():
            return torch.cat(self._decoding(decoded, len(x0))).float()

    # --- what pipelines need besides ---

    def finish(self, x0: Tensor) -> Any:
        """The stock output for final latents [B, ...], in the output type the call asked for."""
        at_end = self._rows == self._base and self._level == self.steps - 1
        if self._loop is not None and self._loop.alive and at_end and self._step is not None:
            if self._step.following is None or self._step.following is x0:
                pause = self._loop.resume(x0)
                assert isinstance(pause, Done)
                return pause.output
        return self._zero_step(x0, str(self._call.get("output_type", "pil")), self._base)

    @property
    def token_grid(self) -> tuple[int, int] | None:
        """Rows and columns of packed latents [B, S, C]; None where latents are planes."""
        if self.initial().ndim != 3 or self._size is None:
            return None
        patch = 2 * self.pipe.vae_scale_factor
        return self._size[0] // patch, self._size[1] // patch

    @contextmanager
    def _under_gradient(self) -> Iterator[None]:
        """Where there is a gradient: checkpointing of denoiser and decoder, if asked for, and weights as they were cast."""
        modules: list[Any] = [*denoisers_of(self.pipe).values(), getattr(self.pipe, "vae", None)]
        modules = [m for m in modules if isinstance(m, torch.nn.Module)]
        able = [m for m in modules if getattr(m, "_supports_gradient_checkpointing", False)]
        chosen = [m for m in able if self.checkpointing and torch.is_grad_enabled() and not m.is_gradient_checkpointing]
        for module in chosen:
            module.enable_gradient_checkpointing()
        try:
            with cast_weights_kept(modules):
                yield
        finally:
            for module in chosen:
                module.disable_gradient_checkpointing()

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
        values = [self._call.get(n, parameters[n].default) for n in names]
        return [float(v) for v in values if isinstance(v, int | float)]

    def rehearse(self, x: Tensor, rows: tuple[int, ...], stand_ins: Mapping[str, Any]) -> Iterator[Step]:
        """The call from its first level on, with stand-ins for modules (see `StockLoop`) and latents x [R, ...] at each level.

        It is apart from the paused call.  A callback of the caller's own is left out, diffusers' stay.
        """
        self.initial()
        call = self._call_for(rows, self._draws.again(rows, self._base))
        if not isinstance(call.get("callback_on_step_end"), PipelineCallback | MultiPipelineCallbacks):
            call.pop("callback_on_step_end", None)
        call.pop("callback", None)
        loop = self._new_loop(call, rows, x, stand_ins=stand_ins)
        try:
            loop.resume()
            pause = loop.resume()
            while isinstance(pause, Step):
                yield pause
                pause = loop.resume(x)
        finally:
            self.evaluations += loop.evaluations
            loop.close()

    def over(self, pipe: DiffusionPipeline | None) -> "PipelineDenoiser":
        """The denoiser of another pipeline, or of this one, for the same call; closed with this one."""
        other = PipelineDenoiser(pipe or self.pipe, self._call)
        self._others.append(other)
        return other

    def close(self) -> None:
        """Abandon the paused call, if there is one."""
        while self._others:
            self._others.pop().close()
        self._abandon()

    def _abandon(self) -> None:
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    # --- driving the loop ---

    def _read(self) -> Levels:
        self.initial()
        if self._levels is None:
            self._levels = read_levels(self.pipe.scheduler, self._scheduler_state, self._steps)
        return self._levels

    def _step_at(self, x: Tensor, level: int, rows: tuple[int, ...]) -> Step:
        going_on = self._loop is not None and self._loop.alive and rows == self._rows
        if going_on and level == self._level and x is self._sample and self._step is None:
            return self._advance(None)
        if going_on and level == self._level and x is self._sample and self._still_holds(x):
            assert self._step is not None
            return self._step
        if going_on and level == self._level + 1 and self._step is not None and self._step.following is None:
            return self._advance(x)
        self._restart(self._call_for(rows, self._draws.again(rows, self._base)), rows, x, level)
        return self._advance(None)

    def _new_loop(
        self,
        call: dict[str, Any],
        rows: tuple[int, ...],
        latents: Tensor | None = None,
        skip: int = 0,
        stand_ins: Mapping[str, Any] | None = None,
    ) -> StockLoop:
        return StockLoop(self.pipe, call, latents, skip, Encoder(self._encoded, rows, len(self._base)), stand_ins)

    def _restart(
        self,
        call: dict[str, Any],
        rows: tuple[int, ...],
        latents: Tensor | None = None,
        skip: int = 0,
    ) -> Tensor:
        """Begin a stock call and stop before its first step; returns its first latents."""
        self._abandon()
        self._loop = self._new_loop(call, rows, latents, skip)
        self._rows, self._level, self._step = rows, skip, None
        pause = self._resume(None)
        if not isinstance(pause, Start):
            raise ValueError(f"{type(self.pipe).__name__} opened no progress bar before its loop; it cannot be driven")
        if not self._steps:
            self._steps, self._scheduler_state = pause.steps, self._loop.scheduler_state()
            self._size = pause.size
        self._per_row = self._per_row or (2.0 if pause.guided else 1.0)
        self._sample = pause.latents
        return pause.latents

    def _advance(self, x: Tensor | None) -> Step:
        """Run to the next `scheduler.step`: the pending one (x is None), or the one after handing over x."""
        assert self._loop is not None and self._sample is not None
        before = self._loop.evaluations
        pause = self._resume(x)
        if not isinstance(pause, Step):
            stopped = self._loop.interrupted
            self._loop = None
            if stopped:
                raise StopRequested(f"a callback interrupted {type(self.pipe).__name__}")
            raise ValueError(
                f"{type(self.pipe).__name__} ended without calling scheduler.step; the engine needs a pipeline with "
                "one denoising loop and num_inference_steps > 0"
            )
        self._per_row = (self._loop.evaluations - before) / len(pause.sample)
        if x is not None:
            self._level, self._sample = self._level + 1, x
        self._step, self._version = pause, self._sample._version
        return pause

    def _still_holds(self, x: Tensor) -> bool:
        """Whether what was computed for x is what would be computed now: x unchanged, and no graph, which serves once."""
        assert self._step is not None
        graph = self._step.model_output.requires_grad or (torch.is_grad_enabled() and x.requires_grad)
        return self._step.following is None and x._version == self._version and not graph

    def _resume(self, x: Tensor | None) -> Pause:
        assert self._loop is not None
        before = self._loop.evaluations
        try:
            return self._loop.resume(x)
        finally:
            self.evaluations += self._loop.evaluations - before

    def _zero_step(self, x0: Tensor, output_type: str, rows: tuple[int, ...]) -> Any:
        """The stock output of a call with every step skipped: decodes x0 [R, ...] of some rows."""
        call = self._call_for(rows, self._draws.again(rows, self._base))
        call |= {"output_type": output_type, "callback": None, "callback_on_step_end": None}
        loop = self._new_loop({k: v for k, v in call.items() if v is not None or k in self._call}, rows, x0, self.steps)
        pause = loop.resume()
        while not isinstance(pause, Done):
            pause = loop.resume()
        return pause.output

    def _call_for(
        self, rows: tuple[int, ...], generators: list[torch.Generator] | torch.Generator | None
    ) -> dict[str, Any]:
        """The call for other rows: one image for each, whose conditioning `Encoder` supplies."""
        count = len(self._base)
        call = {k: v for k, v in self._call.items() if k != "latents" and not k.startswith(_CONDITIONING)}
        call |= {"prompt": [self.prompts[r] for r in rows], "generator": generators}
        negative = self._call.get("negative_prompt")
        given = negative is not None or self._call.get("negative_prompt_embeds") is not None
        if given and traits_of(self.pipe).negatives:
            texts = list(negative) if isinstance(negative, list) else [negative or ""]
            call["negative_prompt"] = [texts[r * len(texts) // count] for r in rows]
        if (copies := traits_of(self.pipe).copies) is not None:
            call[copies] = 1
        return call | self._images(rows)

    def _images(self, rows: tuple[int, ...]) -> dict[str, Any]:
        """The input images of rows, where the family takes one per prompt and each prompt, or row, has one."""
        traits = traits_of(self.pipe)
        if type(getattr(self.pipe, "controlnet", None)).__name__.startswith("Multi"):
            return {}  # its lists hold an image for each control
        picked: dict[str, Any] = {}
        for name in traits.images:
            image: Any = self._call.get(name)
            several = isinstance(image, list)
            if image is not None and getattr(image, "ndim", 0) == 4:  # stays a batch: some families read its axes
                picked[name] = image[[r * len(image) // len(self._base) for r in rows]]
            elif image is not None and (several or traits.draws):
                picked[name] = pick_rows(list(image) if several else [image], rows, len(self._base))
        return picked


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

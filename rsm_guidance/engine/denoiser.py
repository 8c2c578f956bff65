"""`PipelineDenoiser`: any supported diffusers pipeline as a `core.contracts.Denoiser`."""

import copy
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import DiffusionPipeline
from torch import Tensor

from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.engine.callbacks import unwatched
from rsm_guidance.engine.decoding import decoding_of, images_of
from rsm_guidance.engine.driver import Driver, rows_of
from rsm_guidance.engine.families import default_output_type, denoisers_of, require_drivable, stock_call_of
from rsm_guidance.engine.loop import Step, stop_asked_of
from rsm_guidance.engine.memory import MicroBatch, under_gradient
from rsm_guidance.engine.restart import Repeats
from rsm_guidance.engine.schedulers import Levels, read_levels, refusal

_DECODED_AT_ONCE = 2**18  # latent elements: four latents of 1024x1024 pixels at a time
_REFUSED = {
    "denoising_end": "it stops before the latents are clean, and nothing could judge them",
    "padding_mask_crop": "it pastes the result into the picture outside of the denoising loop",
}


class PipelineDenoiser:
    """A stock pipeline call, resumed level by level, or restarted where the caller jumps or changes the batch.

    Prompts are encoded once.  Outside of its methods the pipeline is exactly as it was.

    Args:
        pipe: a diffusers pipeline whose class the engine can drive.
        call: keyword arguments of the pipeline's stock `__call__`.
        seed: of what the pipeline draws from torch's global generators, besides the generators that it is given; None to let
            it draw from them as they are.

    Attributes:
        prompts: of the call's rows; "" for those without.
        checkpointing: under gradient, denoiser and decoder recompute their activations on the way back instead of keeping
            them, where diffusers supports it.

    Latents go through in micro-batches that shrink when memory runs out.

    Raises:
        ValueError: if the pipeline cannot be driven, saying why.
    """

    def __init__(self, pipe: DiffusionPipeline, call: Mapping[str, Any], seed: int | None = None) -> None:
        require_drivable(pipe)
        for argument, reason in _REFUSED.items():
            if call.get(argument) is not None:
                raise ValueError(f"{argument} cannot be guided: {reason}; call the pipeline with sampler=None")
        self.pipe = pipe
        self.checkpointing = False
        self._call, self._seed = dict(call), seed
        self._fitting, self._decoding = MicroBatch(sys.maxsize), MicroBatch(sys.maxsize)
        self._driver = Driver(pipe, Repeats(pipe, call, rows_of(pipe, call)), seed)
        self.prompts = self._driver.call.prompts
        self._others: list[PipelineDenoiser] = []
        self._levels: Levels | None = None
        self._wide: Any = None  # the decoder in float32
        if stop_asked_of(pipe):  # of a call before this one
            pipe._interrupt = False

    # --- Denoiser ---

    @property
    def evaluations(self) -> float:
        """Forward passes of the denoiser so far, by latents."""
        return self._driver.loops.evaluations

    @property
    def steps(self) -> int:
        """Number of levels that the call visits; with some schedulers more than `num_inference_steps`."""
        return self._driver.steps

    @property
    def schedule(self) -> NoiseSchedule:
        """The levels that the pipeline's scheduler gives for this call.

        Raises:
            ValueError: if the scheduler takes no single steps from level to level, saying what to do.
        """
        return self.levels.schedule

    @property
    def evaluations_per_row(self) -> float:
        """Denoiser evaluations per latent and level, as counted on the last one; before the first, as the call asks."""
        self.initial()
        return self._driver.per_row

    def initial(self, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """The latents [B, ...] the stock call starts from: its own, or those it prepares with other generators [B]."""
        own = self._driver.started().latents
        return own if generators is None else self._driver.initial(generators)

    def predict(self, x: Tensor, level: int, rows: Tensor | None = None) -> Prediction:
        """Denoise x [R, ...] at a level; see `core.contracts.Denoiser`.

        What is free: asking again about the tensor that was asked about last (the object itself, unchanged, without a
        graph).  What costs a denoiser evaluation and no more: latents one level on, for the same rows.  All else, also a
        clone of known latents, restarts the stock call at the level: its prompts are not encoded again, but input images
        are.

        Raises:
            ValueError: at the clean level, if latents and rows are not as many, and if the pipeline makes something else of
                the denoiser's answer than its scheduler's noise levels say.
        """
        levels = self.levels
        levels.schedule.coefficients(level)
        if level == self.steps:
            raise ValueError(f"level {level} is clean; there is nothing to predict")
        wanted = self._wanted(rows)
        if len(wanted) != len(x):
            raise ValueError(f"{len(x)} latents were given for {len(wanted)} rows; they must be as many")
        with self._under_gradient():
            steps = self._fitting(lambda piece: self._driver.step_at(_part(x, piece), level, wanted[piece]), len(x))
        levels = self._compared(steps[0], level)
        read = [levels.read(s.sample, s.model_output, level) for s in steps]
        return replace(Prediction.joined(read), x=x) if len(read) > 1 else read[0]

    def follow(
        self,
        rows: Tensor | None = None,
        generators: Sequence[torch.Generator] | None = None,
        start: Tensor | None = None,
    ) -> Iterator[tuple[Prediction | None, Tensor]]:
        """Run the call with the scheduler's own steps; see `core.contracts.Denoiser`.

        Without generators and start this is the stock call, bit for bit.
        """
        self._driver.started()
        wanted, readable = self._wanted(rows), refusal(self.pipe.scheduler) is None
        if start is not None and len(start) != len(wanted):
            raise ValueError(f"{len(start)} starting latents were given for {len(wanted)} rows; they must be as many")
        for level, (step, following) in enumerate(self._driver.follow(wanted, generators, start)):
            yield self.levels.read(step.sample, step.model_output, level) if readable else None, following

    def decode(self, x0: Tensor, rows: Tensor | None = None) -> Tensor:
        """Clean latents [R, ...] to images [R, 3, H, W] in [0, 1] (videos [R, F, 3, H, W]), differentiable.

        It is the pipeline's own decoder, and inpainting pastes the known region of each row.  Rewards judge images before
        safety checkers and watermarks, which are for those handed out.  On the first use of a pipeline one latent is decoded
        twice more, to see what its tensors are.

        Raises:
            UsageError: if its output is no image, video or sound; under gradient, if it gives no tensors.
        """
        wanted, known = self._wanted(rows), self._driver.known
        if len(wanted) != len(x0):
            raise ValueError(f"{len(x0)} latents were given for {len(wanted)} rows; they must be as many")
        plain = self._plain_decoding()
        outputs = partial(self._driver.outputs, stand_ins=plain)
        x0 = x0.float() if "vae" in plain else x0
        if known.decoding is None and len(x0):
            with torch.no_grad():
                first = x0[:1].detach()
                known.decoding = decoding_of(
                    lambda kind: outputs(first, kind, wanted[:1])[0][0], type(self.pipe).__name__
                )

        def decoded(piece: slice) -> Tensor:
            return images_of(
                lambda kind: outputs(x0[piece], kind, wanted[piece]), known.decoding, x0.requires_grad, self.pipe
            )

        self._decoding.size = min(self._decoding.size, max(1, _DECODED_AT_ONCE // x0[0].numel()))
        with self._under_gradient():
            return torch.cat(self._decoding(decoded, len(x0))).float()

    def _wanted(self, rows: Tensor | None) -> tuple[int, ...]:
        return self._driver.base if rows is None else tuple(rows.tolist())

    def _compared(self, step: Step, level: int) -> Levels:
        """How model outputs are read, once that was compared with the scheduler's own step from one level."""
        levels, known = self.levels, self._driver.known
        if known.sign is not None or step.stepper is None or level >= self.steps - 1:
            return levels
        with torch.no_grad():
            x, output = step.sample.detach(), step.model_output.detach()
            for tried in (levels, levels.negated()):
                found = tried.difference(step.stepper, x, output, level)
                if found is None:
                    known.sign = tried.reading.sign
                    self._levels = tried
                    return tried
            found = levels.difference(step.stepper, x, output, level)
        raise ValueError(
            f"{type(self.pipe).__name__} cannot be guided from level to level: of the denoiser's answer its "
            f"{type(self.pipe.scheduler).__name__} makes something else than its noise levels say ({found}); use 'none', "
            "'best-of-n' or 'noise-search' with the transition 'scheduler'"
        )

    # --- what pipelines need besides ---

    def finish(self, x0: Tensor) -> Any:
        """The stock output for final latents [B, ...], in the output type the call asked for."""
        ended = self._driver.ended(x0)
        if ended is not None:
            return ended
        kind = str(self._call.get("output_type") or default_output_type(self.pipe))
        return self._driver.outputs(x0, kind, self._driver.base, told=True)[0][0]

    @property
    def token_grid(self) -> tuple[int, int] | None:
        """Rows and columns of packed latents [B, S, C]; None where latents are planes."""
        start = self._driver.started()
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
        if self._levels is None:
            start = self._driver.started()
            read = read_levels(self.pipe.scheduler, self._driver.scheduler_state, start.steps, start.idle)
            self._levels = read.negated() if self._driver.known.sign == -read.reading.sign else read
        return self._levels

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

        Raises:
            NotReplayable: if there is no way to ask for these rows in one call.
        """
        return self._driver.rehearse(x, rows, stand_ins)

    def answer_at_random(self) -> None:
        """Let random numbers stand in for the denoiser's answers from now on, at no cost."""
        self._driver.answer_at_random()

    @property
    def batches(self) -> bool:
        """Whether other rows than the call's own can be asked for in one call."""
        return self._driver.batches

    def over(self, pipe: DiffusionPipeline | None) -> "PipelineDenoiser":
        """The denoiser of another pipeline, or of this one, for the same call; closed with this one."""
        stop_asked = stop_asked_of(self.pipe)
        other = PipelineDenoiser(pipe or self.pipe, unwatched(self._call, told=True), self._seed)
        if stop_asked:
            self.pipe._interrupt = True
        self._others.append(other)
        return other

    def aside(self) -> AbstractContextManager[None]:
        """Evaluations that are no steps of the run, such as a value's lookahead; a callback is not told of them."""
        return self._driver.loops.around.callbacks.aside()

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
                stand_ins["vae"] = self._wide.to(self._driver.started().latents.device)
        return stand_ins

    def close(self) -> None:
        """Abandon the paused call, if there is one."""
        while self._others:
            self._others.pop().close()
        self._driver.close()


def _part(x: Tensor, piece: slice) -> Tensor:
    """Some rows of x; x itself where these are all, by which the loop knows the latents it handed out."""
    return x if piece == slice(0, len(x)) else x[piece]

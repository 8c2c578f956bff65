"""`PipelineDenoiser`: any supported diffusers pipeline as a `core.denoiser.Denoiser`."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.schedule import NoiseSchedule, Prediction, to_prediction
from rsm_guidance.engine.loop import Done, Pause, Start, Step, StockLoop

_CONDITIONING = ("prompt", "negative_prompt", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
_DECODE_BATCH = 32


class PipelineDenoiser:
    """A stock pipeline call, resumed level by level, or restarted where the caller jumps or changes the batch.

    Prompts are encoded once.  Outside of its methods the pipeline is exactly as it was.

    Args:
        pipe: a diffusers pipeline whose class the engine can drive.
        call: keyword arguments of the pipeline's stock `__call__`.
        ledger: where denoiser evaluations and decodes are booked; a fresh one by default.

    Raises:
        ValueError: if the pipeline cannot be driven, saying why.
    """

    def __init__(self, pipe: DiffusionPipeline, call: Mapping[str, Any], ledger: Ledger | None = None) -> None:
        require_drivable(pipe)
        self.pipe = pipe
        self.ledger = ledger or Ledger()
        self.prompts = prompts_of(call)
        self._call = dict(call)
        self._embeds: tuple[Tensor | None, ...] | None = None
        self._schedule: NoiseSchedule | None = None
        self._initial: Tensor | None = None
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
    def schedule(self) -> NoiseSchedule:
        """The levels that the pipeline's scheduler gives for this call."""
        self.initial()
        assert self._schedule is not None
        return self._schedule

    @property
    def evaluations_per_row(self) -> float:
        """Denoiser evaluations per latent and level, as counted on the last one; before the first, as the call asks."""
        self.initial()
        return self._per_row

    def initial(self) -> Tensor:
        """The latents the stock call starts from (its own generator or `latents` argument)."""
        if self._initial is None:
            self._initial = self._restart(self._call, self._base, skip=0)
        return self._initial

    def predict(self, x: Tensor, level: int, rows: Tensor | None = None) -> Prediction:
        """Denoise x at a level; see `core.denoiser.Denoiser`."""
        schedule = self.schedule
        alpha, sigma = schedule.coefficients(level)
        if level == schedule.steps:
            raise ValueError(f"level {level} is clean; there is nothing to predict")
        wanted = self._base if rows is None else tuple(rows.tolist())
        if len(wanted) != len(x):
            raise ValueError(f"{len(x)} latents were given for {len(wanted)} rows; they must be as many")
        step = self._step_at(x, level, wanted)
        return to_prediction(step.sample, step.model_output, alpha, sigma, "flow")

    def decode(self, x0: Tensor) -> Tensor:
        """Clean latents [R, ...] to images [R, 3, H, W] in [0, 1] by the pipeline's own decoder; differentiable."""
        self.ledger.decodes += len(x0)
        images = [self._zero_step(chunk, "pt") for chunk in x0.split(_DECODE_BATCH)]
        return torch.cat(images).float()

    # --- what pipelines need besides ---

    def finish(self, x0: Tensor) -> Any:
        """The stock output for final latents [B, ...], in the output type the call asked for."""
        if self._call.get("output_type") != "latent":
            self.ledger.decodes += len(x0)
        if (
            self._loop is not None
            and self._loop.alive
            and self._rows == self._base
            and self._level == self.schedule.steps - 1
        ):
            pause = self._loop.resume(x0)
            assert isinstance(pause, Done)
            return pause.output
        return self._zero_step(x0, self._call.get("output_type", "pil"), whole=True)

    def close(self) -> None:
        """Abandon the paused call, if there is one."""
        if self._loop is not None:
            self._loop.close()
            self._loop = None

    # --- driving the loop ---

    def _step_at(self, x: Tensor, level: int, rows: tuple[int, ...]) -> Step:
        going_on = self._loop is not None and self._loop.alive and rows == self._rows
        if going_on and level == self._level and x is self._sample and self._step is None:
            return self._advance(None)
        if going_on and level == self._level and x is self._sample and self._still_holds(x):
            assert self._step is not None
            return self._step
        if going_on and level == self._level + 1 and self._step is not None:
            return self._advance(x)
        call = self._without_conditioning() | {"latents": x, "prompt": [self.prompts[r] for r in rows]}
        self._restart(call, rows, skip=level)
        self._sample = x
        return self._advance(None)

    def _restart(self, call: dict[str, Any], rows: tuple[int, ...], skip: int) -> Tensor:
        """Begin a stock call and stop before its first step; returns its first latents."""
        self.close()
        self._loop = StockLoop(self.pipe, call, skip, partial(self._encode_prompt, rows))
        self._rows, self._level, self._step = rows, skip, None
        pause = self._resume(None)
        if not isinstance(pause, Start):
            raise ValueError(f"{type(self.pipe).__name__} opened no progress bar before its loop; it cannot be driven")
        if self._schedule is None:
            self._schedule = _schedule_of(self._loop.scheduler_state())
        self._per_row = self._per_row or (2.0 if pause.guided else 1.0)
        self._sample = pause.latents
        return pause.latents

    def _advance(self, x: Tensor | None) -> Step:
        """Run to the next `scheduler.step`: the pending one (x is None), or the one after handing over x."""
        assert self._loop is not None and self._sample is not None
        before = self._loop.evaluations
        pause = self._resume(x)
        if not isinstance(pause, Step):
            self._loop = None
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
        """Whether what was computed for x is what would be computed now: x unchanged, and a graph where one is due."""
        assert self._step is not None
        graph_due = torch.is_grad_enabled() and x.requires_grad
        return x._version == self._version and graph_due == self._step.model_output.requires_grad

    def _resume(self, x: Tensor | None) -> Pause:
        assert self._loop is not None
        before = self._loop.evaluations
        try:
            return self._loop.resume(x)
        finally:
            self.ledger.denoiser_evaluations += self._loop.evaluations - before

    def _zero_step(self, x0: Tensor, output_type: str, whole: bool = False) -> Any:
        """Decode by running the stock call with every step skipped."""
        call = self._without_conditioning() | {
            "latents": x0,
            "prompt": [""] * len(x0),
            "output_type": output_type,
            "callback_on_step_end": None,
        }
        rows = self._base if whole else (0,) * len(x0)
        loop = StockLoop(self.pipe, call, self.schedule.steps, partial(self._encode_prompt, rows))
        pause = loop.resume()
        while not isinstance(pause, Done):
            pause = loop.resume()
        return pause.output if whole else pause.output[0]

    def _without_conditioning(self) -> dict[str, Any]:
        kept = {k: v for k, v in self._call.items() if not k.startswith(_CONDITIONING)}
        return kept | {"generator": None, "num_images_per_prompt": 1}

    def _encode_prompt(self, rows: tuple[int, ...], stock: Any, *args: Any, **kwargs: Any) -> Sequence[Tensor | None]:
        """Stands in for the pipeline's `encode_prompt`: the first call is stock, later ones pick its rows."""
        if self._embeds is None:
            self._embeds = tuple(stock(*args, **kwargs))
            return self._embeds
        index = torch.tensor(rows)
        return tuple(None if e is None else e[index.to(e.device)] for e in self._embeds)


def prompts_of(call: Mapping[str, Any]) -> list[str]:
    """The prompt of every image a stock call asks for; "" where it passes embeddings instead of text."""
    prompt, copies = call.get("prompt"), call.get("num_images_per_prompt") or 1
    if isinstance(prompt, str):
        prompts = [prompt]
    elif prompt is not None:
        prompts = list(prompt)
    else:
        embeds = call.get("prompt_embeds")
        prompts = [""] * (0 if embeds is None else len(embeds))
    return [p for p in prompts for _ in range(copies)]


def require_drivable(pipe: DiffusionPipeline) -> None:
    """Raise a ValueError that says why the engine cannot drive this pipeline, if so."""
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"a diffusers pipeline is needed, not {type(pipe).__name__}")
    for method in ("encode_prompt", "prepare_latents"):
        if not hasattr(pipe, method):
            raise ValueError(f"{type(pipe).__name__} has no {method}, where the engine pauses the stock call")
    scheduler = pipe.scheduler
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            f"the guided samplers cannot read the predictions of {type(scheduler).__name__} yet; set "
            "pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config) on a flow model, "
            "or call the pipeline with sampler=None"
        )


def _schedule_of(state: dict[str, Any]) -> NoiseSchedule:
    sigma = state["sigmas"].double().cpu()
    timesteps = torch.cat([state["timesteps"].double().cpu(), torch.zeros(1, dtype=torch.float64)])
    return NoiseSchedule(1 - sigma, sigma, timesteps)


@torch.no_grad()
def encode_images(pipe: DiffusionPipeline, images: Tensor) -> Tensor:
    """Images [B, 3, H, W] in [0, 1] to the latents the denoiser works on (posterior mean, shifted and scaled)."""
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be [B, 3, H, W]; got {list(images.shape)}")
    vae = pipe.vae
    latents = vae.encode((2 * images - 1).to(vae.device, vae.dtype)).latent_dist.mean
    shift = getattr(vae.config, "shift_factor", None) or 0.0
    return (latents - shift) * vae.config.scaling_factor

"""What a loaded pipeline can do here, tried on a small call of it without evaluating its denoiser.

Random numbers stand in for the denoiser's answers; the pipeline's own code runs around them, as it does in a guided call, with the
same checks.  It costs what a call prepares (texts, pictures) and a few decodes at the smallest size that the pipeline takes.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from PIL import Image

from rsm_guidance.core.schedule import Prediction
from rsm_guidance.engine.denoiser import PipelineDenoiser
from rsm_guidance.engine.families import require_drivable, stock_call_of, traits_of
from rsm_guidance.engine.schedulers import refusal

_SIDES = (64, 128, 256, 512)
_PICTURES = ("image", "control_image", "mask_image", "init_image")


@dataclass(frozen=True)
class Findings:
    """What was found out.  Each is None where all is well, else the reason why not.

    Attributes:
        tried: why nothing could be tried.
        runs: whole runs with the scheduler's own steps (none, best-of-n, noise-search).
        levels: single steps from level to level (all other samplers).
        images: decoding to images that a reward sees.
        gradients: gradients through the decoder.
        notes: what is slower or otherwise worth knowing.
    """

    tried: str | None = None
    runs: str | None = None
    levels: str | None = None
    images: str | None = None
    gradients: str | None = None
    notes: tuple[str, ...] = ()


def probe(pipe: DiffusionPipeline) -> Findings:
    """Try a loaded pipeline.  It is left as it was, and torch's global random numbers are."""
    try:
        require_drivable(pipe)
    except ValueError as error:
        return Findings(runs=_first_line(error), levels=_first_line(error))
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), _quiet():
        warnings.simplefilter("ignore")
        call, failed = _example(pipe)
        if call is not None:
            return _tried(pipe, call)
        reason = _first_line(failed)
        return Findings(runs=reason, levels=reason) if "cannot be guided" in str(failed) else Findings(tried=reason)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep diffusers from logging what it thinks of the calls that are tried."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _tried(pipe: DiffusionPipeline, call: dict[str, Any]) -> Findings:
    with torch.no_grad(), closing(_denoiser(pipe, call)) as denoiser:
        x = denoiser.initial()
        runs = _reason(lambda: list(denoiser.follow()))
        levels = refusal(pipe.scheduler) or _reason(lambda: _steps(denoiser))
        images = _reason(lambda: denoiser.decode(x))
        gradients = images or _reason(lambda: denoiser.decode(x.detach().clone().requires_grad_()))
        notes = []
        if levels is None and not denoiser.batches:
            notes.append(
                "candidates go through its denoiser one after the other: it cannot be asked for them in one call"
            )
    together = _together(pipe, call)
    return Findings(None, runs, levels, images, gradients, (*notes, *together))


def _steps(denoiser: PipelineDenoiser) -> None:
    """Go two levels, come back, and ask for a row twice."""
    prediction: Prediction = denoiser.predict(denoiser.initial(), 0)
    if denoiser.steps > 1:
        denoiser.predict(prediction.x.clone(), 1)
        rows = torch.zeros(2, dtype=torch.int64)
        denoiser.predict(prediction.x[rows], 1, rows)


def _together(pipe: DiffusionPipeline, call: dict[str, Any]) -> list[str]:
    """What is said of a batch of two prompts."""
    if not isinstance(call.get("prompt"), str):
        return []
    two = call | {"prompt": [call["prompt"], "a longer text about a red dog on a tree"]}
    two["generator"] = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    with warnings.catch_warnings(record=True) as told, torch.no_grad():
        warnings.simplefilter("always")
        try:
            with closing(PipelineDenoiser(pipe, two)) as denoiser:
                denoiser.initial()
        except Exception as error:  # of any stock call
            return [f"several prompts in one call: {_first_line(error)}"]
    return [str(w.message) for w in told if "batch" in str(w.message) and type(pipe).__name__ in str(w.message)]


def _denoiser(pipe: DiffusionPipeline, call: dict[str, Any]) -> PipelineDenoiser:
    """A denoiser that takes a step, with random numbers for its answers or, if these do not do, with its own.

    Raises:
        Exception: what the call raises.
    """
    for blank in (True, False):
        denoiser = PipelineDenoiser(pipe, call, seed=0)
        try:
            if blank:
                denoiser.answer_at_random()
            next(denoiser.follow())
            return denoiser
        except Exception:
            denoiser.close()
            if not blank:
                raise
    raise AssertionError("the last one is returned or raises")


def _reason(trial: Callable[[], Any]) -> str | None:
    try:
        trial()
    except Exception as error:  # of any stock call
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    text = str(error).partition("\n")[0].rpartition("cannot be guided: ")[2].removesuffix("; call it with sampler=None")
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


# --- a small call ---


def _example(pipe: DiffusionPipeline) -> tuple[dict[str, Any] | None, Exception]:
    """The smallest call that a pipeline takes; None and what the last one raised if none was found."""
    raised: list[Exception] = []
    for side in _SIDES:
        for call in _examples(pipe, side):
            try:
                with torch.no_grad():
                    _denoiser(pipe, call).close()
                return call, Exception()
            except Exception as error:  # of any stock call
                raised.append(error)
        if len({str(error) for error in raised}) < len(raised):  # no matter of the size
            break
    return None, raised[-1]


def _examples(pipe: DiffusionPipeline, side: int) -> Iterator[dict[str, Any]]:
    """Calls for images of a size, also with pictures where a class may want them."""
    parameters = inspect.signature(stock_call_of(type(pipe))).parameters
    pictures = [n for n in _PICTURES if n in parameters]
    required = any(parameters[n].default is inspect.Parameter.empty for n in pictures)
    wanted = [True] if required else [False, True] if pictures else [False]
    frames = [n for n in ("num_frames", "video_length") if n in parameters]
    for shown, steps in product(wanted, (4, 2)):
        settings: dict[str, Any] = {
            "prompt": "a cat",
            "num_inference_steps": steps,
            "strength": 0.75,
            "height": side,
            "width": side,
            "max_area": side * side,
            "_auto_resize": False,
            "use_resolution_binning": False,
            "clean_caption": False,
            "complex_human_instruction": None,
            "generator": [torch.Generator().manual_seed(0)],
            **dict.fromkeys(frames, 9),
            **({"negative_prompt": " "} if traits_of(pipe).true_cfg else {}),
        }
        if shown:
            settings |= {n: _picture(side, mask="mask" in n) for n in pictures}
        yield {n: v for n, v in settings.items() if n in parameters}


def _picture(side: int, mask: bool) -> Image.Image:
    y, x = np.mgrid[0:side, 0:side] * 255 // side
    return Image.fromarray((255 * (x > 127) if mask else np.stack([x, y, 255 - x], -1)).astype(np.uint8))

"""The few things in which pipeline classes differ for the engine, each with its reason."""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

_DENOISERS = ("transformer", "transformer_2", "unconditional_transformer", "unet")
_OTHER_DENOISERS = ("prior", "decoder")  # of pipelines that have none of those
_COPIES = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


@dataclass(frozen=True)
class Traits:
    """How the engine has to treat a pipeline class.

    Attributes:
        parameters: names of what its call takes.
        interrupts: its loop skips a step when `pipe.interrupt` is set; others are skipped with a blank denoiser.
        true_cfg: its `guidance_scale` is an input of the denoiser; classifier-free guidance is `true_cfg_scale`.
        negatives: it takes negative prompts.
        copies: name of the argument for several samples per prompt, if any.
    """

    parameters: frozenset[str]
    interrupts: bool
    true_cfg: bool
    negatives: bool
    copies: str | None


def stock_call_of(cls: type[DiffusionPipeline]) -> Callable[..., Any]:
    """The `__call__` of the stock class, also for a reward-guided subclass."""
    return getattr(cls, "stock_call", None) or cls.__call__


def traits_of(pipe: DiffusionPipeline) -> Traits:
    """The traits of a pipeline's class, read from its signature and its source."""
    return _traits(type(pipe))  # type: ignore[arg-type]


@functools.cache
def _traits(cls: type[DiffusionPipeline]) -> Traits:
    call = stock_call_of(cls)
    parameters = inspect.signature(call).parameters
    return Traits(
        parameters=frozenset(parameters),
        interrupts="self.interrupt" in inspect.getsource(call),
        true_cfg="true_cfg_scale" in parameters,
        negatives="negative_prompt" in parameters,
        copies=next((n for n in _COPIES if n in parameters), None),
    )


@functools.cache
def why_not(cls: type[DiffusionPipeline]) -> str | None:
    """Why the engine cannot drive a pipeline class, as far as its source tells; None if nothing speaks against it.

    What only shows when it runs is tried then, and by `engine.probe`.
    """
    reason = _no_loop(cls)
    if reason is not None:
        return reason
    bars, loops = _nesting(ast.parse(textwrap.dedent(inspect.getsource(stock_call_of(cls)))))
    if bars > 1:
        return "its denoising loop lies within another one with a progress bar, so that there is no single run to guide"
    if loops > 1:
        return "it denoises in pieces: scheduler.step is called several times per level"
    return None


def _no_loop(cls: type[DiffusionPipeline]) -> str | None:
    """Why a class has no denoising loop that the engine can pause; None if it has one."""
    source = inspect.getsource(stock_call_of(cls))
    if "scheduler.step(" not in source:
        return "its __call__ has no denoising loop with scheduler.step"
    if not hasattr(cls, "prepare_latents"):
        return "it has no prepare_latents, where the engine sets the latents of a jump"
    if "progress_bar" not in source:
        return "it opens no progress bar before its denoising loop, where the engine reads what the call has prepared"
    return None


def _nesting(node: ast.AST, bars: int = 0, loops: int = 0) -> tuple[int, int]:
    """Around `scheduler.step`, at most: progress bars, and loops inside of the innermost of them."""
    deepest = (0, 0)
    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("scheduler.step"):
        deepest = (bars, loops)
    heads = [ast.unparse(item.context_expr) for item in node.items] if isinstance(node, ast.With) else []
    if isinstance(node, ast.For | ast.While):
        heads, loops = [ast.unparse(node.iter if isinstance(node, ast.For) else node.test)], loops + 1
    if any("progress_bar" in head for head in heads):
        bars, loops = bars + 1, int(isinstance(node, ast.For))
    return max([deepest, *(_nesting(child, bars, loops) for child in ast.iter_child_nodes(node))])


def uses_guidance(pipe: DiffusionPipeline, call: dict[str, Any]) -> bool:
    """Whether a call evaluates the denoiser twice per level for classifier-free guidance, before it has run."""
    parameters = inspect.signature(stock_call_of(type(pipe))).parameters

    def argument(name: str) -> Any:
        return call.get(name, parameters[name].default if name in parameters else None)

    if traits_of(pipe).true_cfg:
        negative = argument("negative_prompt") is not None or argument("negative_prompt_embeds") is not None
        return negative and (argument("true_cfg_scale") or 0) > 1
    if hasattr(type(pipe), "do_classifier_free_guidance"):
        return bool(pipe.do_classifier_free_guidance)
    # Without negative prompts the scale is an input of the denoiser.
    return traits_of(pipe).negatives and (argument("guidance_scale") or 0) > 1


def default_output_type(pipe: DiffusionPipeline) -> str:
    """The output type of a stock call that names none."""
    parameter = inspect.signature(stock_call_of(type(pipe))).parameters.get("output_type")
    return "pil" if parameter is None or parameter.default is parameter.empty else str(parameter.default)


def denoisers_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The modules that denoise, by their names in the pipeline."""
    for names in (_DENOISERS, _OTHER_DENOISERS):
        found = {n: m for n in names if isinstance(m := getattr(pipe, n, None), nn.Module)}
        if found:
            return found
    return {}


def require_drivable(pipe: DiffusionPipeline) -> None:
    """Raise a ValueError that says why the engine cannot drive this pipeline, if its class or its components tell."""
    require_pausable(pipe)
    reason = why_not(type(pipe))  # type: ignore[arg-type]
    if reason is not None:
        raise ValueError(f"{type(pipe).__name__} cannot be guided: {reason}; call it with sampler=None")


def require_pausable(pipe: DiffusionPipeline) -> None:
    """Raise a ValueError that says so, if a pipeline has nothing at which the engine could pause it."""
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"a diffusers pipeline is needed, not {type(pipe).__name__}")
    reason = _no_loop(type(pipe))
    if reason is not None:
        raise ValueError(f"{type(pipe).__name__} cannot be guided: {reason}; call it with sampler=None")
    if not denoisers_of(pipe):
        raise ValueError(
            f"{type(pipe).__name__} has no denoiser under a name that the engine knows; it cannot be guided"
        )
    if not hasattr(pipe.scheduler, "step"):
        raise ValueError(f"{type(pipe).__name__} has no scheduler with a step, where the engine pauses the stock call")


def copies_of(call: Mapping[str, Any]) -> int:
    """How many samples of each prompt a call asks for."""
    return next((int(call[n]) for n in _COPIES if call.get(n)), 1)


def prompts_of(call: Mapping[str, Any]) -> list[str]:
    """The prompt of every image a stock call asks for; "" where it passes embeddings instead of text."""
    prompt = call.get("prompt")
    if isinstance(prompt, str):
        prompts = [prompt]
    elif prompt is not None:
        prompts = list(prompt)
    else:
        embeds = call.get("prompt_embeds")
        prompts = [""] * (0 if embeds is None else len(embeds))
    return [p for p in prompts for _ in range(copies_of(call))]


def pick_rows(value: Any, rows: tuple[int, ...], count: int) -> Any:
    """The entries of a conditioning (tensor, list or None) that belong to some rows, out of those of `count` images.

    A conditioning that was made once per prompt serves all the images of that prompt.  Position ids [L, 3] (Flux) have
    no batch, features of several layers [L, B, ...] (HiDream) have it second, or are a list of tensors [B, ...].  These are
    guesses; whether they are right is seen from what the denoiser is given (`engine.rows`).
    """
    if isinstance(value, tuple):
        return tuple(pick_rows(v, rows, count) for v in value)
    if isinstance(value, Tensor):
        axis = 1 if value.ndim == 4 else 0
        size = value.shape[axis]
        if not size or count % size or (value.ndim == 2 and value.shape[1] == 3):
            return value
        return value.index_select(axis, torch.tensor([r * size // count for r in rows], device=value.device))
    if not isinstance(value, list) or not value:
        return value
    if len(value) != count and all(isinstance(v, Tensor) and v.ndim > 2 and len(v) == count for v in value):
        return [pick_rows(v, rows, count) for v in value]
    return value if count % len(value) else [value[r * len(value) // count] for r in rows]

"""`reward_guided(Base)`: a diffusers pipeline class that can sample under guidance and is otherwise stock."""

import functools
import inspect
import operator
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput

from rsm_guidance.core.contracts import Reward, ValueSource
from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.ledger import Budget, Ledger
from rsm_guidance.core.random import Purpose, RandomStreams, derive_seed, generator_of
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.engine.driver import rows_of
from rsm_guidance.engine.families import prompts_of, require_drivable, traits_of, why_not
from rsm_guidance.engine.turns import turn_of
from rsm_guidance.rewards import name_of, resolve_reward
from rsm_guidance.samplers import Monitor, Progress, Sampler, SamplerOutput, Task, Watch, parse_sampler, run
from rsm_guidance.values import ESTIMATORS, Tweedie, resolve_value


@dataclass
class GuidedPipelineOutput(BaseOutput):
    """Output of a guided call: what the stock call returns, under its own names (`frames`, `nsfw_content_detected`), and ours.

    Attributes:
        images: the images or videos, in the output type asked for.
        rewards: float per image by the final judge, or None without one.
        ledger: what the call spent.
        trace: JSON-serialisable record of every candidate, score and choice.
        log_normalizer: float per image, an estimate of log E[exp(reward / temperature)], where the sampler gives one.
        log_weights: per image the normalised log-weights of all its finished particles, whose rewards are
            `trace["candidates"]["rewards"]`; None for samplers without weights.  They belong to the particles, not to the
            images: an image drawn by weight has none.
    """

    images: Any
    rewards: list[float] | None
    ledger: Ledger
    trace: dict[str, Any]
    log_normalizer: list[float] | None = None
    log_weights: list[list[float]] | None = None

    @classmethod
    def of(cls, stock: BaseOutput, **ours: Any) -> "GuidedPipelineOutput":
        """The output of a stock call, by its own names, and ours; the first of its entries is also `images`."""
        output = cls(stock.to_tuple()[0], **ours)
        for name, entry in vars(stock).items():  # its keys leave out what is None
            if entry is None:
                setattr(output, name, None)
            else:
                output[name] = entry
        return output


_KINDS: dict[str, Any] = {
    "sampler": Sampler | str | None,
    "reward": Reward | Callable[..., Any] | str | None,
    "value": ValueSource | Callable[..., Any] | str | None,
    "budget": Budget | float | None,
    "reward_prompt": str | list[str] | None,
    "seed": int | None,
    "on_step": Callable[[Progress], None] | None,
    "monitor": Monitor | Reward | Callable[..., Any] | str | None,
    "reward_columns": dict[str, list[Any]] | None,
}
_OURS = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=k) for n, k in _KINDS.items()]
_ARGUMENTS = """

        Reward guidance (rsm-guidance):
            sampler (`Sampler` or `str`, *optional*): how to sample; None is the stock pipeline, unchanged.
            reward (reward, function or `str`, *optional*): what to maximise. A diffusion reward model also scores the noisy
                latents; by name it shares this pipeline's modules.
            value (`DiffusionRewardModel`, `Tweedie`, `Smoothed`, `Lookahead`, function or `str`, *optional*): scores noisy
                latents, where the reward does not. An estimator says how the reward sees the clean image in noisy latents
                (default: `Tweedie`).
            budget (`Budget` or `float`, *optional*): hard cap; a number caps denoiser evaluations per image.
            monitor (`Monitor`, reward or `str`, *optional*): a gold (held-out) reward that sees every finished image; reported
                in the trace, and able to stop a run that over-optimises.
            reward_columns (`dict`, *optional*): what the reward requires besides prompts, a list with one entry per prompt
                for each name.
            reward_prompt (`str` or list, *optional*): what the reward is told instead of the prompt; needed by rewards that
                read the prompt where it is given as embeddings.
            seed (`int`, *optional*): names all random numbers; the same seed gives the same image for a prompt,
                whatever the batch (image-conditioned stock calls without a sampler excepted). Instead of `generator`.
            on_step (`Callable`, *optional*): receives a `Progress` after every level.
"""


@functools.cache
def reward_guided(base: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """The reward-guided subclass of a pipeline class.

    It keeps the stock signature and adds the keyword arguments sampler, reward, value, budget, reward_prompt, seed, on_step,
    monitor and reward_columns.  It also keeps the stock name, by which diffusers finds the classes of other tasks and
    anyone can load what it saves; only its qualified name is ours.
    """
    stock_call = base.__call__
    signature = inspect.signature(stock_call)
    parameters = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    names = [p.name for p in parameters]
    ours = [p for p in _OURS if p.name not in names]  # an argument of the stock call keeps its meaning
    open_ended = len(parameters) < len(signature.parameters)  # some stock calls take further, deprecated arguments

    @functools.wraps(stock_call)
    def __call__(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        given = {p.name: kwargs.pop(p.name, p.default) for p in ours}
        if given.get("sampler") is not None:
            require_drivable(self)
        if len(args) >= len(names):
            raise TypeError(
                f"{type(self).__name__} takes at most {len(names) - 1} positional arguments, {len(args)} given"
            )
        call = dict(zip(names[1:], args, strict=False))
        repeated = call.keys() & kwargs.keys()
        if repeated:
            raise TypeError(f"{type(self).__name__} got several values for {sorted(repeated)[0]!r}")
        call |= kwargs
        unknown = sorted(call.keys() - set(names))
        if unknown and not open_ended:
            raise TypeError(f"{type(self).__name__} got an unexpected argument {unknown[0]!r}")
        with turn_of(self):
            return _call(self, stock_call, call, **given)

    __call__.__signature__ = signature.replace(parameters=[*parameters, *ours])  # type: ignore[attr-defined]
    __call__.__doc__ = (stock_call.__doc__ or "").rstrip() + _ARGUMENTS

    def from_pipe(cls: type[DiffusionPipeline], pipeline: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
        """Share another pipeline's modules, in their own dtype (the stock method casts them to float32)."""
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", pipeline.dtype)
        if isinstance(pipeline, base):  # settings that its class takes and does not write into its configuration
            settings = inspect.signature(base.__init__).parameters.keys() - pipeline.config.keys() - {"self"}
            kwargs = {n: getattr(pipeline, n) for n in settings if hasattr(pipeline, n)} | kwargs
        shared: DiffusionPipeline = super(guided, cls).from_pipe(pipeline, **kwargs)  # type: ignore[misc]
        return shared

    def __reduce_ex__(self: DiffusionPipeline, protocol: Any) -> tuple[Any, ...]:
        return _new, (base,), self.__dict__  # a class made here cannot be found by its name

    guided: type[DiffusionPipeline] = type(
        base.__name__,
        (base,),
        {
            "__call__": __call__,
            "__reduce_ex__": __reduce_ex__,
            "__qualname__": f"RewardGuided{base.__name__}",
            "__doc__": f"`{base.__name__}` that samples under reward guidance when given a `sampler`.",
            "__module__": __name__,
            "from_pipe": classmethod(from_pipe),
            "stock_call": stock_call,
        },
    )
    return guided


def _new(base: type[DiffusionPipeline]) -> DiffusionPipeline:
    cls: Any = reward_guided(base)  # type: ignore[arg-type]
    return cls.__new__(cls)


def _call(
    pipe: DiffusionPipeline,
    stock_call: Callable[..., Any],
    call: dict[str, Any],
    sampler: Sampler | str | None,
    **ours: Any,
) -> Any:
    seed, generator = _integer(ours.pop("seed", None)), call.get("generator")
    if sampler is not None:
        if "prompt" in traits_of(pipe).parameters:
            _check_prompt(call)
    counts = sampler is not None or (seed is not None and why_not(type(pipe)) is None)  # type: ignore[arg-type]
    prompts = rows_of(pipe, call) if counts else prompts_of(call)
    if seed is not None and generator is not None:
        raise UsageError("pass either seed or generator, not both")
    if seed is None and sampler is not None:
        seed = _seed_of(generator)
    streams = RandomStreams.for_prompts(seed or 0, prompts)
    if seed is not None and generator is None:
        each = [streams.generator(row, Purpose.INITIAL, 0) for row in range(len(prompts))]
        call["generator"] = each or generator_of(seed, Purpose.INITIAL)
    if sampler is None:
        given = [name for name, value in ours.items() if value is not None]
        if given:
            raise UsageError(
                f"{given[0]} has no effect without a sampler; pass sampler='none' to score unguided samples"
            )
        return stock_call(pipe, **call)
    chosen = parse_sampler(sampler) if isinstance(sampler, str) else sampler
    drawn = (
        None if generator is not None else derive_seed(streams.seed, "global")
    )  # what stock draws without a generator
    with torch.inference_mode(
        False
    ):  # under it nothing could be differentiated, and no tensor says whether it was changed
        return _guided(pipe, {n: _ordinary(v) for n, v in call.items()}, streams, drawn, chosen, **ours)


def _guided(
    pipe: DiffusionPipeline,
    call: dict[str, Any],
    streams: RandomStreams,
    drawn: int | None,
    sampler: Sampler,
    reward: Any = None,
    value: Any = None,
    budget: Budget | float | None = None,
    on_step: Callable[[Progress], None] | None = None,
    monitor: Any = None,
    reward_columns: dict[str, list[Any]] | None = None,
    reward_prompt: str | list[str] | None = None,
) -> Any:
    as_tuple = call.pop("return_dict", True) is False
    final, source = scoring(reward, value, pipe)
    count = len(streams.names)
    ledger = Ledger(budget if isinstance(budget, Budget) else Budget(evaluations=budget), images=count)
    columns = _columns(reward_columns or {}, count)
    texts = _texts(call, reward_prompt, count, final)
    with torch.no_grad(), closing(PipelineDenoiser(pipe, call, drawn)) as denoiser:
        task = Task(denoiser, streams, ledger, final, source, columns=columns, prompts=texts)
        if monitor is not None:
            watching = monitor if isinstance(monitor, Monitor) else Monitor(resolve_reward(monitor, pipe))
            task.watch = Watch(watching, texts or denoiser.prompts, columns)
        output = _sampled(pipe, sampler, task, on_step)
        stock = denoiser.finish(output.latents)
    if call.get("output_type") != "latent":
        ledger.decodes += count
    ledger.finish()
    output.trace["ledger"] = ledger.to_dict()  # now with the final decode
    if as_tuple:
        return stock.to_tuple()
    ours = {
        "rewards": None if output.rewards is None else output.rewards.tolist(),
        "ledger": output.ledger,
        "trace": output.trace,
        "log_normalizer": None if output.log_normalizer is None else output.log_normalizer.tolist(),
        "log_weights": None if output.particles is None else [p.log_weights.tolist() for p in output.particles],
    }
    return GuidedPipelineOutput.of(stock, **ours)


def scoring(reward: Any, value: Any, pipe: DiffusionPipeline) -> tuple[Reward | None, ValueSource | None]:
    """What scores finished images, and what makes the value of noisy latents.

    A reward with a value of its own scores the latents, finished ones, too, undecoded; any other the image of their posterior
    mean.  Where a value is given, it scores noisy latents, and finished images, too, if there is no reward.

    Raises:
        UsageError: if a reward or value cannot be found, or an estimator has no reward to estimate.
    """
    final = None if reward is None else resolve_reward(reward, pipe)
    source = None if value is None else resolve_value(value, pipe)
    if source is None:
        own: Any = final if hasattr(final, "value") else None
        return (None, own) if own is not None else (final, None if final is None else Tweedie())
    if final is None and isinstance(source, tuple(ESTIMATORS.values())):
        raise UsageError(
            f"{type(source).__name__} estimates the images that a reward is to score; pass a reward as well"
        )
    return final or getattr(source, "reward", None), source


def _texts(call: dict[str, Any], told: str | list[str] | None, count: int, reward: Reward | None) -> list[str]:
    """What the reward is told of every image, where that is not the prompt; else empty."""
    if told is not None:
        return _columns({"reward_prompt": [told] if isinstance(told, str) else told}, count)["reward_prompt"]
    if call.get("prompt") is None and getattr(reward, "reads_prompt", False):
        raise UsageError(
            f"the reward {name_of(reward)} reads the prompt, which is not given as text; pass reward_prompt="
        )
    return []


def _columns(columns: dict[str, list[Any]], count: int) -> dict[str, list[Any]]:
    """Columns with an entry for every image, from those with one for every prompt."""
    repeated = {}
    for name, values in columns.items():
        if not len(values) or count % len(values):
            raise UsageError(
                f"the column {name!r} has {len(values)} entries for {count} images; give one for each prompt"
            )
        repeated[name] = [v for v in values for _ in range(count // len(values))]
    return repeated


def _sampled(
    pipe: DiffusionPipeline, sampler: Sampler, task: Task, on_step: Callable[[Progress], None] | None
) -> SamplerOutput:
    """Run a sampler under the pipeline's progress bar."""
    with pipe.progress_bar(total=task.steps) as bar:

        def progress(event: Progress) -> None:
            if event.level == 1:
                bar.reset()
            bar.update()
            if on_step is not None:
                on_step(event)

        task.progress = progress
        return run(sampler, task)


def _check_prompt(call: dict[str, Any]) -> None:
    prompt = call.get("prompt")
    if prompt is None:
        if any(name.startswith("prompt_embeds") and v is not None for name, v in call.items()):
            return
        raise ValueError("no prompt was given; pass prompt='...'")
    if not isinstance(prompt, str | list | tuple) or len(prompt) == 0 and not isinstance(prompt, str):
        raise ValueError(f"a prompt must be text or a list of texts; got {prompt!r}")
    for p in [prompt] if isinstance(prompt, str) else prompt:
        if not isinstance(p, str):
            raise ValueError(f"a prompt must be text; got {type(p).__name__}")


def _ordinary(argument: Any) -> Any:
    """An argument whose tensors autograd can use, also where they were made under inference mode."""
    if isinstance(argument, torch.Tensor):
        return argument.clone() if argument.is_inference() else argument
    if isinstance(argument, list | tuple) and any(isinstance(a, torch.Tensor) for a in argument):
        return type(argument)(map(_ordinary, argument))
    return argument


def _integer(seed: Any) -> int | None:
    """A seed as a number: integers of Python, numpy and torch name the same stream."""
    if seed is None:
        return None
    try:
        if isinstance(seed, bool | np.bool_) or getattr(seed, "dtype", None) is torch.bool:
            raise TypeError
        return operator.index(seed)
    except TypeError as error:
        raise UsageError(f"a seed is a whole number; got {seed!r}") from error


def _seed_of(generator: torch.Generator | list[torch.Generator] | None) -> int:
    """A seed for our streams where the caller gave none: from their generator, else from torch's global one."""
    if generator is None:
        return int(torch.randint(2**62, ()))
    return (generator[0] if isinstance(generator, list) else generator).initial_seed()

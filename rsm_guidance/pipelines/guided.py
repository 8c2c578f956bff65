"""`reward_guided(Base)`: a diffusers pipeline class that can sample under guidance and is otherwise stock."""

import functools
import inspect
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput
from torch import Tensor

from rsm_guidance.core.contracts import Reward
from rsm_guidance.core.ledger import Budget, Ledger
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.engine.families import prompts_of
from rsm_guidance.samplers import Interrupted, Monitor, Problem, Progress, Sampler, SamplerOutput, Watch, parse_sampler
from rsm_guidance.values import (
    DiffusionRewardModel,
    DRMValue,
    EstimatedValue,
    Estimator,
    Judge,
    Lookahead,
    adapter_on,
    load_judge,
    load_value,
)


@dataclass
class GuidedPipelineOutput(BaseOutput):
    """Output of a guided call.

    Attributes:
        images: the images, in the output type asked for.
        rewards: float per image by the final judge, or None without one.
        ledger: what the call spent.
        trace: JSON-serialisable record of every candidate, score and choice.
    """

    images: Any
    rewards: list[float] | None
    ledger: Ledger
    trace: dict[str, Any]


_OURS = (
    inspect.Parameter("sampler", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Sampler | str | None),
    inspect.Parameter("reward", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Judge | str | None),
    inspect.Parameter("value", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Judge | Estimator | str | None),
    inspect.Parameter("budget", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Budget | float | None),
    inspect.Parameter("seed", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=int | None),
    inspect.Parameter(
        "on_step", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Callable[[Progress], None] | None
    ),
    inspect.Parameter("monitor", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Monitor | Judge | str | None),
)
_ARGUMENTS = """

        Reward guidance (rsm-guidance):
            sampler (`Sampler` or `str`, *optional*): how to sample; None is the stock pipeline, unchanged.
            reward (function, `DiffusionRewardModel` or `str`, *optional*): what to maximise. A diffusion reward model
                also scores the noisy latents.
            value (`DiffusionRewardModel`, `Tweedie`, `Smoothed`, `Lookahead`, function or `str`, *optional*): judge of
                noisy latents, where it is not the reward. An estimator says how the reward, a function, sees the clean
                image in noisy latents (default: `Tweedie`).
            budget (`Budget` or `float`, *optional*): hard cap; a number caps denoiser evaluations per image.
            monitor (`Monitor`, reward or `str`, *optional*): a held-out reward that sees every finished image; reported in
                the trace, and able to stop a run that over-optimises.
            seed (`int`, *optional*): names all random numbers; the same seed gives the same image for a prompt,
                whatever the batch (image-conditioned stock calls without a sampler excepted). Instead of `generator`.
            on_step (`Callable`, *optional*): receives a `Progress` after every level. (Samplers jump between levels, so that
                a stock callback function does not see every step exactly once; this does.)
"""


@functools.cache
def reward_guided(base: type[DiffusionPipeline]) -> type[DiffusionPipeline]:
    """The reward-guided subclass of a pipeline class.

    It keeps the stock signature and adds the keyword arguments sampler, reward, value, budget, monitor, seed and on_step.
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
        return _call(self, stock_call, call, **given)

    __call__.__signature__ = signature.replace(parameters=[*parameters, *ours])  # type: ignore[attr-defined]
    __call__.__doc__ = (stock_call.__doc__ or "").rstrip() + _ARGUMENTS

    def from_pipe(cls: type[DiffusionPipeline], pipeline: DiffusionPipeline, **kwargs: Any) -> DiffusionPipeline:
        """Share another pipeline's modules, in their own dtype (the stock method casts them to float32)."""
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", pipeline.dtype)
        shared: DiffusionPipeline = super(guided, cls).from_pipe(pipeline, **kwargs)  # type: ignore[misc]
        return shared

    def save_pretrained(self: DiffusionPipeline, save_directory: str | Path, **kwargs: Any) -> None:
        """Save under the stock class's name, so that the folder loads everywhere, with or without this package."""
        if kwargs.get("push_to_hub"):
            raise ValueError("save_pretrained corrects the folder after writing it; save first, then upload the folder")
        super(guided, self).save_pretrained(save_directory, **kwargs)
        index = Path(save_directory) / "model_index.json"
        index.write_text(index.read_text().replace(f'"{guided.__name__}"', f'"{base.__name__}"'))

    guided: type[DiffusionPipeline] = type(
        f"RewardGuided{base.__name__}",
        (base,),
        {
            "__call__": __call__,
            "__doc__": f"`{base.__name__}` that samples under reward guidance when given a `sampler`.",
            "__module__": __name__,
            "from_pipe": classmethod(from_pipe),
            "save_pretrained": save_pretrained,
            "stock_call": stock_call,
        },
    )
    return guided


def _call(
    pipe: DiffusionPipeline,
    stock_call: Callable[..., Any],
    call: dict[str, Any],
    sampler: Sampler | str | None,
    reward: Judge | str | None,
    value: Judge | Estimator | str | None,
    budget: Budget | float | None,
    on_step: Callable[[Progress], None] | None,
    monitor: Monitor | Judge | str | None = None,
    seed: int | None = None,
) -> Any:
    if sampler is not None:
        _check_prompt(call)
    prompts, generator = prompts_of(call), call.get("generator")
    if seed is not None and generator is not None:
        raise ValueError("pass either seed or generator, not both")
    if seed is None and sampler is not None:
        seed = _seed_of(generator)
    streams = RandomStreams.for_prompts(seed or 0, prompts)
    if seed is not None and generator is None:
        call["generator"] = [streams.generator(row, "initial", 0) for row in range(len(prompts))]
    if sampler is None:
        given = [
            n
            for n, v in (
                ("reward", reward), ("value", value), ("budget", budget), ("monitor", monitor), ("on_step", on_step)
            )
            if v is not None
        ]  # fmt: skip
        if given:
            raise ValueError(
                f"{given[0]} has no effect without a sampler; pass sampler='none' to score unguided samples"
            )
        return stock_call(pipe, **call)
    sampler = parse_sampler(sampler) if isinstance(sampler, str) else sampler
    judge = None if reward is None else load_judge(reward)
    scorer = None if value is None else load_value(value)
    if isinstance(scorer, Estimator) and judge is None:
        raise ValueError(
            f"{type(scorer).__name__} estimates the images that a reward is to judge; pass a reward as well"
        )
    caps = budget if isinstance(budget, Budget) else Budget(evaluations=budget)
    ledger = Ledger(caps, images=len(prompts))
    with torch.no_grad(), ExitStack() as stack:
        denoiser = stack.enter_context(closing(PipelineDenoiser(pipe, call, ledger)))
        problem = Problem(denoiser, streams, ledger)
        scout = None
        if isinstance(scorer, Lookahead) and (scorer.pipe is not None or scorer.adapter is not None):
            scout = stack.enter_context(closing(_scout(pipe, call, scorer, denoiser)))
        _set_judges(problem, judge, scorer, denoiser, scout)
        if monitor is not None:
            problem.watch = Watch(_monitor(monitor), len(prompts))
        output = _sample(pipe, sampler, problem, on_step)
        images = denoiser.finish(output.latents)
    ledger.finish()
    output.trace["ledger"] = ledger.to_dict()  # now with the final decode
    if call.get("return_dict") is False:
        return images
    rewards = None if output.rewards is None else output.rewards.tolist()
    return GuidedPipelineOutput(images[0], rewards, output.ledger, output.trace)


def _sample(
    pipe: DiffusionPipeline, sampler: Sampler, problem: Problem, on_step: Callable[[Progress], None] | None
) -> SamplerOutput:
    """Run a sampler under the pipeline's progress bar."""
    with pipe.progress_bar(total=problem.denoiser.steps) as bar:

        def progress(event: Progress) -> None:
            if event.level == 1:
                bar.reset()
            bar.update()
            if on_step is not None:
                on_step(event)

        problem.progress = progress
        try:
            return sampler.sample(problem)
        except Interrupted as interrupt:
            if problem.ledger.stopped == "interrupted":
                raise KeyboardInterrupt from interrupt
            raise ValueError(
                f"the deadline of {problem.ledger.budget.seconds} s passed before the first denoising step; allow more time"
            ) from interrupt


def _scout(
    pipe: DiffusionPipeline, call: dict[str, Any], lookahead: Lookahead, denoiser: PipelineDenoiser
) -> PipelineDenoiser:
    """The denoiser that looks ahead, over the same call and levels."""
    scout = PipelineDenoiser(lookahead.pipe or pipe, call, denoiser.ledger)
    with torch.no_grad():
        ours, theirs = denoiser.schedule, scout.schedule
        shapes = [list(d.initial().shape) for d in (denoiser, scout)]
    if ours.steps != theirs.steps or not torch.allclose(ours.sigma, theirs.sigma, atol=1e-4) or shapes[0] != shapes[1]:
        scout.close()
        raise ValueError(
            f"{type(scout.pipe).__name__} cannot look ahead for {type(pipe).__name__}: its latents {shapes[1]} or noise "
            f"levels differ from {shapes[0]}; use a pipeline of the same family, and give it the same scheduler"
        )
    return scout


def _set_judges(
    problem: Problem,
    judge: Judge | None,
    value: Judge | Estimator | None,
    denoiser: PipelineDenoiser,
    scout: PipelineDenoiser | None = None,
) -> None:
    """Who judges what: the reward judges finished images, and noisy latents too unless a value model does."""
    ledger = problem.ledger
    if isinstance(judge, DiffusionRewardModel):
        problem.reward = (
            _charged(judge, ledger) if value is not None else None
        )  # alone it scores the latents, undecoded
    else:
        problem.reward = judge
    scorer = judge if value is None else value
    if isinstance(scorer, DiffusionRewardModel):
        problem.value = DRMValue(scorer, denoiser, ledger, denoiser.token_grid)
    elif isinstance(scorer, Estimator):
        assert problem.reward is not None
        adapter = scorer.adapter if isinstance(scorer, Lookahead) else None
        on = nullcontext if adapter is None else partial(adapter_on, denoiser.pipe, adapter)
        problem.value = EstimatedValue(denoiser, problem.reward, ledger, scorer, problem.streams, scout, on)
    elif scorer is not None:
        problem.value = EstimatedValue(denoiser, scorer, ledger)
        problem.reward = problem.reward or scorer


def _monitor(monitor: Monitor | Judge | str) -> Monitor:
    if isinstance(monitor, Monitor):
        return monitor
    judge = load_judge(monitor)
    return Monitor(judge.score_images if isinstance(judge, DiffusionRewardModel) else judge)


def _charged(judge: DiffusionRewardModel, ledger: Ledger) -> Reward:
    """A diffusion reward model as a judge of finished images, booked at its share."""

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        ledger.charge_value(len(images), judge.depth_share)
        return judge.score_images(images, prompts)

    return score


def _check_prompt(call: dict[str, Any]) -> None:
    prompt = call.get("prompt")
    if prompt is None:
        if any(name.startswith("prompt_embeds") and v is not None for name, v in call.items()):
            raise ValueError("guided sampling needs the prompt as text, to key its random numbers and to score images")
        raise ValueError("no prompt was given; pass prompt='...'")
    if not isinstance(prompt, str | list | tuple) or len(prompt) == 0 and not isinstance(prompt, str):
        raise ValueError(f"a prompt must be text or a list of texts; got {prompt!r}")
    for p in [prompt] if isinstance(prompt, str) else prompt:
        if not isinstance(p, str):
            raise ValueError(f"a prompt must be text; got {type(p).__name__}")
        if not p.strip():
            raise ValueError("the prompt is empty; there is nothing to guide towards")


def _seed_of(generator: torch.Generator | list[torch.Generator] | None) -> int:
    """A seed for our streams where the caller gave none: from their generator, else from torch's global one."""
    if generator is None:
        return int(torch.randint(2**62, ()))
    return (generator[0] if isinstance(generator, list) else generator).initial_seed()

"""Fine-tunes a pipeline by rewards: `rsm-guidance train align`.

Samples are made in `collector`, what they teach is in `rows` and `learner`, how updates go is in `rsm_guidance.training.loop`.
`out` becomes the folder of the LoRA: weights, card, report, plots and sample grids; beside them lie `checkpoint-STEP`, the states
that an interrupted run goes on from.
"""

import json
import time
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler

from rsm_guidance.core.errors import UsageError
from rsm_guidance.core.ledger import peak_memory
from rsm_guidance.core.random import generator_of
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.data.prompts import PromptSet, read_prompt_set
from rsm_guidance.io.files import write_json, write_text
from rsm_guidance.io.names import model_prompts, packaged_model
from rsm_guidance.reward_models import load_backbone
from rsm_guidance.training.alignment.calibration import calibrated_levels
from rsm_guidance.training.alignment.calls import call_of, require_levels, transition_of
from rsm_guidance.training.alignment.card import card_of
from rsm_guidance.training.alignment.collector import Collector, Share
from rsm_guidance.training.alignment.conditions import Conditions
from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.epochs import Epochs
from rsm_guidance.training.alignment.evaluator import Evaluator
from rsm_guidance.training.alignment.given import DataAnchor, GivenGroups, Latents, read_captioned, read_groups
from rsm_guidance.training.alignment.judge import Judge, load_rewards
from rsm_guidance.training.alignment.learner import Learner
from rsm_guidance.training.alignment.lora_file import FILE, KOHYA, load_lora, save_lora
from rsm_guidance.training.alignment.objective import strengths
from rsm_guidance.training.alignment.plots import draw_curves, draw_strengths
from rsm_guidance.training.alignment.policy import ATTENTION, Policy, Role
from rsm_guidance.training.alignment.rows import Gather, alone
from rsm_guidance.training.alignment.run import loop_config, require_run
from rsm_guidance.training.data import process_state
from rsm_guidance.training.loop import Evaluate, Metrics, fit, seeded
from rsm_guidance.training.optim import adamw
from rsm_guidance.training.runs import Journal, flat, push
from rsm_guidance.values import ESTIMATORS

REPORT, CURVES, STRENGTHS, LOG = "report.json", "curves.png", "strengths.png", "log.jsonl"


def train_align(config: AlignConfig) -> dict[str, Any]:
    """Train, keep the best LoRA by the gold reward (or the rewards), and write its card, report and plots.

    Goes on where it was interrupted, unless `config.resume` says otherwise.  Every process calls it.  Returns the report.

    Raises:
        UsageError: for settings, prompts and folders that do not work, where possible before anything is loaded.
    """
    state = process_state()
    resume = require_run(config, state.num_processes)
    prompts, evaluated = read_prompts(config)
    pipe = load_backbone(config.pipeline, state.device, getattr(torch, config.dtype))
    pipe.set_progress_bar_config(disable=True)
    run = build(config, pipe, prompts, evaluated, state)
    begun = time.perf_counter()
    with closing(run.conditions):
        history = optimise(run, prompts, run.evaluator, resume)
        cost = {"training_seconds": time.perf_counter() - begun, "peak_memory_bytes": peak_memory()}
        return _finish(run, history, cost, state)


@dataclass(frozen=True)
class Run:
    """What takes part in a training."""

    config: AlignConfig
    learner: Learner
    conditions: Conditions
    epochs: Epochs
    evaluator: Evaluator


def optimise(run: Run, prompts: PromptSet, evaluate: Evaluate, resume: Path | None = None) -> list[Metrics]:
    """All updates of a run, and the history of `evaluate`; the policy then has the averaged weights."""
    config = run.config
    optimizer = adamw(
        [(run.learner.policy, config.optimizer.lr)], config.optimizer.weight_decay, config.optimizer.betas
    )
    scheduler = get_scheduler("constant_with_warmup", optimizer, num_warmup_steps=config.optimizer.warmup)
    journal = Journal(config.out / LOG)

    def told(step: int, numbers: Metrics) -> None:
        journal(step, {**run.epochs.log, **numbers})

    return fit(
        run.learner, optimizer, scheduler, run.epochs, loop_config(config, prompts), config.out, evaluate, told, resume
    )


def read_prompts(config: AlignConfig) -> tuple[PromptSet, PromptSet]:
    """The prompts that are trained on and those that are evaluated.

    Raises:
        UsageError: if there are none.
    """
    packaged = packaged_model(config.pipeline)
    if config.rollout.data is not None:
        prompts = PromptSet([g.prompt for g in read_groups(config.rollout.data, config.rollout.group)])
    elif config.prompts is not None:
        prompts = read_prompt_set(config.prompts)
    elif packaged is not None and packaged.training_prompts is not None:
        prompts = PromptSet(packaged.training_prompts())
    else:
        raise UsageError(
            f"the pipeline {config.pipeline!r} carries no prompts to train on; give a file of them as prompts"
        )
    count = config.evaluation.count
    if config.evaluation.prompts is not None:
        return prompts, read_prompt_set(config.evaluation.prompts, count)
    if packaged is not None and packaged.prompts is not None:
        return prompts, PromptSet(model_prompts(config.pipeline, count))
    first = PromptSet(prompts.prompts[:count], {name: values[:count] for name, values in prompts.columns.items()})
    return prompts, first


def build(
    config: AlignConfig, pipe: DiffusionPipeline, prompts: PromptSet, evaluated: PromptSet, state: PartialState
) -> Run:
    """Everything that takes part, from a loaded pipeline.

    Raises:
        UsageError: for rewards and pipelines that do not fit the configuration.
    """
    judge, gold, gate = judges_of(config, pipe)
    if config.rollout.data is None:
        judge.check(prompts.prompts, prompts.columns)
    for other in (judge, gold):
        if other is not None:
            other.check(evaluated.prompts, evaluated.columns)
    policy = build_policy(config, pipe)
    rollout, evaluation = config.rollout, config.evaluation
    call = call_of(pipe, config, rollout.steps, rollout.guidance)
    precision = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}[config.precision]
    conditions = Conditions(pipe, call, prompts.prompts[0], precision)
    schedule = conditions.stock.schedule
    require_levels(config, schedule)
    share = Share(state.process_index, state.num_processes)
    several = state.num_processes > 1
    gather: Gather = (lambda thing: gather_object([thing])) if several else alone
    collector = Collector(config, prompts, conditions, judge, gate, transition_of(rollout), share)
    if rollout.calibrate:
        collector = collector.at(calibrated_levels(config, collector, schedule, gather))
    learner = Learner(policy, config, schedule, collector.transition)
    _freeze_unreached(learner, conditions, prompts.prompts[0], config.seed)
    guidance = rollout.guidance if evaluation.guidance is None else evaluation.guidance
    stock = call_of(pipe, config, evaluation.steps, guidance)
    evaluator = Evaluator(
        config, learner, evaluated, stock, judge, gold, conditions, _about(config, stock), gather,
        state.process_index,
    )  # fmt: skip
    guided = None
    if config.trust.reference_guidance is not None:
        stronger = Conditions(
            pipe, call_of(pipe, config, rollout.steps, config.trust.reference_guidance), prompts.prompts[0]
        )
        guided = Collector(config, prompts, stronger, judge, None, collector.transition, share).replay
    latents, anchor = Latents(conditions), None
    if config.trust.data is not None:
        anchor = DataAnchor(config, read_captioned(config.trust.data), latents, schedule, share)
    given = None
    if rollout.data is not None:
        given = GivenGroups(config, read_groups(rollout.data, rollout.group), latents, share)
    epochs = Epochs(
        config, learner, given or collector, evaluator, schedule, guided, anchor, gather, state.process_index
    )
    return Run(config, learner, conditions, epochs, evaluator)


def judges_of(config: AlignConfig, pipe: DiffusionPipeline) -> tuple[Judge, Judge | None, Judge | None]:
    """Judges by the rewards, by the gold reward and by those of `trust.gate`.

    Raises:
        UsageError: for a value of noisy latents beside several rewards.
    """
    value: Any = config.estimator.value
    if value is not None and value not in ESTIMATORS:
        value = load_rewards([value], pipe)[0]
    if value is not None and len(config.rewards) > 1:
        raise UsageError("estimator.value judges noisy latents in place of one reward; name one of rewards")
    judge = Judge(pipe, load_rewards(config.rewards, pipe), config.reward_batch, value)
    gold = None if config.gold is None else Judge(pipe, load_rewards([config.gold], pipe), config.reward_batch)
    gate = load_rewards(config.trust.gate_rewards, pipe)
    return judge, gold, Judge(pipe, gate, config.reward_batch) if gate else None


def build_policy(config: AlignConfig, pipe: DiffusionPipeline) -> Policy:
    """The LoRA, with the older policies that the configuration asks for."""
    kept: list[Role] = ["old"]
    if config.trust.proximal == "ema":
        kept.append("average")
    if config.trust.reset_every is not None or config.trust.reset_at is not None:
        kept.append("reference")
    with seeded(generator_of("weights", config.seed), pipe.device):
        policy = Policy(pipe, config.lora.rank, config.lora.alpha, config.lora.targets or ATTENTION, kept)
    if config.lora.init is not None:
        load_lora(config.lora.init, policy)
    return policy


def _freeze_unreached(learner: Learner, conditions: Conditions, prompt: str, seed: int) -> None:
    """Freeze what the prediction does not depend on, such as a last block's text queries: it would idle in optimiser and averages.

    A LoRA that adds nothing yet has no gradients in half of its parameters, so others stand in for a moment.
    """
    replay, zero = conditions.replay([prompt]), torch.zeros(1, dtype=torch.int64)
    trained, draw = learner.policy.trained, generator_of("probe", seed)
    held = {name: p.data for name, p in trained.items()}
    for parameter in trained.values():
        parameter.data = 0.01 * torch.randn(parameter.shape, generator=draw).to(parameter)
    prediction = replay.denoise(conditions.stock.initial(), zero, zero)
    loss = learner.direction(prediction).square().sum()
    gradients = torch.autograd.grad(loss, list(trained.values()), allow_unused=True)
    for (name, parameter), gradient in zip(trained.items(), gradients, strict=True):
        parameter.data = held[name]
        parameter.requires_grad_(gradient is not None and bool(gradient.any()))


def _about(config: AlignConfig, call: dict[str, Any]) -> dict[str, str]:
    """What a LoRA's metadata tell of its making."""
    return {
        "rsm_guidance.paper": config.method.paper,
        "rsm_guidance.rewards": json.dumps(list(config.rewards)),
        "rsm_guidance.base": config.pipeline,
        "rsm_guidance.seed": str(config.seed),
        "rsm_guidance.call": json.dumps(call),
    }


def _finish(run: Run, history: list[Metrics], cost: dict[str, Any], state: PartialState) -> dict[str, Any]:
    """Measure the kept LoRA, and write what tells of it."""
    config, evaluator, policy = run.config, run.evaluator, run.learner.policy
    state.wait_for_everyone()
    load_lora(config.out, policy)
    final = evaluator.measure(config.out / "samples" / "best.png") | evaluator.drift()
    h = strengths(config, run.epochs.schedule, run.learner.transition)
    report: dict[str, Any] = {
        "config": flat(asdict(config)),
        "part": policy.part,
        "call": evaluator.call,
        "history": history,
        "base": history[0],
        "best": final,
        "strengths": {"sigma": _sigmas(run.epochs.schedule), "h": [None if x == float("inf") else x for x in h]},
        "transition": str(run.learner.transition),
        "trained": {"tensors": len(policy.trained), "parameters": sum(p.numel() for p in policy.trained.values())},
        "stopped": "over-optimised" if evaluator.stopped else "finished",
        "cost": cost,
    }
    if state.is_main_process:
        files = [FILE, REPORT, CURVES, STRENGTHS, "README.md"]
        save_lora(config.out, policy, evaluator.about | {"evaluation": json.dumps(final)})
        if policy.part == "unet":
            save_lora(config.out / KOHYA, policy, evaluator.about, "kohya")
            files.append(KOHYA)
        write_json(config.out / REPORT, report)
        draw_curves(history, config.out / CURVES)
        draw_strengths(report["strengths"], config.out / STRENGTHS)
        write_text(config.out / "README.md", card_of(config, report))
        if config.push_to_hub is not None:
            push(config.out, config.push_to_hub, config.private, files, "LoRA")
    state.wait_for_everyone()
    return report


def _sigmas(schedule: NoiseSchedule) -> list[float]:
    return [schedule.coefficients(level)[1] for level in range(schedule.steps)]

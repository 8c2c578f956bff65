"""The one training loop: updates, averaged weights, evaluation, resume.

What is trained is an *objective*: a module called as `objective(batch, generator)` that returns its losses by name, "loss"
being the one that is minimised.  As the forward pass of one module, DDP and mixed precision of accelerate understand it.
`generator` is a CPU generator named by (seed, name, step, process): all randomness of a step comes from it, which is why
a resumed run equals an uninterrupted one.
"""

import math
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from rsm_guidance.core.random import generator_of
from rsm_guidance.training.checkpoint import TrainState, load_state, save_state
from rsm_guidance.training.data import Batches

Metrics = dict[str, float]
Evaluate = Callable[[list[Metrics]], Metrics]
"""Measures the averaged weights, given the history so far; may keep the best of them."""


@dataclass(frozen=True)
class LoopConfig:
    """How a run goes.

    Attributes:
        name: of the run, for the progress bar and its random numbers.
        steps: updates.
        save_every: updates between evaluations and saved states; both also come after the last update.
        seed: of all random numbers.
        ema_decay: of the averages, which warm up as (1 + step) / (10 + step); None for no averages.
        max_grad_norm: where gradients are clipped.
    """

    name: str
    steps: int
    save_every: int
    seed: int = 0
    ema_decay: float | None = None
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.save_every < 1:
            raise ValueError(f"steps and save_every must be at least 1; got {self.steps} and {self.save_every}")


def fit(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    batches: Batches,
    config: LoopConfig,
    folder: Path,
    evaluate: Evaluate | None = None,
) -> list[Metrics]:
    """Train an objective in place, or go on where `folder` says it was left, and return the history of evaluations.

    At the end the objective has the averaged weights, if there are any.  Each entry of the history holds the step, what
    `evaluate` returned and the losses of that step.  Only the main process evaluates.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after the step is finished and saved; a second Ctrl-C does not wait.
        FloatingPointError: if a loss is not finite; that step is not taken.
        ValueError: if `folder` holds the state of something else.
    """
    accelerator = Accelerator(step_scheduler_with_optimizer=False)  # one step is one step, with any number of processes
    model, optimizer, scheduler = accelerator.prepare(objective, optimizer, scheduler)
    trained = [p for p in objective.parameters() if p.requires_grad]
    ema = None if config.ema_decay is None else EMAModel(trained, config.ema_decay, foreach=True)
    state = TrainState(accelerator, objective, ema)
    load_state(folder, state)
    bar = _progress(state, batches, config)
    objective.train()
    with held_interrupt() as interrupted:
        for batch in bar:
            generator = generator_of(config.seed, config.name, state.step, accelerator.process_index)
            parts = update(accelerator, model, optimizer, batch, generator, config.max_grad_norm)
            scheduler.step()
            if ema is not None:
                ema.step(trained)
            state.step += 1
            bar.set_postfix({name: f"{value:.3f}" for name, value in parts.items()}, refresh=False)
            due = state.step % config.save_every == 0 or state.step == config.steps
            if due and evaluate is not None:
                _evaluate(state, trained, evaluate, parts)
            if interrupted():
                accelerator.set_trigger()
            stop = accelerator.check_trigger()  # in any process
            if due or stop:
                save_state(folder, state)
            if stop:
                raise KeyboardInterrupt
    if ema is not None:
        ema.copy_to(trained)
    return state.history


def _progress(state: TrainState, batches: Batches, config: LoopConfig) -> tqdm:
    """A progress bar over the batches that are left."""
    return tqdm(
        islice(batches.start(state.step), config.steps - state.step),
        config.name,
        config.steps,
        initial=state.step,
        mininterval=2,
        disable=not state.accelerator.is_main_process,
    )


def update(
    accelerator: Accelerator,
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    generator: torch.Generator,
    max_grad_norm: float,
) -> Metrics:
    """One update of the optimiser; returns the losses by name.

    Raises:
        FloatingPointError: if one is not finite, before anything has changed.
    """
    losses = objective(batch, generator)
    parts = {name: loss.item() for name, loss in losses.items()}
    if not all(map(math.isfinite, parts.values())):
        said = ", ".join(f"{name} {value:g}" for name, value in parts.items())
        raise FloatingPointError(
            f"a loss is not finite ({said}): lower the learning rate, and resume from the saved state"
        )
    optimizer.zero_grad()
    accelerator.backward(losses["loss"])
    accelerator.clip_grad_norm_(objective.parameters(), max_grad_norm)
    optimizer.step()
    return parts


def _evaluate(state: TrainState, trained: list[nn.Parameter], evaluate: Evaluate, parts: Metrics) -> None:
    state.accelerator.wait_for_everyone()
    if state.accelerator.is_main_process:
        with averaged(state.ema, trained):
            state.objective.eval()
            metrics = evaluate(state.history)
            state.objective.train()
        state.history.append({"step": state.step, **metrics, **parts})
    state.accelerator.wait_for_everyone()


@contextmanager
def averaged(ema: EMAModel | None, parameters: list[nn.Parameter]) -> Iterator[None]:
    """The averages in place of the parameters; without averages the parameters themselves."""
    if ema is None:
        yield
        return
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        yield
    finally:
        ema.restore(parameters)


@contextmanager
def held_interrupt() -> Iterator[Callable[[], bool]]:
    """Hold Ctrl-C back, so that what is under way ends whole; the function given tells whether it came.

    A second Ctrl-C is not held.  One that nobody asked about is raised at the end.  Threads other than the main one get no
    signals, and hold none.
    """
    pressed: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def hold(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, hold)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt

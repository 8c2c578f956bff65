"""The one training loop: updates, averaged weights, evaluation, resume.

What is trained is an *objective*: a module called as `objective(batch, generator)` that returns its losses by name, "loss"
being the one that is minimised.  As the forward pass of one module, DDP and mixed precision of accelerate understand it.
`generator` is a CPU generator named by (seed, name, step, process), and torch's global one is set from it for each step: all
randomness of a step comes from these names, which is why a resumed run equals an uninterrupted one.

An objective may have `weight(batch) -> float`, what a batch counts in the mean over micro-batches and processes (default 1).
An update whose batches weigh nothing is not taken: optimiser and averages stay as they are.
"""

import errno
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm.auto import tqdm

from rsm_guidance.core.random import generator_of
from rsm_guidance.training.checkpoint import TrainState, latest, load_state, save_state
from rsm_guidance.training.data import BatchSource, parts_of, process_state
from rsm_guidance.training.sharding import sharded

Metrics = dict[str, float]
Evaluate = Callable[[list[Metrics]], Metrics]
"""Measures the averaged weights, given the history so far; may keep the best of them.  Every process calls it."""
Log = Callable[[int, Metrics], object]
"""Told of the numbers of a step; the main process calls it."""


@dataclass(frozen=True)
class LoopConfig:
    """How a run goes.

    Attributes:
        name: of the run, for the progress bar and its random numbers.
        steps: updates.
        save_every: updates between saved states; they also come after the last update.
        seed: of all random numbers.
        ema_decay: of the averages, which warm up as (1 + step) / (10 + step); None for no averages.
        max_grad_norm: where gradients are clipped.
        evaluate_every: updates between evaluations, which also come after the last update; default `save_every`.
        evaluate_first: whether to evaluate before the first update, too.
        micro_batch: items per forward pass; batches of more are cut, and their gradients accumulate.
        precision: of computing, mixed as accelerate does it.
        keep: saved states that are kept.
        settings: of the objective and its data; a state that was saved under others is not gone on with.
        report_to: trackers of accelerate, by name, that are told what `log` is told.
        project: name of the run for them.
    """

    name: str
    steps: int
    save_every: int
    seed: int = 0
    ema_decay: float | None = None
    max_grad_norm: float = 1.0
    evaluate_every: int | None = None
    evaluate_first: bool = False
    micro_batch: int | None = None
    precision: Literal["no", "bf16", "fp16"] = "no"
    keep: int = 1
    settings: Mapping[str, Any] = field(default_factory=dict)
    report_to: tuple[str, ...] = ()
    project: str = "rsm-guidance"

    def __post_init__(self) -> None:
        if self.steps < 1 or self.save_every < 1:
            raise ValueError(f"steps and save_every must be at least 1; got {self.steps} and {self.save_every}")

    def evaluates_after(self, step: int) -> bool:
        """Whether an evaluation follows an update."""
        return step % (self.evaluate_every or self.save_every) == 0 or step == self.steps

    def saves_after(self, step: int) -> bool:
        """Whether the state is saved after an update."""
        return step % self.save_every == 0 or step == self.steps


def fit(
    objective: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler,
    batches: BatchSource,
    config: LoopConfig,
    folder: Path,
    evaluate: Evaluate | None = None,
    log: Log | None = None,
    resume: Path | None = None,
) -> list[Metrics]:
    """Train an objective in place, or go on with the last state that `folder` holds, and return the history of evaluations.

    At the end the objective has the averaged weights, if there are any.  Each entry of the history holds the step, what
    `evaluate` returned and the losses of that step.

    Args:
        objective: what is trained.
        optimizer: over its trainable parameters.
        scheduler: of the optimiser.
        batches: from any step on.
        config: how.
        folder: of saved states.
        evaluate: measures the averages.
        log: told of each step.
        resume: a state to go on with in place of the last one of `folder`.

    Raises:
        KeyboardInterrupt: on Ctrl-C or SIGTERM, after the step is finished and saved; a second Ctrl-C does not wait.
        FloatingPointError: if a loss or gradient is not finite; that step is not taken.
        ValueError: if `folder` holds the state of something else.
    """
    accelerator = _accelerator(config, folder)
    model, optimizer, scheduler = accelerator.prepare(objective, optimizer, scheduler)
    trained = [p for p in objective.parameters() if p.requires_grad]
    ema = None if config.ema_decay is None else EMAModel(trained, config.ema_decay, foreach=not sharded(trained))
    state = TrainState(accelerator, objective, ema)
    with accelerator.main_process_first():
        found = resume or latest(folder)
    if found is not None:
        load_state(found, state, config.settings)
    bar = _progress(state, batches, config)
    objective.train()
    with held_interrupt() as interrupted, _kept_on_failure(folder, state, config):
        if evaluate is not None and config.evaluate_first and not state.history and state.step == 0:
            _evaluate(state, trained, evaluate, {})
        for batch in bar:
            parts, moved = update(accelerator, model, optimizer, batch, config, state.step)
            scheduler.step()
            if moved and ema is not None:
                ema.step(trained)
            state.step += 1
            bar.set_postfix({name: f"{value:.3g}" for name, value in parts.items()}, refresh=False)
            _tell(accelerator, log, state.step, {**parts, "lr": float(scheduler.get_last_lr()[0])})
            if evaluate is not None and config.evaluates_after(state.step):
                metrics = _evaluate(state, trained, evaluate, parts)
                _tell(accelerator, log, state.step, {f"evaluation/{name}": value for name, value in metrics.items()})
            if interrupted():
                accelerator.set_trigger()
            stop = accelerator.check_trigger()  # in any process
            if stop or config.saves_after(state.step):
                save_state(folder, state, config.keep, config.settings)
            if stop:
                raise KeyboardInterrupt
    if ema is not None:
        ema.copy_to(trained)
    for tracker in accelerator.trackers:
        tracker.finish()
    return state.history


@contextmanager
def _kept_on_failure(folder: Path, state: TrainState, config: LoopConfig) -> Iterator[None]:
    """What fails between two steps, such as a reward's server, loses no step that was taken.

    Only of a single process: of several, one that failed cannot save together with the others.
    """
    try:
        yield
    except (ValueError, OSError) as error:
        saved = latest(folder) is not None and state.step % config.save_every == 0
        if state.accelerator.num_processes == 1 and state.step and not saved and not _disk_full(error):
            save_state(folder, state, config.keep, config.settings)
        raise


def _disk_full(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


def _accelerator(config: LoopConfig, folder: Path) -> Accelerator:
    process_state()
    AcceleratorState._reset_state()  # the precision belongs to a run, not to the process; devices and ranks stay
    accelerator = Accelerator(
        mixed_precision=config.precision,
        step_scheduler_with_optimizer=False,  # one step is one step, with any number of processes
        log_with=list(config.report_to) or None,
        project_dir=folder if config.report_to else None,
    )
    if config.report_to:
        plain = {n: v if isinstance(v, int | float | str) else str(v) for n, v in config.settings.items()}
        accelerator.init_trackers(config.project, plain)
    return accelerator


def _tell(accelerator: Accelerator, log: Log | None, step: int, numbers: Metrics) -> None:
    if log is not None and accelerator.is_main_process:
        log(step, numbers)
    if accelerator.trackers:
        accelerator.log(numbers, step=step)


def _progress(state: TrainState, batches: BatchSource, config: LoopConfig) -> tqdm:
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
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Any,
    config: LoopConfig,
    step: int,
) -> tuple[Metrics, bool]:
    """One update of the optimiser; returns the losses by name, over all processes, and whether it was taken.

    Raises:
        FloatingPointError: if a loss or gradient is not finite, before anything has changed.
    """
    generator = generator_of(config.seed, config.name, step, accelerator.process_index)
    parts = parts_of(batch, config.micro_batch)
    weigh = getattr(accelerator.unwrap_model(model), "weight", lambda part: 1.0)
    weights = [float(weigh(part)) for part in parts]
    total = _over_processes(accelerator, [sum(weights)])[0]
    optimizer.zero_grad()
    sums: dict[str, float] = {}
    with seeded(generator, accelerator.device):
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True)):
            share = weight / total if total else 0.0
            with _synchronised(accelerator, model, last=number + 1 == len(parts)):
                losses: dict[str, Tensor] = model(part, generator)
                factor = share * accelerator.num_processes  # DDP takes the mean over processes
                accelerator.backward(losses["loss"] * factor if factor != 1 else losses["loss"])
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0.0) + share * loss.item()
    said = dict(zip(sums, _over_processes(accelerator, [*sums.values()]), strict=True))
    _require_finite(said)
    if not total:
        optimizer.zero_grad()
        return said, False
    norm = accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    if norm is not None and accelerator.scaler is None:
        _require_finite({"gradient norm": float(norm)})
    optimizer.step()
    return said, True


def _require_finite(numbers: Metrics) -> None:
    if not all(map(math.isfinite, numbers.values())):
        said = ", ".join(f"{name} {value:g}" for name, value in numbers.items())
        raise FloatingPointError(
            f"a loss is not finite ({said}): lower the learning rate, and resume from the saved state"
        )


def _over_processes(accelerator: Accelerator, numbers: list[float]) -> list[float]:
    """The sums of numbers over all processes."""
    if accelerator.num_processes == 1:
        return numbers
    kind = torch.float32 if accelerator.device.type == "mps" else torch.float64
    summed: Tensor = accelerator.reduce(torch.tensor(numbers, dtype=kind, device=accelerator.device), "sum")
    return summed.tolist()


@contextmanager
def _synchronised(accelerator: Accelerator, model: nn.Module, last: bool) -> Iterator[None]:
    """Gradients of processes meet in the last micro-batch."""
    if last:
        yield
    else:
        with accelerator.no_sync(model):
            yield


@contextmanager
def seeded(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Torch's global random numbers (dropout) from a named stream, and as they were afterwards."""
    seed = int(torch.randint(2**62, (), generator=generator.clone_state()))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _evaluate(state: TrainState, trained: list[nn.Parameter], evaluate: Evaluate, parts: Metrics) -> Metrics:
    state.accelerator.wait_for_everyone()
    with averaged(state.ema, trained):
        state.objective.eval()
        try:
            metrics = evaluate(state.history)
        finally:
            state.objective.train()
    state.history.append({"step": state.step, **metrics, **parts})
    state.accelerator.wait_for_everyone()
    return metrics


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
    """Hold Ctrl-C and SIGTERM back, so that what is under way ends whole; the function given tells whether one came.

    A second one is not held.  One that nobody asked about is raised at the end.  Threads other than the main one get no
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

    before = {number: signal.signal(number, hold) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(pressed)
    except KeyboardInterrupt as stop:
        vars(stop)["signal_number"] = pressed[0] if pressed else signal.SIGINT
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if pressed:
        raise KeyboardInterrupt

"""What a sampler works on: a denoiser, random streams, and what scores latents and images."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.contracts import Denoiser, Reward
from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.meter import MeteredDenoiser, MeteredReward, MeteredValue
from rsm_guidance.core.random import Name, RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import GaussianTransition, Transition
from rsm_guidance.rewards import RowReward, as_reward, check_rows, name_of, scored
from rsm_guidance.rollouts.collect import initial_generators, initial_noise, interleave, step_noise, take
from rsm_guidance.rollouts.record import Step
from rsm_guidance.samplers.failures import Failures
from rsm_guidance.samplers.monitor import Watch


@dataclass(frozen=True)
class Progress:
    """Told to the caller after every level: `x0` [B, ...] is the current estimate of the clean latents.

    `scores` [B, K] are those of the level's candidates, or None where nothing was compared.
    """

    level: int
    levels: int
    x0: Tensor
    scores: Tensor | None = None


@dataclass
class Task:
    """B images to make.  Latents of K candidates are prompt-major everywhere: [B * K, ...].

    Attributes:
        denoiser: the model, with one prompt per image; metered.
        streams: named random numbers, one family per image.
        ledger: what is spent and may be spent.
        reward: scores finished images, or None.
        value: scores noisy latents, or None; it scores the finished latents where there is no reward.
        progress: called after every level.
        watch: a gold reward that sees finished images, or None; it sees as many as the budget has decodes for.
        columns: what the reward needs besides prompts, B entries each.
        prompts: what the reward is told of every image; by default the denoiser's prompts.
        failures: scores that were no numbers.
        guided_levels: levels that are guided, from the noisiest; None for all.  The planner lowers it to meet a budget.
    """

    denoiser: Any
    streams: RandomStreams
    ledger: Ledger = field(default_factory=Ledger)
    reward: Any = None
    value: Any = None
    progress: Callable[[Progress], None] | None = None
    watch: Watch | None = None
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    prompts: Sequence[str] = ()
    failures: Failures = field(default_factory=Failures)
    guided_levels: int | None = None

    def __post_init__(self) -> None:
        inner: Denoiser = self.denoiser
        self.prompts = self.prompts or inner.prompts
        self.denoiser = MeteredDenoiser(inner, self.ledger)
        self.reward = None if self.reward is None else self.bound_reward(self.reward)
        self.value = None if self.value is None else self.bound_value(self.value)

    def bound_reward(self, reward: Reward | Callable[..., Any]) -> RowReward:
        """A reward that knows the rows of this task, metered."""
        found = as_reward(reward)
        check_rows(found, self.prompts, self.columns)
        return RowReward(MeteredReward(found, self.ledger), self.prompts, self.columns)

    def bound_value(self, value: Any) -> MeteredValue:
        """A `Value`, or that of a `ValueSource` for this task, metered."""
        made = getattr(value, "value", None)
        return MeteredValue(value if made is None else made(self.denoiser, self.reward, self.streams), self.ledger)

    @property
    def count(self) -> int:
        """Number of images asked for, B."""
        return len(self.denoiser.prompts)

    @property
    def rows(self) -> Tensor:
        """Row indices 0..B-1."""
        return torch.arange(self.count)

    @property
    def schedule(self) -> NoiseSchedule:
        """The levels."""
        schedule: NoiseSchedule = self.denoiser.schedule
        return schedule

    @property
    def steps(self) -> int:
        """Number of levels N."""
        steps: int = self.denoiser.steps
        return steps

    @property
    def can_score(self) -> bool:
        """Whether there is anything to compare candidates with."""
        return self.reward is not None or self.value is not None

    # --- latents ---

    def rows_of(self, candidates: int) -> Tensor:
        """The prompt of every latent of a population [B * K]."""
        return self.rows.repeat_interleave(candidates)

    def initial(self, *candidates: int) -> Tensor:
        """Initial latents [B * K, ...] of candidates; candidate 0 is where the stock pipeline starts."""
        return interleave([initial_noise(self.denoiser, self.streams, c) for c in candidates])

    def initial_generators(self, candidate: int) -> list[torch.Generator]:
        """Generators [B] of a candidate's initial latents."""
        return initial_generators(self.streams, candidate)

    def noise(
        self, rows: Tensor, shape: Sequence[int], level: int, candidates: Sequence[int], child: int = 0
    ) -> Tensor:
        """Noise [R, ...] of the steps of candidates [R] that leave a level."""
        return step_noise(self.streams, rows, [(c,) for c in candidates], level, shape, child)

    def named_noise(self, rows: Tensor, shape: Sequence[int], names: Sequence[tuple[Name, ...]]) -> Tensor:
        """Standard normal noise [R, ...] by one name for each row of rows [R]."""
        return self.streams.normals(rows.tolist(), shape, names)

    def predict(self, x: Tensor, level: int, rows: Tensor | None = None) -> Prediction:
        """The denoiser's prediction at latents [R, ...]; by default of one latent for each row."""
        prediction: Prediction = self.denoiser.predict(x, level, self.rows if rows is None else rows)
        return prediction

    def step(self, transition: Transition, prediction: Prediction, jump: tuple[int, int], candidates: int = 1) -> Step:
        """One step of a population [B * K, ...]; its noise is that of child 0 of every candidate."""
        labels = [(c,) for c in range(candidates)] * self.count
        rows = self.rows_of(candidates)
        return take(self.denoiser, self.streams, transition, prediction, rows, labels, jump)

    def children(
        self, transition: GaussianTransition, prediction: Prediction, level: int, runs: int, count: int
    ) -> Tensor:
        """K children [B * runs * K, ...] of parents [B * runs, ...], which share their parents' evaluation.

        Child 0 is the step that a run takes without children.
        """
        gaussian = transition(prediction, self.schedule, level, level + 1)
        rows, labels = self.rows_of(runs), [*range(runs)] * self.count
        shape = prediction.x.shape[1:]
        drawn = [gaussian.sample(self.noise(rows, shape, level, labels, child)) for child in range(count)]
        return interleave(drawn)

    # --- scores ---

    def score(self, x: Tensor, level: int, rows: Tensor) -> tuple[Tensor, Prediction | None]:
        """Checked values [R], float64, of latents at a level, and the prediction there if the value had to read it.

        Whoever goes on from some of these latents takes their part of the prediction along instead of asking again.

        Raises:
            RewardError: if the value returns anything but one score per latent.
        """
        value = self.value
        reads = value.reads_prediction and level < self.steps
        prediction = self.predict(x, level, rows) if reads else None
        return self.checked(lambda: value(x, level, rows, prediction), rows, value.name), prediction

    def checked(self, call: Callable[[], object], rows: Tensor, name: str, final: bool = False) -> Tensor:
        """The scores [R] that a call returns for latents of rows [R], where those that are no numbers lose.

        Raises:
            RewardError: if it returns anything but one score per latent, or no number at all.
        """
        scores = scored(call, len(rows), name, finite=False)
        self.failures.judged |= final and bool(scores.isfinite().any())
        return self.failures.outranked(scores, rows.cpu(), name)

    def final_scores(self, x0: Tensor, rows: Tensor) -> Tensor | None:
        """Checked scores [R] of finished latents by the reward, else by the value at the clean level; None without."""
        if self.reward is None and self.value is None:
            return None
        if self.reward is None:
            scores = self.checked(lambda: self.value(x0, self.steps, rows), rows, self.value.name, final=True)
            self.show(x0, rows, scores)
            return scores
        images = self.denoiser.decode(x0, rows)
        scores = self.checked(lambda: self.reward(images, rows), rows, self.reward.name, final=True)
        self.show(x0, rows, scores, images)
        return scores

    def show(self, x0: Tensor, rows: Tensor, scores: Tensor, images: Tensor | None = None) -> None:
        """Let the gold reward see finished latents [R, ...] and their scores [R].

        Without their `images` they are decoded, if the budget has decodes for it.
        """
        if self.watch is None or (images is None and not self.ledger.affords(decodes=len(x0) + self.count)):
            return
        with torch.no_grad():
            images = self.denoiser.decode(x0, rows) if images is None else images.detach()
            self.watch.see(images, rows, scores)

    @property
    def unwatched(self) -> "Task":
        """This task without its gold reward, for latents that are no results."""
        other = copy.copy(self)
        other.watch = None
        return other

    # --- what methods whose cost depends on what they meet may still spend ---

    @property
    def final_cost(self) -> float:
        """Denoiser evaluations of scoring one finished image."""
        if self.reward is not None:
            return float(self.reward.reward.share)
        return 0.0 if self.value is None else float(self.value.share)

    @property
    def final_calls(self) -> int:
        """Reward calls, each with a decode, of scoring one finished image."""
        if self.reward is not None:
            return 1
        return 0 if self.value is None else int(self.value.reward_calls_per_row)

    @property
    def _read(self) -> float:
        return float(self.denoiser.evaluations_per_row) if self.value.reads_prediction else 0.0

    def value_cost(self, reused: bool = True) -> float:
        """Denoiser evaluations of one value; without those of a prediction that is `reused` for the next step."""
        return float(self.value.evaluations_per_row) - (self._read if reused else 0.0)

    def affords_values(self, count: int, level: int) -> bool:
        """Whether the budget pays for `count` values of latents and for finishing every image from `level`; notes it if not."""
        rest = (self.steps - level) * self.denoiser.evaluations_per_row + self.final_cost
        evaluations = self.count * rest + count * self.value_cost(reused=False)
        calls = self.count * self.final_calls + count * self.value.reward_calls_per_row
        if self.ledger.affords(evaluations, calls, calls + self.count):
            return True
        self.ledger.stop("budget")
        return False

    def name_of_score(self) -> str:
        """What scores finished images, in messages."""
        return name_of(self.reward or self.value)

"""What every sampler is given and gives back."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from rsm_guidance.core.contracts import Denoiser, Reward, Value
from rsm_guidance.core.ledger import Ledger
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import Gaussian, Transition, glass
from rsm_guidance.rewards import judged, name_of
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
class Problem:
    """One sampling task: B images to make with a denoiser, and what judges them.

    Attributes:
        denoiser: the model, with one prompt per image.
        streams: named random numbers, one family per image.
        ledger: what is spent and may be spent.
        reward: judge of finished images, or None.
        value: judge of noisy latents, or None; it judges the finished latents where there is no reward.
        progress: called after every level.
        watch: a monitor of finished images, or None; it sees as many as the budget has decodes for.
    """

    denoiser: Denoiser
    streams: RandomStreams
    ledger: Ledger = field(default_factory=Ledger)
    reward: Reward | None = None
    value: Value | None = None
    progress: Callable[[Progress], None] | None = None
    watch: Watch | None = None

    @property
    def count(self) -> int:
        """Number of images asked for, B."""
        return len(self.denoiser.prompts)

    @property
    def rows(self) -> Tensor:
        """Row indices 0..B-1."""
        return torch.arange(self.count)

    @property
    def final_cost(self) -> float:
        """Denoiser evaluations for judging one finished image."""
        return self.value.evaluations_per_row if self.reward is None and self.value is not None else 0.0

    @property
    def final_calls(self) -> int:
        """Reward calls, each with a decode, for judging one finished image."""
        if self.reward is not None:
            return 1
        return 0 if self.value is None else self.value.reward_calls_per_row

    @property
    def value_cost(self) -> float:
        """Denoiser evaluations of `scored` for who takes the prediction along, which then costs nothing more."""
        if self.value is None:
            return 0.0
        return self.value.evaluations_per_row - self.value.reads_prediction * self.denoiser.evaluations_per_row

    def values(self, x: Tensor, level: int, rows: Tensor) -> Tensor:
        """Checked scores [R], float64, of latents at a level; see `scored`."""
        return self.scored(x, level, rows)[0]

    def scored(self, x: Tensor, level: int, rows: Tensor) -> tuple[Tensor, Prediction | None]:
        """Checked scores [R], float64, of latents at a level, and the prediction there if the value had to read it.

        Whoever goes on from some of these latents takes its rows of the prediction along instead of asking again.

        Raises:
            RewardError: if the value model fails or returns anything but one finite score per latent.
        """
        value = self.value
        assert value is not None
        reads = value.reads_prediction and level < self.denoiser.steps
        prediction = self.denoiser.predict(x, level, rows) if reads else None
        return judged(lambda: value(x, level, rows, prediction), len(x), name_of(value)), prediction

    def final_rewards(self, x0: Tensor, rows: Tensor) -> Tensor | None:
        """Checked scores [R] of finished latents by the reward, else by the value at the clean level; None without."""
        reward = self.reward
        if reward is None and self.value is None:
            return None
        if reward is None:
            scores = self.values(x0, self.denoiser.steps, rows)
            self.show(x0, rows, scores)
            return scores
        self.ledger.reward_calls += len(x0)
        prompts = [self.denoiser.prompts[r] for r in rows.tolist()]
        images: list[Tensor] = []

        def judge() -> Tensor:
            images.append(self.denoiser.decode(x0, rows))
            return reward(images[0], prompts)

        scores = judged(judge, len(x0), name_of(reward))
        self.show(x0, rows, scores, images[0])
        return scores

    def show(self, x0: Tensor, rows: Tensor, scores: Tensor, images: Tensor | None = None) -> None:
        """Let the monitor see finished latents [R, ...] and what the guide says of them [R].

        Without their `images` they are decoded, if the budget has decodes for it.
        """
        if self.watch is None or (images is None and not self.ledger.affords(decodes=len(x0) + self.count)):
            return
        with torch.no_grad():
            images = self.denoiser.decode(x0, rows) if images is None else images.detach()
            self.watch.see(images, [self.denoiser.prompts[r] for r in rows.tolist()], rows, scores)

    def require_judge(self, sampler: str) -> None:
        """Raise a ValueError if there is nothing to compare candidates with."""
        if self.reward is None and self.value is None:
            raise ValueError(f"the sampler {sampler!r} compares candidates: pass a reward or a value model")

    def require_budget(self) -> None:
        """Raise a ValueError if the budget does not reach for one unguided image."""
        steps, cost = self.denoiser.steps, self.denoiser.evaluations_per_row
        needed = steps * cost + self.final_cost
        budget = self.ledger.budget
        for cap, calls, what in (
            (budget.reward_calls, self.final_calls, "reward calls"),
            (budget.decodes, self.final_calls + 1, "decodes"),
        ):
            if cap is not None and calls > cap:
                raise ValueError(f"a budget of {cap:g} {what} is too small: one finished image takes {calls}; raise it")
        cap = budget.evaluations
        if cap is not None and needed > cap + 1e-6:
            raise ValueError(
                f"a budget of {cap:g} denoiser evaluations cannot finish one image: {steps} steps at {cost:g} "
                f"and the final score take {needed:g}; raise the budget or take fewer steps"
            )

    def affords(self, evaluations: float, reward_calls: int) -> bool:
        """Whether the budget reaches for this much more, over all images, and their final decode; notes it if not."""
        if self.ledger.affords(evaluations, reward_calls, reward_calls + self.count):
            return True
        self.ledger.stop("budget")
        return False

    def most(self, count: int, cost: Callable[[int], tuple[float, int]], least: int = 1) -> int:
        """The largest number, at most `count`, whose cost the budget reaches for; `least` if for none above it.

        `cost` gives denoiser evaluations and reward calls per image.
        """
        for number in range(count, least, -1):
            evaluations, calls = cost(number)
            if self.affords(evaluations * self.count, calls * self.count):
                return number
        return least

    def affordable(self, count: int, scores: int, extra: float = 0.0) -> int:
        """How many whole trajectories, of at most `count`, the budget reaches for.

        Each makes `scores` value calls, whose predictions it takes along, and spends `extra` denoiser evaluations besides.
        """
        denoiser, value, budget = self.denoiser, self.value, self.ledger.budget
        calls = self.final_calls + (0 if value is None else scores * value.reward_calls_per_row)
        each = denoiser.steps * denoiser.evaluations_per_row + self.final_cost + scores * self.value_cost + extra
        affordable = count
        for cap, cost, fixed in (
            (budget.evaluations, each, 0),
            (budget.reward_calls, calls, 0),
            (budget.decodes, calls, 1),
        ):
            if cap is not None and cost:
                affordable = min(affordable, math.floor((cap - fixed) / cost + 1e-9))
        if affordable < count:
            self.ledger.stop("budget")
        return max(1, affordable)

    def step(
        self, gaussian: Gaussian, level: int, candidates: list[int], child: int = 0, prompts: Tensor | None = None
    ) -> Tensor:
        """Sample a transition for rows candidate by candidate: the mean is [len(candidates) * P, ...], candidate-major.

        `prompts` [P] are the rows that each candidate has, all B by default.  Noise is named (candidate, level, child), so
        candidate 0 and child 0 are always those of the unguided run.
        """
        if gaussian.std == 0:
            return gaussian.mean
        shape = gaussian.mean.shape[1:]
        names = [("step", c, level, child) for c in candidates]
        rows = (self.rows if prompts is None else prompts).tolist()
        noise = torch.stack([self.streams.normal(r, shape, *n) for n in names for r in rows])
        return gaussian.sample(noise)

    def advance(
        self,
        x: Tensor,
        rows: Tensor,
        jump: tuple[int, int],
        transition: Transition,
        candidates: list[int],
        prediction: Prediction | None = None,
    ) -> tuple[Prediction, Tensor]:
        """The prediction at latents [len(candidates) * P, ...], candidate-major, and a step by a transition from it.

        `rows` repeats the same P prompts for each candidate.  `prediction` is that of these latents, where it is already known.
        """
        level, target = jump
        denoiser, schedule = self.denoiser, self.denoiser.schedule
        prompts = rows[: len(rows) // len(candidates)]
        prediction = prediction or denoiser.predict(x, level, rows)
        if transition.kind != "glass":
            gaussian = transition(prediction, schedule, level, target)
            return prediction, self.step(gaussian, level, candidates, prompts=prompts)
        # The mean of a unit Gaussian at zero is the noise itself, under the same names as everywhere.
        noise = self.step(Gaussian(torch.zeros_like(x), 1.0), level, candidates, prompts=prompts)
        return prediction, glass(
            lambda y, at: denoiser.predict(y, at, rows), prediction, schedule, level, target, noise
        )

    def initial(self, candidate: int) -> Tensor:
        """Starting latents [B, ...]; candidate 0 is where the stock pipeline starts."""
        return self.denoiser.initial(self.starts(candidate) if candidate else None)

    def starts(self, candidate: int) -> list[torch.Generator]:
        """Generators [B] of a candidate's starting latents."""
        return [self.streams.generator(r, "initial", candidate) for r in range(self.count)]

    def report(self, level: int, x0: Tensor, scores: Tensor | None = None) -> None:
        """Tell the caller how far the run is; `x0` [>= B, ...] estimates the clean latents."""
        if self.progress is not None:
            b = self.count
            self.progress(Progress(level + 1, self.denoiser.steps, x0[:b].detach(), scores))


@dataclass
class SamplerOutput:
    """The result of one sampling run.

    Attributes:
        latents: clean latents [B, ...].
        rewards: float64 [B] by the final judge, or None without one.
        log_weights: float64 [B], log importance weights of the returned samples (0 for greedy samplers).
        log_normalizer: float64 [B], estimate of log E[exp(r)] per prompt, or None where the sampler gives none.
        ledger: what was spent.
        trace: JSON-serialisable record of every candidate, score and choice.
    """

    latents: Tensor
    rewards: Tensor | None
    log_weights: Tensor
    log_normalizer: Tensor | None
    ledger: Ledger
    trace: dict[str, Any]


class Sampler(Protocol):
    """A frozen dataclass that is its own configuration.

    `scales` names the field that a larger budget raises, or is None.
    """

    name: ClassVar[str]
    scales: ClassVar[str | None]

    def sample(self, problem: Problem) -> SamplerOutput:
        """Solve a problem; see `SamplerOutput`."""
        ...


def new_trace(sampler: Any, problem: Problem) -> dict[str, Any]:
    """An empty trace: the sampler's settings, the prompts and, where the run steps by itself, the noise levels."""
    own = getattr(getattr(sampler, "transition", None), "kind", None) == "scheduler"
    return {
        "sampler": {"name": sampler.name, **asdict(sampler)},
        "prompts": list(problem.denoiser.prompts),
        "seed": problem.streams.seed,
        "steps": problem.denoiser.steps,
        "sigma": None if own else problem.denoiser.schedule.sigma.tolist(),
        "levels": [],
    }


def finished(problem: Problem, latents: Tensor, trace: dict[str, Any], rewards: Tensor | None = None) -> SamplerOutput:
    """Close the books of a greedy or unguided run; judges the latents if they have not been.

    A second Ctrl-C during that judgement leaves the latents without rewards.
    """
    if rewards is None:
        try:
            rewards = problem.final_rewards(latents, problem.rows)
        except KeyboardInterrupt:
            problem.ledger.stop("interrupted")
    if problem.watch is not None:
        trace["monitor"] = {"name": name_of(problem.watch.monitor.reward), "history": problem.watch.history}
    problem.ledger.finish()
    trace["rewards"] = None if rewards is None else rewards.tolist()
    trace["ledger"] = problem.ledger.to_dict()
    return SamplerOutput(latents, rewards, torch.zeros(problem.count, dtype=torch.float64), None, problem.ledger, trace)


def finished_best(problem: Problem, x: Tensor, rewards: Tensor | None, trace: dict[str, Any]) -> SamplerOutput:
    """Close a greedy run by the best of latents [R * B, ...], run-major, by rewards [R * B]; without, by the first of them."""
    if rewards is None:
        return finished(problem, x[: problem.count], trace)
    table = rewards.view(-1, problem.count)
    best = table.argmax(0)
    trace["candidates"] = {"rewards": table.T.tolist(), "chosen": best.tolist()}
    runs = x.view(len(table), problem.count, *x.shape[1:])
    return finished(problem, runs[best, problem.rows], trace, table[best, problem.rows])


class Interrupted(Exception):
    """A run was asked to end: Ctrl-C or the deadline; the sampler returns the best so far."""


@contextmanager
def interruptible(problem: Problem) -> Iterator[None]:
    """Turn Ctrl-C into `Interrupted`, noted in the ledger."""
    try:
        yield
    except KeyboardInterrupt as interrupt:
        problem.ledger.stop("interrupted")
        raise Interrupted from interrupt


def check_deadline(problem: Problem) -> None:
    """Raise `Interrupted` once the deadline has passed, or the monitor has seen enough."""
    if problem.watch is not None and problem.watch.parted:
        problem.ledger.stop("over-optimised")
        raise Interrupted
    if problem.ledger.late:
        problem.ledger.stop("deadline")
        raise Interrupted

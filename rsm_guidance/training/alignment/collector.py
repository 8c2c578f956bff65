"""One epoch's samples: prompts are drawn, the policy rolls out, rewards become credits (`config.rollout`, `config.estimator`).

All random numbers are named by (seed, epoch, prompt), so that samples depend neither on how many are made at once nor on how many
processes share them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.random import RandomStreams, derive_seed, generator_of
from rsm_guidance.core.transitions import ODE, GaussianTransition
from rsm_guidance.data.prompts import PromptSet, chosen
from rsm_guidance.engine.replay import Replay
from rsm_guidance.engine.replayed import ReplayedDenoiser
from rsm_guidance.rollouts import Rollout, Siblings, Step, branches, candidates, collect, completed
from rsm_guidance.rollouts.collect import initial_generators
from rsm_guidance.training.alignment.calls import transition_of
from rsm_guidance.training.alignment.conditions import Conditions
from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.estimators import ESTIMATORS, estimate, node_values
from rsm_guidance.training.alignment.experience import Experience, concatenated, finals_of, noisy_steps, paths, row_of
from rsm_guidance.training.alignment.judge import Judge


def prompts_of(count: int, wanted: int, seed: int, epoch: int) -> list[int]:
    """Which of `count` prompts an epoch takes: every prompt comes once before any comes again."""
    found: list[int] = []
    for place in range(epoch * wanted, (epoch + 1) * wanted):
        turn, at = divmod(place, count)
        found.append(_order(count, seed, turn)[at])
    return found


def _order(count: int, seed: int, turn: int) -> list[int]:
    return torch.randperm(count, generator=generator_of("prompts", seed, turn)).tolist()


@dataclass(frozen=True)
class Share:
    """What this process takes of what all take together."""

    number: int = 0
    processes: int = 1

    def of(self, items: Sequence[Any]) -> slice:
        """Its slice of items, whose number the processes divide."""
        size = len(items) // self.processes
        return slice(self.number * size, (self.number + 1) * size)


@dataclass(frozen=True)
class Collector:
    """Makes samples and credits with whatever weights the denoiser has.

    Attributes:
        config: of the training.
        prompts: all of them, with their columns.
        conditions: what the denoiser is told for them.
        judge: of samples.
        gate: of rewards that tell which samples are overrated; None without.
        transition: of the steps that draw noise.
        share: of this process.
    """

    config: AlignConfig
    prompts: PromptSet
    conditions: Conditions
    judge: Judge
    gate: Judge | None
    transition: GaussianTransition
    share: Share = Share()

    def __call__(self, epoch: int) -> tuple[Experience, Replay]:
        """The samples of this process's prompts, whose fields "row" are rows of the recording."""
        config, seed = self.config, derive_seed(self.config.seed, "rollouts", epoch)
        numbers, texts, places = self._drawn(epoch)
        names, replay = RandomStreams.for_prompts(seed, texts).names, self.replay(epoch)
        parts, size = [], self._at_once()
        for start in range(0, len(places), size):
            here = places[start : start + size]
            streams = RandomStreams(seed, tuple(names[p] for p in here))
            denoiser = self.conditions.denoiser(
                replay.pick(range(start, start + len(here))),
                [texts[p] for p in here],
                initial_generators(streams, 0),
                config.rollout_batch,
            )
            columns = chosen(self.prompts.columns, [numbers[p] for p in here])
            with torch.no_grad():
                parts.append(_Chunk(self, denoiser, streams, columns, here[0], start, epoch).experience())
        return Experience.joined(parts), replay

    def replay(self, epoch: int) -> Replay:
        """The recording of this process's prompts of an epoch."""
        _, texts, places = self._drawn(epoch)
        return self.conditions.replay([texts[p] for p in places])

    def at(self, levels: Mapping[int, float]) -> "Collector":
        """The same with other noise levels of the flow SDE."""
        return replace(self, transition=transition_of(self.config.rollout, levels))

    def _drawn(self, epoch: int) -> tuple[list[int], list[str], list[int]]:
        """The prompts of an epoch: their numbers, their texts, and the places of this process's among them."""
        numbers = prompts_of(len(self.prompts.prompts), self.config.prompts_per_epoch, self.config.seed, epoch)
        mine = self.share.of(numbers)
        return numbers, [self.prompts.prompts[n] for n in numbers], list(range(mine.start, mine.stop))

    def _at_once(self) -> int:
        """Prompts whose samples are made together: as many as fill a forward pass."""
        return max(1, self.config.rollout_batch // self.config.rollout.group)


@dataclass(frozen=True)
class _Chunk:
    """Some prompts of an epoch.

    Attributes:
        first: number of the first of them in the epoch.
        row: its row in the recording.
    """

    collector: Collector
    denoiser: ReplayedDenoiser
    streams: RandomStreams
    columns: Mapping[str, Sequence[Any]]
    first: int
    row: int
    epoch: int

    @property
    def config(self) -> AlignConfig:
        return self.collector.config

    def experience(self) -> Experience:
        kind, form = self.config.rollout.kind, self.config.form
        if kind == "branches":
            return self._branches()
        if kind == "candidates":
            return self._candidates()
        rollout = self._rollout()
        if form.family != "reverse" and form.name != "prdp":
            return self._samples(rollout)
        return self._tree(rollout) if kind == "tree" else self._paths(rollout)

    # --- kinds ---

    def _rollout(self) -> Rollout:
        r = self.config.rollout
        window = self._window() if r.kind == "window" else None
        splits = {level: k for level, k in enumerate(r.children) if k > 0} if r.kind == "tree" else None
        how = ODE() if r.kind == "ode" else self.collector.transition
        return collect(self.denoiser, self.streams, how, r.group, splits, window, same_start=r.same_start)

    def _window(self) -> tuple[int, int]:
        r, updates = self.config.rollout, self.epoch * self.config.updates_per_epoch
        first, end = r.window_at(updates) or (0, r.steps)
        if r.random_window:
            place = generator_of("window", self.config.seed, self.epoch)
            first, end = (f := int(torch.randint(first + 1, (), generator=place))), f + end - first
        return first, end

    def _samples(self, rollout: Rollout) -> Experience:
        """Finished samples, for forms that noise them again."""
        rewards = self._rewards(rollout.latents, rollout.rows)
        fields, levels = {"x0": rollout.latents, "row": rollout.rows}, torch.zeros(len(rollout.rows), 1).long()
        return self._made(
            fields, rewards[:, None], rollout.rows, self._starts(rollout), levels, rewards, rollout.latents
        )

    def _paths(self, rollout: Rollout) -> Experience:
        """Whole trajectories, each with a credit for every step that drew noise."""
        steps = noisy_steps(rollout, self.denoiser.schedule)
        rewards = self._rewards(rollout.latents, rollout.rows)
        credits = torch.stack([self._credits(r, steps, m) for m, r in enumerate(rewards.unbind(1))], 2)
        rows = paths(steps, self.denoiser.schedule)
        return self._made(rows, credits, rollout.rows, self._starts(rollout), rows["level"], rewards, rollout.latents)

    def _starts(self, rollout: Rollout) -> Tensor:
        """Numbers [R] of the initial noises within their prompts."""
        count = self.config.rollout.group
        numbers = torch.arange(count).repeat(len(rollout.rows) // count)
        return torch.zeros_like(numbers) if self.config.rollout.same_start else numbers

    def _credits(self, rewards: Tensor, steps: Sequence[Step], reward: int) -> Tensor:
        """Credits [R, S] of the steps, by one of the rewards."""
        e = self.config.estimator
        asks = ESTIMATORS[e.name].asks
        if asks == "paths":
            return estimate(e.name, rewards, steps=len(steps))
        values = [self._state(step, asks, reward) for step in steps] + [rewards]
        constants: dict[str, Any] = {}
        if e.name == "turning-point":
            constants = {"variant": e.variant, "eta": e.eta, "first": e.first}
        if e.name == "process-value":
            constants = {"discount": e.discount}
        return estimate(e.name, torch.stack(values, 1), **constants)

    def _state(self, step: Step, asks: str, reward: int) -> Tensor:
        """What a state is worth [R] by one of the rewards: that of its completion, or of Tweedie's estimate."""
        if asks == "completions":
            return self._rewards(self._completed(step.x, step.level, step.rows), step.rows)[:, reward]
        return self._rewards(step.estimate, step.rows)[:, reward]

    def _tree(self, rollout: Rollout) -> Experience:
        """Nodes of trees; each has the mean or softmax of what its leaves get, and is compared with those of its level."""
        rewards, schedule = self._rewards(rollout.latents, rollout.rows), self.denoiser.schedule
        weights = self._leaf_weights(rollout) if self.config.estimator.softmax else None
        per_step = finals_of(rollout, rewards)
        parts = []
        for step, lineage, mean in zip(rollout.steps, rollout.lineage(), per_step, strict=True):
            if step.noise is None or step.gaussian(schedule).std == 0:
                continue
            if int(torch.bincount(step.rows).min()) < 2:
                continue  # before the first parting there is nothing to compare
            credits = mean
            if weights is not None:
                columns = [node_values(r, lineage, weights) for r in rewards.unbind(1)]
                credits = torch.stack(columns, 1)
            rows = {name: t[:, None] for name, t in row_of(step, schedule).items()}
            seeds = torch.arange(len(step.rows))
            parts.append(self._made(rows, credits[:, None], step.rows, seeds, rows["level"], mean, step.next))
        return Experience.joined(parts)

    def _leaf_weights(self, rollout: Rollout) -> Tensor:
        """Log-density [R] of each leaf's own path, a mean over dimensions."""
        total = torch.zeros(len(rollout.rows), dtype=torch.float64)
        for step, lineage in zip(rollout.steps, rollout.lineage(), strict=True):
            if step.noise is not None and step.gaussian(self.denoiser.schedule).std > 0:
                density = step.log_prob(self.denoiser.schedule) / step.next[0].numel()
                total += density.double().cpu()[lineage]
        return total

    def _branches(self) -> Experience:
        r = self.config.rollout
        stem, found = branches(
            self.denoiser, self.streams, self.collector.transition, r.group, r.children, r.same_start
        )
        parts = []
        for siblings in found:
            assert siblings.finals is not None
            rewards = self._rewards(siblings.finals, siblings.step.rows)
            parts.append(self._siblings(siblings, rewards, siblings.finals))
        made = Experience.joined(parts)
        if not self.config.trust.anchors:
            return made
        return replace(made, anchors=concatenated(self._anchors(stem, {s.step.level for s in found})))

    def _anchors(self, stem: Rollout, taken: set[int]) -> list[dict[str, Tensor]]:
        """Steps of ODE runs without branches, as if they had drawn no noise."""
        rows, schedule, how = [], self.denoiser.schedule, self.collector.transition
        for step in stem.steps:
            if step.level in taken or step.prediction is None or how.std(schedule, step.level, step.target) == 0:
                continue
            found = row_of(replace(step, transition=how), schedule)
            rows.append(found | {"next": found["mean"].to(step.x.dtype), "row": found["row"] + self.row})
        return rows

    def _candidates(self) -> Experience:
        r, scores = self.config.rollout, []

        def score(x: Tensor, level: int, rows: Tensor) -> Tensor:
            scores.append(self.collector.judge.states(self.denoiser, self.streams, x, level, rows, self.columns))
            weights = self.config.reward_weights or (1.0,) * scores[-1].shape[1]
            return scores[-1] @ torch.tensor(weights, dtype=scores[-1].dtype)

        _, found = candidates(
            self.denoiser, self.streams, self.collector.transition, r.group, r.children, score, r.continues, r.same_start
        )  # fmt: skip
        return Experience.joined([self._siblings(s, t, s.step.next) for s, t in zip(found, scores, strict=True)])

    def _siblings(self, siblings: Siblings, rewards: Tensor, latents: Tensor) -> Experience:
        """Children of single states; their group is their state."""
        step = siblings.step
        rows = {name: t[:, None] for name, t in row_of(step, self.denoiser.schedule).items()}
        return self._made(rows, rewards[:, None], step.rows, step.parents, rows["level"], rewards, latents)

    # --- parts ---

    def _rewards(self, latents: Tensor, rows: Tensor) -> Tensor:
        return self.collector.judge.finals(self.denoiser, latents, rows, self.columns)

    def _completed(self, x: Tensor, level: int, rows: Tensor) -> Tensor:
        return completed(self.denoiser, self.streams, x, level, rows)

    def _made(
        self,
        fields: dict[str, Tensor],
        credits: Tensor,
        prompts: Tensor,
        seeds: Tensor,
        levels: Tensor,
        rewards: Tensor,
        latents: Tensor,
    ) -> Experience:
        """The samples, with prompts numbered over the epoch and rows over the recording."""
        moved = fields | {"row": fields["row"] + self.row}
        features, gate = torch.zeros(len(prompts), 0), torch.zeros(len(prompts), 0)
        if self.config.advantage.diversity:
            flat = latents.flatten(1).float()
            features = torch.nn.functional.normalize(flat - flat.mean(1, keepdim=True), dim=1)
        if self.collector.gate is not None:
            gate = self.collector.gate.finals(self.denoiser, latents, prompts, self.columns)
        return Experience(
            moved, credits.double(), prompts + self.first, seeds, levels, rewards.double(), gate, features.cpu()
        )

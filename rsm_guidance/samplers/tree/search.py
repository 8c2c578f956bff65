"""How the trees of `tree-sampling` and `tree-search` grow: simulations are planned, run in batches, and completed.

Up to `batch` simulations of every prompt are planned before their rewards are known and run together, level by level; a
node's transition is computed once and serves all its children.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rsm_guidance.samplers.tree.store import Forest
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.samplers.tree.selection import Widening
from rsm_guidance.core.transitions import Gaussian, Transition
from rsm_guidance.samplers.tree.tree import Tree
from rsm_guidance.samplers.base import Interrupted, Problem, SamplerOutput, check_deadline, finished, interruptible
from rsm_guidance.samplers.tree.file import TreeFile, spread

if TYPE_CHECKING:
    from rsm_guidance.samplers.tree.methods import TreeSampler

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_EARLY = 4  # u^4 of a uniform u: where restarts leave a path leans to its noisy half, where more is decided


@dataclass(eq=False)
class _Job:
    """A planned simulation: its prompt's row, its new nodes (one per level from `start` on), and its noise."""

    row: int
    nodes: range
    start: int
    parent: int
    path: tuple[int, ...]
    streams: RandomStreams
    generator: torch.Generator | None = field(default=None, repr=False)

    def noise(self, shape: Sequence[int], level: int) -> Tensor:
        """Noise of the step that leaves `level`; that of a starting noise k is candidate k's of every other sampler."""
        if self.start == 0:
            return self.streams.normal(self.row, shape, "step", self.path[0], level, 0)
        if self.generator is None:
            self.generator = self.streams.generator(self.row, "tree", *self.path)
        return torch.randn(tuple(shape), generator=self.generator)


class Growth:
    """One run: plans simulations, carries them out level by level, and keeps the books."""

    def __init__(self, problem: Problem, config: "TreeSampler") -> None:
        self.problem, self.config = problem, config
        self.schedule = problem.denoiser.schedule
        self.steps = self.schedule.steps
        self.stds = [_std(config.transition, self.schedule, level) for level in range(self.steps)]
        self.rules = Widening(config.widening, config.exponent, config.branching)
        self.judging = problem.reward is not None or problem.value is not None
        self.estimate: Tensor | None = None
        self.spread = 1.0
        self.spent = [(0.0, 0)] * problem.count  # denoiser evaluations and reward calls of each row
        self.per_level = 0.0
        self.forest = Forest.planted(problem.count, self.random)
        self.first = problem.initial(0)
        self.table: list[Any] = [None] * problem.count

    @property
    def random(self) -> list[bool]:
        """Whether a child of a state at each level, from the root above level 0 on, is drawn at random."""
        return [True, *(std > 0 for std in self.stds)]

    # --- the run ---

    def run(self) -> None:
        """Grow the trees to the size asked for, or to what the budget reaches for."""
        file = None if self.config.tree_file is None else TreeFile(self)
        if file is not None:
            self._resume(file)
        try:
            active = list(range(self.problem.count))
            while active:
                active = self._batch(active)
                if file is not None:
                    file.save(self.forest, at_once=False)
        finally:
            if file is not None:
                file.save(self.forest)

    def _resume(self, file: TreeFile) -> None:
        """Continue the trees of a file, if it is there; proving that they are this run's counts for every row."""
        forest = file.load()
        if forest is None:
            return
        self.forest = forest
        self.estimate, evaluations, calls = file.prove(forest)
        self.spent = [(e + evaluations, c + calls) for e, c in self.spent]

    def _batch(self, active: list[int]) -> list[int]:
        """Complete one batch of simulations for some rows; returns the rows that go on."""
        forest, before = self.forest, [len(t.leaves) for t in self.forest.trees]
        waves: list[list[_Job]] = []
        try:
            going = [row for row in active if self._plan(row, waves)]
            jobs = [job for wave in waves for job in wave]
            scores: list[float] = []
            size = max(self.config.batch_rows, len(waves[0]) if waves and not any(before) else 1)
            for start in range(0, len(jobs), size):
                scores += self._sweep(jobs[start : start + size])
        except BaseException as error:
            self._forget(before)
            if isinstance(error, KeyboardInterrupt):
                self.problem.ledger.stop("interrupted")
                raise Interrupted from error
            raise
        for job, score in zip(jobs, scores, strict=True):
            forest.rewards[job.row].append(score)
        try:
            for job, score in zip(jobs, scores, strict=True):
                forest.trees[job.row].complete(job.nodes[-1], score / self.config.temperature)
            for row in active:
                self._prune(row)
        except KeyboardInterrupt as error:
            for tree, rewards in zip(forest.trees, forest.rewards, strict=True):
                tree.recompute([r / self.config.temperature for r in rewards])
            self.problem.ledger.stop("interrupted")
            raise Interrupted from error
        return going

    def _plan(self, row: int, waves: list[list[_Job]]) -> bool:
        """Plan the rest of a row's batch (the first simulation makes a batch of its own); False if the row ends with it."""
        config, tree = self.config, self.forest.trees[row]
        if config.satisfied(self.forest.rewards[row]):
            return False
        done = len(tree.leaves)
        phase = (done - 1) % config.batch if done else 0
        self.spread = spread(self.forest.rewards[row][: done - phase])
        hidden = tree.leaves[done - phase :]
        weights = [tree.value[leaf] for leaf in hidden]
        for leaf in hidden:  # a batch that was cut short goes on as if its rewards were not in yet
            tree.hide(leaf)
        goes_on = True
        for slot in range(1 if done == 0 else config.batch - phase):
            number = done + slot
            if number >= config.simulations or not (first := self._try(row, tree, number)):
                goes_on = False
                break
            parent = tree.parent[first]
            job = _Job(row, tree.chain(first), tree.level[first], parent, tree.path(first), self.problem.streams)
            if slot == len(waves):
                waves.append([])
            waves[slot].append(job)
        for leaf, weight in zip(hidden, weights, strict=True):
            tree.complete(leaf, weight)
        return goes_on and done + slot + 1 < config.simulations

    def _try(self, row: int, tree: Tree, number: int) -> int | None:
        """Plan one simulation, if the tree has room and the row's budget reaches for it."""
        problem = self.problem
        generator: torch.Generator | None = None

        def draw() -> float:
            nonlocal generator
            generator = generator or problem.streams.generator(row, "tree", "select", number)
            return float(torch.rand((), generator=generator, dtype=torch.float64))

        first = self.config.plan(self, row, number, draw)
        if first is None:
            return None
        level, value, budget = tree.level[first], problem.value, problem.ledger.budget
        self.per_level = max(self.per_level, problem.denoiser.evaluations_per_row)
        priors = sum(map(self._has_prior, range(level, self.steps))) if number else 0
        calls = problem.final_calls + (0 if value is None else priors * value.reward_calls_per_row)
        evaluations, total = self.spent[row]
        evaluations += (self.steps - level) * self.per_level + problem.final_cost + priors * problem.value_cost
        total += calls
        caps = (
            (budget.evaluations, evaluations),
            (budget.reward_calls, total),
            (budget.decodes, total + 1 if calls else 0),
        )
        if number and not all(cap is None or need <= cap + 1e-6 for cap, need in caps):
            problem.ledger.stop("budget")
            tree.undo(self.rules)
            return None
        self.spent[row] = (evaluations, total)
        return first

    def restart(self, row: int, number: int, caution: float, fresh: float, defence: float) -> int:
        """Plan simulation `number` of a row as a restart: anew, or at a branch node of an earlier one."""
        config, tree, streams = self.config, self.forest.trees[row], self.problem.streams
        full = config.stored_nodes is not None and number >= config.stored_nodes
        place = None if full else streams.uniform(row, "tree", "branch", number) ** _EARLY
        if number == 0 or math.floor((number + 1) * fresh) > math.floor(number * fresh):
            return tree.plan_at(0, 0.0, place)
        index, slot = divmod(number - 1, config.batch)
        if self.table[row] is None or self.table[row][0] != index:
            self.table[row] = (index, *tree.restarts(caution, config.prior_weight, defence))
        _, nodes, chances, logs = self.table[row]
        u = (streams.uniform(row, "tree", "restart", index) + slot / config.batch) % 1.0
        cumulative = torch.tensor(chances, dtype=torch.float64).cumsum(0)
        i = min(int(torch.searchsorted(cumulative / cumulative[-1], u, right=True)), len(chances) - 1)
        return tree.plan_at(nodes[i], logs[i], place)

    def _has_prior(self, level: int) -> bool:
        """Whether states at a level are judged: they are random, and not clean."""
        return self.config.prior == "value" and 0 < level < self.steps and self.stds[level - 1] > 0

    def _forget(self, before: list[int]) -> None:
        """Take back what was planned and not completed."""
        for row, tree in enumerate(self.forest.trees):
            while len(tree.leaves) > before[row]:
                tree.undo(self.rules)
            for store in (self.forest.means[row], self.forest.clean[row]):
                for node in [n for n in store if n >= len(tree)]:
                    del store[node]

    def _prune(self, row: int) -> None:
        """Seal the unlikeliest nodes of a row when more are stored than allowed, at the end of whole batches."""
        tree, means, cap = self.forest.trees[row], self.forest.means[row], self.config.stored_nodes
        for node in [n for n in means if tree.closed[n]]:
            del means[node]
        if self.config.greedy:
            best = tree.leaves[max(range(len(tree.leaves)), key=self.forest.rewards[row].__getitem__)]
            self.forest.clean[row] = {best: self.forest.clean[row][best]}
        done = len(tree.leaves)
        if cap is None or len(means) <= cap or (done - 1) % self.config.batch:
            return
        kept = set(tree.keep(list(means), cap))
        for node in [n for n in means if n not in kept]:
            del means[node]
            tree.expandable[node] = False
        tree.refresh(self.rules)

    # --- rollouts ---

    @torch.no_grad()
    def _sweep(self, jobs: list[_Job]) -> list[float]:
        """Carry out simulations level by level, each from where it leaves its tree; their rewards in order (0 unjudged)."""
        problem, denoiser = self.problem, self.problem.denoiser
        active: list[_Job] = []
        x: Tensor | None = None
        first = jobs[0].start == 0 and jobs[0].path[0] == 0  # unguided, within any budget: no priors
        check_deadline(problem)
        with interruptible(problem):
            for level in range(min(job.start for job in jobs), self.steps + 1):
                joining = [job for job in jobs if job.start == level]
                if joining:
                    fresh = self._enter(joining, level)
                    x = fresh if x is None else torch.cat([x, fresh.to(x)])
                    active += joining
                assert x is not None
                rows = torch.tensor([job.row for job in active])
                known: Prediction | None = None
                if self._has_prior(level) and not first:
                    said, known = problem.scored(x, level, rows)
                    said = said / self.config.temperature
                    for job, prior in zip(active, said.tolist(), strict=True):
                        self.forest.trees[job.row].prior[job.nodes[level - job.start]] = prior
                if level == self.steps:
                    break
                if level:
                    check_deadline(problem)
                prediction = known or denoiser.predict(x, level, rows)
                self.per_level = max(self.per_level, denoiser.evaluations_per_row)
                gaussian = self.config.transition(prediction, self.schedule, level, level + 1)
                self._store(active, gaussian, level)
                x = gaussian.mean
                if gaussian.std > 0:
                    x = gaussian.sample(torch.stack([job.noise(x.shape[1:], level) for job in active]))
                self._report(active, prediction, level)
            assert x is not None
            scores = problem.final_rewards(x, rows)
        order = {id(job): place for place, job in enumerate(active)}
        result = []
        for job in jobs:
            place = order[id(job)]
            result.append(0.0 if scores is None else float(scores[place]))
            self.forest.clean[job.row][job.nodes[-1]] = x[place].cpu()
        return result

    def _enter(self, joining: list[_Job], level: int) -> Tensor:
        """First new states [R, ...] of simulations: starting noises, or draws from a stored transition."""
        if level == 0:
            numbers = {job.path[0] for job in joining}
            starts = {k: self.problem.initial(k) if k else self.first for k in sorted(numbers)}
            if len(numbers) == 1 and [job.row for job in joining] == list(range(self.problem.count)):
                return starts[numbers.pop()]
            return torch.stack([starts[job.path[0]][job.row] for job in joining])
        means = torch.stack([self.forest.means[job.row][job.parent] for job in joining]).to(self.first)
        noise = torch.stack([job.noise(means.shape[1:], level - 1) for job in joining])
        return Gaussian(means, self.stds[level - 1]).sample(noise)

    def _store(self, active: list[_Job], gaussian: Gaussian, level: int) -> None:
        """Keep the transitions of nodes that may get more children."""
        if level == 0 and self.forest.probe is None:
            self.forest.probe = gaussian.mean[: self.problem.count].cpu().clone()
        if gaussian.std == 0 or self.config.branching == 1:
            return
        dtype = None if self.config.node_dtype is None else DTYPES[self.config.node_dtype]
        means = gaussian.mean.detach().to("cpu", dtype)
        for job, mean in zip(active, means.unbind(), strict=True):
            node = job.nodes[level - job.start]
            if self.forest.trees[job.row].expandable[node]:
                self.forest.means[job.row][node] = mean.clone()  # a view would keep the whole batch alive

    def _report(self, active: list[_Job], prediction: Prediction, level: int) -> None:
        """Tell the caller; x0 is the latest estimate of each row."""
        if self.estimate is None or all(not clean for clean in self.forest.clean):
            self.estimate = prediction.x0
        elif self.problem.progress is not None:
            self.estimate = self.estimate.clone()
            self.estimate[torch.tensor([job.row for job in active])] = prediction.x0
        self.problem.report(level, self.estimate)

    # --- the end ---

    def close(self, chosen: list[int], trace: dict[str, Any]) -> SamplerOutput:
        """The output for a leaf per row, given by its simulation, with the trees in the trace."""
        forest = self.forest
        leaves = [tree.leaves[c] for tree, c in zip(forest.trees, chosen, strict=True)]
        latents = torch.stack([forest.clean[row][leaf] for row, leaf in enumerate(leaves)]).to(self.first.device)
        trace["tree"] = [
            {
                "parent": tree.parent,
                "level": tree.level,
                "value": [v if math.isfinite(v) else None for v in tree.value] if self.judging else None,
                "visits": tree.visits,
                "leaves": tree.leaves,
                "chosen": leaf,
            }
            for tree, leaf in zip(forest.trees, leaves, strict=True)
        ]
        if not self.judging:
            return finished(self.problem, latents, trace)
        trace["candidates"] = {"rewards": forest.rewards, "chosen": chosen}
        rewards = torch.tensor([r[c] for r, c in zip(forest.rewards, chosen, strict=True)], dtype=torch.float64)
        return finished(self.problem, latents, trace, rewards)


def _std(transition: Transition, schedule: NoiseSchedule, level: int) -> float:
    """Standard deviation of a transition, which does not depend on the state."""
    zero = torch.zeros(1, 1)
    return transition(Prediction(zero, zero, zero, zero), schedule, level, level + 1).std

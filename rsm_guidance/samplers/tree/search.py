"""How the trees of `tree-sampling` and `tree-search` grow: simulations are planned, run in batches, and completed.

Up to `batch` simulations of every prompt are planned before their rewards are known and run together, level by level; a
node's transition is computed once and serves all its children.
"""

import itertools
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from rsm_guidance.core.random import Purpose, RandomStreams
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.core.transitions import Gaussian, GaussianTransition, exact
from rsm_guidance.samplers.kernel import Info, Particles, Result
from rsm_guidance.samplers.task import Task
from rsm_guidance.samplers.tree.file import TreeFile, spread
from rsm_guidance.samplers.tree.selection import Draw, Widening
from rsm_guidance.samplers.tree.store import Forest
from rsm_guidance.samplers.tree.tree import Tree

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_EARLY = 4  # u^4 of a uniform u: where restarts leave a path leans to its noisy half, where more is decided


class Method(Protocol):
    """What decides how trees grow; see `methods.TreeSampler`."""

    @property
    def greedy(self) -> bool: ...

    @property
    def simulations(self) -> int: ...

    @property
    def temperature(self) -> float: ...

    @property
    def widening(self) -> float: ...

    @property
    def exponent(self) -> float: ...

    @property
    def branching(self) -> int | None: ...

    @property
    def batch(self) -> int: ...

    @property
    def prior(self) -> str: ...

    @property
    def transition(self) -> GaussianTransition: ...

    @property
    def batch_rows(self) -> int: ...

    @property
    def node_dtype(self) -> str | None: ...

    @property
    def stored_nodes(self) -> int | None: ...

    @property
    def prior_weight(self) -> float: ...

    def plan(self, growth: "Growth", row: int, number: int, draw: Draw) -> int | None:
        """Plan simulation `number` of a row; its first new node, None if the tree is closed."""
        ...

    def satisfied(self, rewards: list[float]) -> bool:
        """Whether a prompt needs no more simulations, by the rewards of its leaves."""
        ...


@dataclass(eq=False)
class _Job:
    """A planned simulation: its prompt's row, its new nodes (one per level from `start` on), and its noise."""

    row: int
    nodes: range
    start: int
    parent: int
    path: tuple[int, ...]
    streams: RandomStreams

    def noise(self, shape: Sequence[int], level: int) -> Tensor:
        """Noise of the step that leaves `level`; that of a starting noise k is candidate k's of every other sampler."""
        if self.start == 0:
            return self.streams.normal(self.row, shape, Purpose.STEP, self.path[0], level, 0)
        return self.streams.normal(self.row, shape, Purpose.TREE, *self.path, level)


class Growth:
    """One run: plans simulations, carries them out level by level, and keeps the books."""

    def __init__(self, task: Task, config: Method) -> None:
        self.task, self.config = task, config
        self.schedule = task.schedule
        self.steps = self.schedule.steps
        transition: GaussianTransition = config.transition
        self.stds = [transition.std(self.schedule, level, level + 1) for level in range(self.steps)]
        self.rules = Widening(config.widening, config.exponent, config.branching)
        self.scoring = task.can_score
        self.spread = 1.0
        self.spent = [(0.0, 0)] * task.count  # denoiser evaluations and reward calls of each row
        self.per_level = 0.0
        self.forest = Forest.planted(task.count, self.random)
        self.first = task.initial(0)
        self.estimate = self.first
        self.table: list[Any] = [None] * task.count

    @property
    def random(self) -> list[bool]:
        """Whether a child of a state at each level, from the root above level 0 on, is drawn at random."""
        return [True, *(std > 0 for std in self.stds)]

    # --- the run ---

    def run(self, file: TreeFile | None, conclude: Callable[[], Result]) -> Iterator[Info]:
        """Grow the trees to the size asked for, or to what the budget pays for; `conclude` gives the result so far."""
        if file is not None:
            self._resume(file)
        try:
            active = list(range(self.task.count))
            while active:
                finished = all(self.forest.clean)
                for info in self._batch(active):
                    yield Info(info.level, info.x0, so_far=conclude if finished else None)
                active = self.going
                if file is not None:
                    file.save(self.forest, at_once=False)
                yield Info(self.steps, self.estimate, so_far=conclude, silent=True)
        finally:
            if file is not None:
                file.save(self.forest)

    def _resume(self, file: TreeFile) -> None:
        """Continue the trees of a file, if it is there; proving that they are this run's counts for every row."""
        forest = file.load(self.random, self.rules, self.config.temperature)
        if forest is None:
            return
        self.forest = forest
        self.estimate, evaluations, calls = file.prove(forest, self.config.transition)
        self.spent = [(e + evaluations, c + calls) for e, c in self.spent]

    def _batch(self, active: list[int]) -> Iterator[Info]:
        """Complete one batch of simulations for some rows; `going` has the rows that go on."""
        forest, before = self.forest, [len(t.leaves) for t in self.forest.trees]
        waves: list[list[_Job]] = []
        completed = False
        try:
            self.going = [row for row in active if self._plan(row, waves)]
            jobs = [job for wave in waves for job in wave]
            scores: list[float] = []
            size = max(self.config.batch_rows, len(waves[0]) if waves and not any(before) else 1)
            for start in range(0, len(jobs), size):
                scores += yield from self._sweep(jobs[start : start + size])
            for job, score in zip(jobs, scores, strict=True):
                forest.rewards[job.row].append(score)
            completed = True
            for job, score in zip(jobs, scores, strict=True):
                forest.trees[job.row].complete(job.nodes[-1], score / self.config.temperature)
            for row in active:
                self._prune(row)
        except BaseException:
            if completed:
                for tree, rewards in zip(forest.trees, forest.rewards, strict=True):
                    tree.recompute([r / self.config.temperature for r in rewards])
            else:
                self._forget(before)
            raise

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
            job = _Job(row, tree.chain(first), tree.level[first], parent, tree.path(first), self.task.streams)
            if slot == len(waves):
                waves.append([])
            waves[slot].append(job)
        for leaf, weight in zip(hidden, weights, strict=True):
            tree.complete(leaf, weight)
        return goes_on and done + slot + 1 < config.simulations

    def _try(self, row: int, tree: Tree, number: int) -> int | None:
        """Plan one simulation, if the tree has room and the row's budget reaches for it."""
        task = self.task
        drawn = itertools.count()

        def draw() -> float:
            return task.streams.uniform(row, Purpose.TREE, Purpose.SELECT, number, next(drawn))

        first = self.config.plan(self, row, number, draw)
        if first is None:
            return None
        level, value, budget = tree.level[first], task.value, task.ledger.budget
        self.per_level = max(self.per_level, task.denoiser.evaluations_per_row)
        priors = sum(map(self._has_prior, range(level, self.steps))) if number else 0
        calls = task.final_calls + (0 if value is None else priors * value.reward_calls_per_row)
        evaluations, total = self.spent[row]
        evaluations += (self.steps - level) * self.per_level + task.final_cost
        evaluations += priors * task.value_cost() if priors else 0.0
        total += calls
        caps = (
            (budget.evaluations, evaluations),
            (budget.reward_calls, total),
            (budget.decodes, total + 1 if calls else 0),
        )
        if number and not all(cap is None or need <= cap + 1e-6 for cap, need in caps):
            task.ledger.stop("budget")
            tree.undo(self.rules)
            return None
        self.spent[row] = (evaluations, total)
        return first

    def restart(self, row: int, number: int, caution: float, fresh: float, defence: float) -> int:
        """Plan simulation `number` of a row as a restart: anew, or at a branch node of an earlier one."""
        config, tree, streams = self.config, self.forest.trees[row], self.task.streams
        full = config.stored_nodes is not None and number >= config.stored_nodes
        place = None if full else streams.uniform(row, Purpose.TREE, Purpose.BRANCH, number) ** _EARLY
        if number == 0 or math.floor((number + 1) * fresh) > math.floor(number * fresh):
            return tree.plan_at(0, 0.0, place)
        index, slot = divmod(number - 1, config.batch)
        if self.table[row] is None or self.table[row][0] != index:
            self.table[row] = (index, *tree.restarts(caution, config.prior_weight, defence))
        _, nodes, chances, logs = self.table[row]
        u = (streams.uniform(row, Purpose.TREE, "restart", index) + slot / config.batch) % 1.0
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

    def _sweep(self, jobs: list[_Job]) -> Generator[Info, None, list[float]]:
        """Carry out simulations level by level, each from where it leaves its tree; their rewards in order (0 without)."""
        task = self.task
        active: list[_Job] = []
        x: Tensor | None = None
        first = jobs[0].start == 0 and jobs[0].path[0] == 0  # unguided, within any budget: no priors
        for level in range(min(job.start for job in jobs), self.steps + 1):
            joining = [job for job in jobs if job.start == level]
            if joining:
                fresh = self._enter(joining, level)
                x = fresh if x is None else torch.cat([x, fresh.to(x)])
                active += joining
            assert x is not None
            rows = torch.tensor([job.row for job in active])
            known = self._priors(active, x, level, rows) if self._has_prior(level) and not first else None
            if level == self.steps:
                break
            with torch.no_grad():
                prediction = known or task.predict(x, level, rows)
            self.per_level = max(self.per_level, task.denoiser.evaluations_per_row)
            gaussian: Gaussian = self.config.transition(prediction, self.schedule, level, level + 1)
            self._store(active, gaussian, level)
            noise = torch.zeros(1)
            if gaussian.std > 0:
                noise = torch.stack([job.noise(x.shape[1:], level) for job in active])
            x = gaussian.sample(noise)
            yield self._seen(active, prediction, level)
        assert x is not None
        with torch.no_grad():
            scores = task.final_scores(x, rows)
        order = {id(job): place for place, job in enumerate(active)}
        result = []
        for job in jobs:
            place = order[id(job)]
            result.append(0.0 if scores is None else float(scores[place]))
            self.forest.clean[job.row][job.nodes[-1]] = x[place].cpu()
        return result

    def _priors(self, active: list[_Job], x: Tensor, level: int, rows: Tensor) -> Prediction | None:
        """Note what the value says of new states [R, ...]; returns the prediction if it was read."""
        with torch.no_grad():
            values, known = self.task.score(x, level, rows)
        for job, prior in zip(active, (values / self.config.temperature).tolist(), strict=True):
            self.forest.trees[job.row].prior[job.nodes[level - job.start]] = prior
        return known

    def _enter(self, joining: list[_Job], level: int) -> Tensor:
        """First new states [R, ...] of simulations: starting noises, or draws from a stored transition."""
        if level == 0:
            numbers = {job.path[0] for job in joining}
            starts = {k: self.task.initial(k) if k else self.first for k in sorted(numbers)}
            if len(numbers) == 1 and [job.row for job in joining] == list(range(self.task.count)):
                return starts[numbers.pop()]
            return torch.stack([starts[job.path[0]][job.row] for job in joining])
        means = torch.stack([self.forest.means[job.row][job.parent] for job in joining]).to(self.first.device)
        noise = torch.stack([job.noise(means.shape[1:], level - 1) for job in joining])
        return Gaussian(exact(means), self.stds[level - 1], self.first.dtype).sample(noise)

    def _store(self, active: list[_Job], gaussian: Gaussian, level: int) -> None:
        """Keep the transitions of nodes that may get more children."""
        if level == 0 and self.forest.probe is None:
            self.forest.probe = gaussian.mean[: self.task.count].cpu().clone()
        if gaussian.std == 0 or self.config.branching == 1:
            return
        dtype = None if self.config.node_dtype is None else DTYPES[self.config.node_dtype]
        means = gaussian.mean.detach().to("cpu", dtype)
        for job, mean in zip(active, means.unbind(), strict=True):
            node = job.nodes[level - job.start]
            if self.forest.trees[job.row].expandable[node]:
                self.forest.means[job.row][node] = mean.clone()  # a view would keep the whole batch alive

    def _seen(self, active: list[_Job], prediction: Prediction, level: int) -> Info:
        """What a level saw; x0 is the latest estimate of each row."""
        if len(prediction.x0) == self.task.count and not all(self.forest.clean):
            self.estimate = prediction.x0
        elif self.task.progress is not None:
            self.estimate = self.estimate.clone()
            self.estimate[torch.tensor([job.row for job in active])] = prediction.x0
        return Info(level, self.estimate)

    # --- the end ---

    def close(
        self,
        chosen: list[int],
        log_weights: list[Tensor] | None = None,
        normalizers: Tensor | None = None,
    ) -> Result:
        """The result for a leaf per row, given by its simulation, with the trees for the trace.

        `log_weights` are those of all leaves of each row, `normalizers` [B] the estimates of log Z.
        """
        forest = self.forest
        leaves = [tree.leaves[c] for tree, c in zip(forest.trees, chosen, strict=True)]
        latents = torch.stack([forest.clean[row][leaf] for row, leaf in enumerate(leaves)]).to(self.first.device)
        trees = [
            {
                "parent": tree.parent,
                "level": tree.level,
                "value": [v if math.isfinite(v) else None for v in tree.value] if self.scoring else None,
                "visits": tree.visits,
                "leaves": tree.leaves,
                "chosen": leaf,
            }
            for tree, leaf in zip(forest.trees, leaves, strict=True)
        ]
        if not self.scoring:
            return Result(latents, sections={"tree": trees})
        candidates: dict[str, Any] = {"rewards": forest.rewards, "chosen": chosen}
        scores = [torch.tensor(r, dtype=torch.float64) for r in forest.rewards]
        particles = None
        if log_weights is not None:
            candidates["log_weights"] = [w.tolist() for w in log_weights]
            finished = [torch.stack([forest.clean[b][leaf] for leaf in t.leaves]) for b, t in enumerate(forest.trees)]
            particles = [Particles(*each) for each in zip(finished, scores, log_weights, strict=True)]
        rewards = torch.stack([r[c] for r, c in zip(scores, chosen, strict=True)])
        return Result(latents, rewards, normalizers, particles, {"tree": trees, "candidates": candidates})

"""Tree search over denoising trajectories: DTS (`tree-sampling`) and DTS* (`tree-search`), arXiv 2506.20701.

Every simulation descends a tree of states from a dummy root above x_T, leaves it by a new draw from p(x' | x), and runs on
to a clean image, whose true reward is backed up; all states on the way join the tree (`core/tree.py` has the formulas).

- Select: DTS takes a child with probability proportional to exp(V), DTS* the one of highest
  V + c sqrt(log N(parent) / N(child)).  Widen: while a node of N visits has fewer than C N^alpha children, add one.
- Back up: V(x_t) = lambda log mean over the children of exp(V(x_{t-1}) / lambda), the soft Bellman equation.
- Return: DTS a leaf by descending from the root in proportion to exp(V), a sample of p(x) exp(r(x) / lambda) / Z;
  exp(V(root)) estimates Z.  DTS* the best leaf.

Notation: our `temperature` is lambda (the paper's lambda is its inverse); level 0 is x_T, level N is x_0.

Ours.  DTS as published has a large bias at finite budgets, which persists: a child whose first rollout was unlucky is
hardly ever visited again and keeps its low value, while a lucky one is averaged down.  `selection` "boltzmann" and
"proportional" (the child whose visits lag most behind) keep it, lessened by `caution`, a standard error on top of values.
The guard is "restarts", the default: simulations start anew, a fixed share of them, or at a branch node of an earlier one
drawn with a chance P_j that follows the values, and weigh w_j / (m P_j), so that weighted leaves are samples of p, whatever
the tree looks like: exp(log_normalizer) is unbiased for Z at every number of simulations, and all weights are positive and bounded
(`Tree.restarts`).  What is returned is drawn by weight times exp(r / lambda).

`samplers/growth.py` says how simulations run together: `batch` changes which tree grows, the other prompts of a call do
not.  The first simulation is the unguided run of the same seed.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from rsm_guidance.core.random import Purpose
from rsm_guidance.core.transitions import CPS, DDIM, GaussianTransition, require_gaussian
from rsm_guidance.core.weights import choose
from rsm_guidance.samplers import kernel
from rsm_guidance.samplers.kernel import Result, Sampler, Solution
from rsm_guidance.samplers.task import Task
from rsm_guidance.samplers.tree.file import TreeFile
from rsm_guidance.samplers.tree.search import DTYPES, Growth
from rsm_guidance.samplers.tree.selection import Boltzmann, Draw, Proportional, UpperConfidence


@dataclass(frozen=True)
class TreeSampler(Sampler):
    """What both samplers share; see `TreeSampling`."""

    budget_field: ClassVar[str | None] = "simulations"
    adaptive: ClassVar[bool] = True
    greedy: ClassVar[bool] = False
    simulations: int = 32
    temperature: float = 1.0
    widening: float = 1.0
    exponent: float = 0.5
    branching: int | None = None
    batch: int = 8
    prior: Literal["none", "value"] = "none"
    prior_visits: float = 1.0
    transition: GaussianTransition = CPS(0.9)
    batch_rows: int = 64
    node_dtype: Literal["float32", "float16", "bfloat16"] | None = None
    stored_nodes: int | None = None
    tree_file: str | None = None

    def __post_init__(self) -> None:
        for name in ("simulations", "batch", "batch_rows", "branching", "stored_nodes"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        kernel.finite(self, "temperature", "widening", "prior_visits", positive=True)
        if not 0 <= self.exponent <= 1:
            raise ValueError(f"exponent must lie in [0, 1]; got {self.exponent}")
        kernel.one_of(self, prior=("none", "value"))
        if self.node_dtype is not None and self.node_dtype not in DTYPES:
            raise ValueError(f"node_dtype must be one of {', '.join(DTYPES)}, or None; got {self.node_dtype!r}")
        require_gaussian(self.transition, "a tree branches between single levels")

    def check(self, task: Task) -> None:
        if self.simulations > 1:
            kernel.require(self, task)
        if self.prior == "value" and task.value is None:
            raise ValueError("prior='value' needs a value of noisy latents: pass a diffusion reward model, or a reward")

    def solve(self, task: Task) -> Solution:
        """Cost per image: simulations times the levels below their branching point, and a final score for each.

        Stops at the first simulation that the budget does not pay for.  When a run is cut off, a batch under way is forgotten.
        """
        file = None if self.tree_file is None else TreeFile(Path(self.tree_file), task, self.settings())
        growth = Growth(task, self)
        yield from growth.run(file, lambda: self.conclude(growth))
        return self.conclude(growth)

    @property
    def prior_weight(self) -> float:
        """How many rollouts a node's prior counts for in selection."""
        return self.prior_visits if self.prior == "value" else 0.0

    @abstractmethod
    def plan(self, growth: Growth, row: int, number: int, draw: Draw) -> int | None:
        """Plan simulation `number` of a row; returns its first new node, None if the tree is closed."""

    def satisfied(self, rewards: list[float]) -> bool:
        """Whether a prompt needs no more simulations, by the rewards of its leaves."""
        return False

    @abstractmethod
    def conclude(self, growth: Growth) -> Result:
        """Which leaf of each row is returned."""

    def settings(self) -> dict[str, Any]:
        """What decides how a tree grows; a file is continued only under the same."""
        free = ("simulations", "accept", "tree_file", "batch_rows")
        return {k: v for k, v in self.described().items() if k not in free}


@dataclass(frozen=True)
class TreeSampling(TreeSampler):
    """DTS: samples of the tilted posterior.

    Attributes:
        simulations: rollouts per prompt, >= 1; those in `tree_file` count.
        temperature: lambda > 0 of the target p(x0) exp(r(x0) / lambda).
        widening, exponent: C > 0 and alpha in [0, 1] of progressive widening; C = alpha = 1 only starts anew.
        branching: most children of a node; None leaves it to progressive widening.
        batch: simulations per prompt that run together, after the first, which runs alone.
        prior: "value" lets the value model's word on a new node count as `prior_visits` rollouts in selection, not in the
            estimate; one value evaluation per new node, but for the first simulation's.
        prior_visits: > 0.
        transition: how to step; a stochastic one, or only starting noises differ.
        batch_rows: how many latents one denoiser call takes at most.
        node_dtype: in which the means of nodes are stored; None keeps theirs.  Finished latents keep theirs.
        stored_nodes: means kept per prompt on the CPU, None for all; beyond, the unlikeliest nodes are sealed (with
            restarts: later simulations get no branch node of their own).
        tree_file: safetensors file in which the trees are kept, and from which they are continued if it exists; written
            every half minute and at the end, also of a run that fails or is stopped.
        selection: "restarts" (ours, unbiased; widening does not apply), "boltzmann" (the paper's) or "proportional".
        caution: >= 0; pseudo-visits of the mean in a branch node's value, or the weight of the standard error; 0 with
            "boltzmann" is the paper's.
        fresh: share in [0, 1] of simulations that start anew, for restarts; 1 is importance sampling.
        defence: share in (0, 1] of restarts that ignore the values; bounds the weights by 1 / defence of their mean.
    """

    name: ClassVar[str] = "tree-sampling"
    selection: Literal["restarts", "proportional", "boltzmann"] = "restarts"
    transition: GaussianTransition = DDIM(1.0)
    caution: float = 0.5
    fresh: float = 0.5
    defence: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.selection not in ("restarts", "proportional", "boltzmann"):
            raise ValueError(f"selection must be 'restarts', 'proportional' or 'boltzmann'; got {self.selection!r}")
        if not 0 <= self.caution < math.inf:
            raise ValueError(f"caution must be at least 0 and finite; got {self.caution}")
        if not 0 <= self.fresh <= 1:
            raise ValueError(f"fresh must lie in [0, 1]; got {self.fresh}")
        if not 0 < self.defence <= 1:
            raise ValueError(f"defence must lie in (0, 1], or weights are unbounded; got {self.defence}")
        if self.selection == "restarts" and self.branching is not None:
            raise ValueError("restarts have no widening to limit: leave branching out, or choose another selection")

    @property
    def target(self) -> str:
        return kernel.tilted_law(self.transition)

    def plan(self, growth: Growth, row: int, number: int, draw: Draw) -> int | None:
        if self.selection == "restarts":
            return growth.restart(row, number, self.caution, self.fresh, self.defence)
        rule = Boltzmann(self.caution) if self.selection == "boltzmann" else Proportional(self.caution)
        return growth.forest.trees[row].plan(rule, growth.rules, draw, self.prior_weight)

    def conclude(self, growth: Growth) -> Result:
        task, forest = growth.task, growth.forest
        restarts = self.selection == "restarts"
        weights = [torch.tensor(t.log_weights(restarts), dtype=torch.float64) for t in forest.trees]
        draws = [torch.tensor(task.streams.uniform(r, Purpose.DRAW), dtype=torch.float64) for r in range(task.count)]
        chosen = [int(choose(w, u)) if len(w) > 1 else 0 for w, u in zip(weights, draws, strict=True)]
        if not task.can_score:
            return growth.close(chosen)
        normalizers = torch.tensor([t.log_normalizer(restarts) for t in forest.trees], dtype=torch.float64)
        return growth.close(chosen, weights, normalizers)


@dataclass(frozen=True)
class TreeSearch(TreeSampler):
    """DTS*: the best leaf.  Greedy.

    Attributes: those of `TreeSampling`, where `temperature` is that of the backup alone, and
        exploration: c >= 0 of the upper confidence bound, in units of the spread (standard deviation) of the leaves' rewards.
        accept: reward of a leaf with which a prompt is done, when its batch is; None makes all simulations.
    """

    name: ClassVar[str] = "tree-search"
    greedy: ClassVar[bool] = True
    batch: int = 4
    exploration: float = 1.0
    accept: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.exploration < math.inf:
            raise ValueError(f"exploration must be at least 0 and finite; got {self.exploration}")
        if self.accept is not None and not math.isfinite(self.accept):
            raise ValueError(f"accept must be finite; got {self.accept}")

    def satisfied(self, rewards: list[float]) -> bool:
        return self.accept is not None and max(rewards, default=-math.inf) >= self.accept

    def plan(self, growth: Growth, row: int, number: int, draw: Draw) -> int | None:
        rule = UpperConfidence(self.exploration, lambda: growth.spread / self.temperature)
        return growth.forest.trees[row].plan(rule, growth.rules, draw, self.prior_weight)

    def conclude(self, growth: Growth) -> Result:
        return growth.close([max(range(len(r)), key=r.__getitem__) for r in growth.forest.rewards])

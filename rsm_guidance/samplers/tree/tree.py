"""Trees over the levels of a denoising run: simulations, soft-Bellman backup, restarts.

Node 0 is the root, at level -1; its children are starting noises (level 0), a node at level i is a state x_i, a leaf at
level N is clean.  Every child is an independent draw from the model's own transition, whatever made the search want it.
With leaf weights w = r / lambda the value of a node is an estimate of log E[exp(r(x0) / lambda) | x_i]:

    Z(leaf) = exp(w),    Z(n) = mean of Z(c) over the children c that are known     (log-mean-exp, in the log-domain).

Descending from the root with probability proportional to Z(c) reaches a leaf with probability exp(w) times the product of
1 / (children per node) along its path, over Z(root): `Tree.log_weights` are those importance weights, normalised.

A simulation is *planned* (visits are counted, a chain of new nodes down to a leaf is allotted) and later *completed* with
its leaf's weight.  Those planned and not yet completed are the virtual loss of batched search: their visits count, their
values are unknown, and they may be widened like any other.
"""

import heapq
import math
from collections.abc import Sequence

from rsm_guidance.samplers.tree.selection import Draw, Selection, Widening

_UNBOUNDED = Widening()


def log_mean_exp(values: Sequence[float]) -> float:
    """log of the mean of exp(values), at least one float; -inf where all are -inf (`weights` has that of tensors)."""
    if len(values) == 1:
        return values[0]
    top = max(values)
    if top == -math.inf:
        return top
    return top + math.log(math.fsum(math.exp(v - top) for v in values) / len(values))


class Tree:
    """One tree.

    Args:
        random: for levels -1..N-1, whether a transition from there has more than one outcome [N + 1].

    Attributes (lists over nodes, parents before children):
        parent, level, index: index is the place among the siblings.
        children: ids.
        visits: planned simulations through the node; completed: those whose leaf is known.
        value: log Z, -inf while unknown.
        prior: what a value model says of it (in units of log Z), NaN without.
        expandable: whether it may get more children: it is random, and its transition is known.
        closed: nothing new can be found below.
        leaves: leaf ids in the order of the simulations.
    """

    def __init__(self, random: Sequence[bool]) -> None:
        self.random = list(random)
        self.steps = len(self.random) - 1
        self.parent: list[int] = []
        self.level: list[int] = []
        self.index: list[int] = []
        self.children: list[list[int]] = []
        self.visits: list[int] = []
        self.completed: list[int] = []
        self.value: list[float] = []
        self.prior: list[float] = []
        self.expandable: list[bool] = []
        self.closed: list[bool] = []
        self.leaves: list[int] = []
        self.importance: list[float] = []
        self.branch: list[int] = []
        self._add(-1, -1)

    def __len__(self) -> int:
        return len(self.parent)

    def _add(self, parent: int, level: int) -> int:
        node = len(self.parent)
        self.parent.append(parent)
        self.level.append(level)
        self.index.append(0 if parent < 0 else len(self.children[parent]))
        if parent >= 0:
            self.children[parent].append(node)
        self.children.append([])
        self.visits.append(0)
        self.completed.append(0)
        self.value.append(-math.inf)
        self.prior.append(math.nan)
        self.expandable.append(level < self.steps and self.random[level + 1])
        self.closed.append(level == self.steps)
        return node

    # --- one simulation ---

    def plan(self, selection: Selection, widening: Widening, draw: Draw, prior_visits: float = 0.0) -> int | None:
        """Descend, count the visit and allot a chain of new nodes; returns the first of them, None if the tree is closed.

        Its chain has the ids that follow, one per level, down to the leaf.  `prior_visits` is how many completed visits a
        node's prior counts for in selection.
        """
        if self.closed[0]:
            return None
        node = 0
        while True:
            self.visits[node] += 1
            candidates = [c for c in self.children[node] if not self.closed[c]]
            count = len(self.children[node])
            wide = widening.branching is not None and count >= widening.branching
            if self.expandable[node] and not wide and (count < widening.limit(self.visits[node]) or not candidates):
                self.importance.append(0.0)
                self.branch.append(node)
                return self._grow(node, widening)
            if len(candidates) == 1:
                node = candidates[0]
                continue
            parent = self._selected(node, 0.0, prior_visits)
            values = [self._selected(c, parent, prior_visits) for c in candidates]
            chosen = selection.choose(
                values,
                [self.completed[c] for c in candidates],
                [self.visits[c] for c in candidates],
                parent,
                draw,
            )
            node = candidates[chosen]

    def _selected(self, node: int, unknown: float, prior_visits: float) -> float:
        """The value that selection sees: blended with the prior, or `unknown`."""
        count, prior = self.completed[node], self.prior[node]
        if count == 0:
            return unknown
        if prior_visits == 0 or math.isnan(prior):
            return self.value[node]
        total = math.log(count + prior_visits)
        return log_mean_exp([self.value[node] + math.log(count), prior + math.log(prior_visits)]) + math.log(2) - total

    def plan_at(self, node: int, importance: float, place: float | None) -> int:
        """Plan a simulation that leaves the tree at a node, for restarts; returns the first new node.

        `importance` is its log-weight, and `place` in [0, 1) says which of its states later simulations may start from:
        one of its new ones, of all that are random, with equal chances, else (or for None) the node it comes from.
        Whatever is left out may not depend on rewards, or the weights are wrong.
        """
        above = node
        while above >= 0:
            self.visits[above] += 1
            above = self.parent[above]
        first = self._grow(node, _UNBOUNDED)
        own = [n for n in self.chain(first) if self.expandable[n]]
        chosen = own[int(place * len(own))] if own and place is not None else node
        for other in own:
            self.expandable[other] = other == chosen
        for other in reversed(self.chain(first)):
            self._close(other, _UNBOUNDED)
        self.importance.append(importance)
        self.branch.append(chosen)
        return first

    def restarts(
        self, caution: float, prior_visits: float, defence: float
    ) -> tuple[list[int], list[float], list[float]]:
        """Nodes to start from, the chances with which to draw one, and the log-weight of what is drawn.

        Each completed simulation j of m, weighted by w_j, is a draw from p in the sense that E[w_j f(path)] = E_p[f], and stays
        one when its path is left at the branch node for new draws from p; chosen with chance P_j it then weighs w_j / (m P_j).
        P_j mixes shares 1 - defence of w_j Z_j and `defence` of w_j, so that no weight exceeds their mean by more than
        1 / defence.  Z_j, the branch node's value with `caution` pseudo-visits of the mean and `prior_visits` of its prior, may
        be any function of the past: E[w f] does not depend on it.
        """
        done = [i for i, leaf in enumerate(self.leaves) if self.completed[leaf]]
        overall = log_mean_exp([self.importance[i] + self.value[self.leaves[i]] for i in done])
        values = []
        for i in done:
            node = self.branch[i]
            parts = [(self.value[node], float(self.completed[node])), (overall, caution)]
            if prior_visits and not math.isnan(self.prior[node]):
                parts.append((self.prior[node], prior_visits))
            total = math.log(sum(c for _, c in parts))
            top = max(v for v, _ in parts)
            values.append(top + math.log(math.fsum(c * math.exp(v - top) for v, c in parts)) - total)
        weights = [math.exp(self.importance[i]) for i in done]
        top = max(values)
        wanted = [w * math.exp(v - top) for w, v in zip(weights, values, strict=True)]
        sums = math.fsum(wanted), math.fsum(weights)
        chances = [(1 - defence) * a / sums[0] + defence * w / sums[1] for a, w in zip(wanted, weights, strict=True)]
        logs = [math.log(w / (len(done) * c)) for w, c in zip(weights, chances, strict=True)]
        return [self.branch[i] for i in done], chances, logs

    def _grow(self, node: int, widening: Widening) -> int:
        first = below = self._add(node, self.level[node] + 1)
        while self.level[below] < self.steps:
            below = self._add(below, self.level[below] + 1)
        self.leaves.append(below)
        while below != node:
            self.visits[below] = 1
            self._close(below, widening)
            below = self.parent[below]
        while below >= 0 and self._close(below, widening):
            below = self.parent[below]
        return first

    def _close(self, node: int, widening: Widening) -> bool:
        """Note whether a node is closed now, and return it."""
        if self.level[node] < self.steps:
            wide = widening.branching is not None and len(self.children[node]) >= widening.branching
            more = self.expandable[node] and not wide
            self.closed[node] = not more and all(self.closed[c] for c in self.children[node])
        return self.closed[node]

    def complete(self, leaf: int, weight: float) -> None:
        """The log-weight r / lambda of a planned leaf is known: back it up."""
        self.value[leaf] = weight
        self._recount(leaf, 1)

    def hide(self, leaf: int) -> None:
        """The opposite: the leaf counts as planned and not yet completed."""
        self.value[leaf] = -math.inf
        self._recount(leaf, -1)

    def _recount(self, leaf: int, by: int) -> None:
        self.completed[leaf] += by
        node = self.parent[leaf]
        while node >= 0:
            self.completed[node] += by
            known = [self.value[c] for c in self.children[node] if self.completed[c]]
            self.value[node] = log_mean_exp(known) if known else -math.inf
            node = self.parent[node]

    def recompute(self, weights: Sequence[float]) -> None:
        """Set the log-weights of all leaves, in the order of the simulations, whatever was known before.

        Raises:
            ValueError: if one is not finite.
        """
        self.completed = [0] * len(self)
        self.value = [-math.inf] * len(self)
        for leaf, weight in zip(self.leaves, weights, strict=True):
            if not math.isfinite(weight):
                raise ValueError(f"leaf {leaf} has the weight {weight}")
            self.complete(leaf, weight)

    def undo(self, widening: Widening) -> None:
        """Forget the last planned simulation, which must not have been completed."""
        leaf = self.leaves.pop()
        del self.importance[len(self.leaves) :], self.branch[len(self.leaves) :]
        first = node = leaf
        while node >= 0:
            self.visits[node] -= 1
            if self.visits[node] == 0 and node:
                first = node
            node = self.parent[node]
        if first == 0:
            return
        self.children[self.parent[first]].pop()
        for column in (
            self.parent,
            self.level,
            self.index,
            self.children,
            self.visits,
            self.completed,
            self.value,
            self.prior,
            self.expandable,
            self.closed,
        ):
            del column[first:]
        self.refresh(widening)

    def refresh(self, widening: Widening) -> None:
        """Work out anew which nodes are closed."""
        for node in reversed(range(len(self))):
            self._close(node, widening)

    # --- what it says ---

    def path(self, node: int) -> tuple[int, ...]:
        """Places among the siblings, from the root's child down to the node."""
        steps = []
        while node > 0:
            steps.append(self.index[node])
            node = self.parent[node]
        return tuple(reversed(steps))

    def chain(self, first: int) -> range:
        """The nodes of the simulation that began with a node: it and those below, down to its leaf."""
        return range(first, first + self.steps - self.level[first] + 1)

    def shares(self) -> list[float]:
        """Log-probability [nodes] that a descent by value passes a node; -inf where nothing is known."""
        shares = [-math.inf] * len(self)
        shares[0] = 0.0
        for node in range(len(self)):
            known = [c for c in self.children[node] if self.completed[c]]
            for c in known:
                if self.value[c] > -math.inf:
                    shares[c] = shares[node] + self.value[c] - self.value[node] - math.log(len(known))
        return shares

    def log_weights(self, restarts: bool = False) -> list[float]:
        """Normalised log-weights of the leaves in the order of the simulations, -inf for unknown ones.

        Those of a descent by value, or, in a tree of restarts, importance times exp(r / lambda).
        """
        if not restarts:
            shares = self.shares()
            return [shares[leaf] for leaf in self.leaves]
        total = self.log_normalizer(True) + math.log(sum(self.completed[leaf] for leaf in self.leaves))
        return [w + self.value[leaf] - total for w, leaf in zip(self.importance, self.leaves, strict=True)]

    def log_normalizer(self, restarts: bool = False) -> float:
        """Estimate of log E[exp(r / lambda)]: the root's value, or, in a tree of restarts, unbiased for Z."""
        if not restarts:
            return self.value[0]
        known = [(w, leaf) for w, leaf in zip(self.importance, self.leaves, strict=True) if self.completed[leaf]]
        return log_mean_exp([w + self.value[leaf] for w, leaf in known])

    def keep(self, nodes: Sequence[int], count: int) -> list[int]:
        """Which `count` of some nodes are the likeliest to be passed; at equal chances the noisier, then the older."""
        shares = self.shares()
        return heapq.nsmallest(count, nodes, key=lambda n: (-shares[n], self.level[n], n))

    @staticmethod
    def restore(
        random: Sequence[bool],
        parent: Sequence[int],
        weights: Sequence[float],
        importance: Sequence[float],
        branch: Sequence[int],
        priors: Sequence[float],
        expandable: Sequence[bool],
        widening: Widening,
    ) -> "Tree":
        """A tree from its parents [nodes], log-weights, importance and branch nodes [simulations], priors and flags [nodes].

        Raises:
            ValueError: if these cannot be the simulations of one tree.
        """
        tree = Tree(random)
        if not parent or parent[0] != -1:
            raise ValueError("a tree begins with its root")
        for node in range(1, len(parent)):
            above = parent[node]
            if not 0 <= above < node or tree.level[above] >= tree.steps:
                raise ValueError(f"node {node} cannot hang from node {above}")
            if tree.level[node - 1] not in (-1, tree.steps) and above != node - 1:
                raise ValueError(f"node {node} cuts off the simulation of node {node - 1}")
            tree._add(above, tree.level[above] + 1)
            if tree.level[node] == tree.steps:
                tree.leaves.append(node)
        if tree.level[-1] not in (-1, tree.steps):
            raise ValueError("the last simulation has no leaf")
        if not len(tree) == len(priors) == len(expandable) or not len(tree.leaves) == len(weights):
            raise ValueError(f"{len(tree)} nodes and {len(tree.leaves)} leaves do not match what is known of them")
        if not len(weights) == len(importance) == len(branch) or any(not 0 <= b < len(tree) for b in branch):
            raise ValueError("its simulations do not match its nodes")
        tree.prior, tree.importance, tree.branch = list(priors), list(importance), list(branch)
        tree.expandable = [bool(e) and r for e, r in zip(expandable, tree.expandable, strict=True)]
        for leaf in tree.leaves:
            node = leaf
            while node >= 0:
                tree.visits[node] += 1
                node = tree.parent[node]
        tree.recompute(weights)
        tree.refresh(widening)
        return tree

"""Trees against chains small enough to be enumerated completely."""

import itertools
import math
import random

import pytest

from rsm_guidance.samplers.tree.selection import Boltzmann, Proportional, Selection, UpperConfidence, Widening, hopeful
from rsm_guidance.samplers.tree.tree import Tree, log_mean_exp

STEPS, OUTCOMES = 3, 2  # levels 0..3, each a fair coin: 16 leaves, each of probability 1/16
REWARD = {p: math.sin(1 + sum(b * 3**i for i, b in enumerate(p))) * 2 for p in itertools.product((0, 1), repeat=4)}
ALL = Widening(1000.0, 1.0, OUTCOMES)


def soft(prefix: tuple[int, ...]) -> float:
    """V of a state of the coin chain by recursion over all that can follow."""
    if len(prefix) == STEPS + 1:
        return REWARD[prefix]
    return math.log(sum(math.exp(soft((*prefix, b))) for b in range(OUTCOMES)) / OUTCOMES)


def no_dice() -> float:
    raise AssertionError("this selection draws nothing")


def enumerated(selection: Selection) -> Tree:
    tree = Tree([True] * (STEPS + 1))
    while (first := tree.plan(selection, ALL, lambda: 0.3)) is not None:
        leaf = tree.chain(first)[-1]
        tree.complete(leaf, REWARD[tree.path(leaf)])
    return tree


@pytest.mark.parametrize("selection", [Boltzmann(), Boltzmann(0.5), Proportional(), UpperConfidence()])
def test_an_enumerated_chain_has_exact_values_and_weights_whatever_selected(selection: Selection) -> None:
    tree = enumerated(selection)
    assert len(tree.leaves) == 16 and all(tree.closed) and len(tree) == 1 + 2 + 4 + 8 + 16
    for node in range(len(tree)):
        assert tree.value[node] == pytest.approx(soft(tree.path(node)), abs=1e-12)
    for leaf, weight in zip(tree.leaves, tree.log_weights(), strict=True):
        assert weight == pytest.approx(REWARD[tree.path(leaf)] - math.log(16) - soft(()), abs=1e-12)
    assert tree.visits[0] == tree.completed[0] == 16
    passed = [soft(tree.path(n)) - soft(()) - (tree.level[n] + 1) * math.log(2) for n in range(len(tree))]
    assert tree.shares() == pytest.approx(passed, abs=1e-12), (
        "a descent by value passes a node with its posterior chance"
    )


def test_selection_rules() -> None:
    values, visits, parent = [0.0, math.log(3.0)], [1, 1], math.log(2.0)
    picks = [Boltzmann().choose(values, visits, visits, parent, lambda u=u: u / 1000) for u in range(1000)]
    assert sum(picks) == 750
    uneven = Boltzmann(0.5).choose([-800.0, 0.0], [1, 4], [1, 4], 0.0, lambda: 0.24)
    assert uneven == 0, "a hopeless value still has 0.5 of 0.5 + 1.25 of the chances"
    assert hopeful([-800.0, 0.0], [1, 4], 0.0, 0.5) == pytest.approx([math.log(0.5), math.log(1.25)])
    assert hopeful(values, visits, parent, 0.0) == values
    counts = [1, 1]
    for _ in range(398):
        counts[Proportional(0.0).choose(values, counts, counts, parent, no_dice)] += 1
    assert counts == [100, 300]
    scores = [0.2 + 0.7 * math.sqrt(math.log(10) / 2), 0.5 + 0.7 * math.sqrt(math.log(10) / 8)]
    assert UpperConfidence(0.7).choose([0.2, 0.5], [2, 8], [2, 8], 0.3, no_dice) == scores.index(max(scores))
    assert UpperConfidence(0.0).choose([0.2, 0.5], [2, 8], [2, 8], 0.3, no_dice) == 1
    assert log_mean_exp([-math.inf, -math.inf]) == -math.inf and log_mean_exp([1e4, 1e4]) == 1e4


def test_widening() -> None:
    assert [Widening(1.0, 0.5).limit(n) for n in (1, 2, 4, 5, 9, 10)] == [1, 2, 2, 3, 3, 4]
    assert Widening(2.0, 0.7, 3).limit(100) == 3


def test_planned_simulations_spread_out_and_can_be_undone() -> None:
    tree = Tree([True] * (STEPS + 1))
    for _ in range(5):
        tree.plan(Proportional(), Widening(2.0, 0.5), no_dice)
    assert tree.visits[0] == 5 and tree.completed[0] == 0 and len(set(tree.leaves)) == 5
    before = [list(c) for c in tree.children], list(tree.visits), list(tree.closed)
    tree.plan(Proportional(), Widening(2.0, 0.5), no_dice)
    tree.undo(Widening(2.0, 0.5))
    assert ([list(c) for c in tree.children], tree.visits, tree.closed) == before
    tree.complete(tree.leaves[2], 1.0)
    assert tree.value[0] == 1.0, "only what is known is averaged"
    tree.complete(tree.leaves[0], 2.0)
    tree.hide(tree.leaves[2])
    assert tree.value[0] == 2.0 and tree.completed[0] == 1


def restarted(rng: random.Random, simulations: int, defence: float = 0.2) -> Tree:
    """A tree of restarts over the coin chain, where every new child is a coin of its own."""
    tree, outcome = Tree([True] * STEPS + [False]), {0: ()}
    for number in range(simulations):
        if number % 2 == 0:
            node, importance = 0, 0.0
        else:
            nodes, chances, logs = tree.restarts(0.5, 0.0, defence)
            assert math.fsum(chances) == pytest.approx(1) and max(logs) <= math.log(2 / defence) * number
            (i,) = rng.choices(range(len(nodes)), chances)
            node, importance = nodes[i], logs[i]
        for new in tree.chain(tree.plan_at(node, importance, rng.random())):
            outcome[new] = (*outcome[tree.parent[new]], rng.randrange(2))
        tree.complete(tree.leaves[-1], 2 * REWARD[outcome[tree.leaves[-1]]])
    return tree


def test_restarts_are_unbiased_for_the_normalizer_at_any_size_and_bellman_values_are_not() -> None:
    exact = math.fsum(math.exp(2 * r) for r in REWARD.values()) / 16
    rng = random.Random(0)
    for simulations in (2, 7, 16):
        trees = [restarted(rng, simulations) for _ in range(2500)]
        z = [math.exp(t.log_normalizer(True)) / exact for t in trees]
        mean = math.fsum(z) / len(z)
        error = math.sqrt(math.fsum((v - mean) ** 2 for v in z)) / len(z)
        assert abs(mean - 1) < 3.5 * error and error < 0.03
        assert all(abs(math.fsum(map(math.exp, t.log_weights(True))) - 1) < 1e-9 for t in trees[:50])
    bellman = math.fsum(math.exp(t.log_normalizer()) for t in trees) / len(trees) / exact
    assert bellman < 1 - 6 * error, "means over children that were added because of their values are biased low"


def test_restored_trees_are_equal_and_nonsense_is_refused() -> None:
    tree = restarted(random.Random(1), 9)
    known = [tree.value[leaf] for leaf in tree.leaves]
    args = (tree.importance, tree.branch, tree.prior, tree.expandable, Widening())
    again = Tree.restore(tree.random, tree.parent, known, *args)
    for name in ("level", "index", "children", "visits", "completed", "value", "leaves", "closed", "expandable"):
        assert getattr(again, name) == getattr(tree, name), name
    for parent in ([], [0], [-1, 0, 1], [-1, 5], [-1, 0, 1, 2, 3, 4]):
        with pytest.raises(ValueError):
            Tree.restore(tree.random, parent, known, *args)


def test_a_prior_counts_as_many_rollouts_as_it_is_given() -> None:
    tree = Tree([True] * 3)
    for weight in (0.3, -1.0):
        first = tree.plan(Boltzmann(), Widening(9.0, 1.0), lambda: 0.5)
        assert first is not None
        tree.complete(tree.chain(first)[-1], weight)
    tree.prior[0] = 1.5
    expected = math.log((2 * math.exp(tree.value[0]) + 3 * math.exp(1.5)) / 5)
    assert tree._selected(0, 0.0, 3.0) == pytest.approx(expected)


@pytest.mark.parametrize("caution", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("prior_visits", [0.0, 2.0])
def test_the_chances_of_restarts_are_those_written_out(caution: float, prior_visits: float) -> None:
    """In the linear domain: Z of a branch node, pseudo-visits of the mean over all simulations, and of the node's prior."""
    tree = restarted(random.Random(3), 9)
    tree.prior[tree.branch[2]] = 0.7
    w = [math.exp(i) for i in tree.importance]
    z = [math.exp(tree.value[leaf]) for leaf in tree.leaves]
    mean = math.fsum(a * b for a, b in zip(w, z, strict=True)) / len(w)
    values = []
    for node in tree.branch:
        known = prior_visits if not math.isnan(tree.prior[node]) else 0.0
        told = known and known * math.exp(tree.prior[node])
        count = tree.completed[node]
        values.append((count * math.exp(tree.value[node]) + caution * mean + told) / (count + caution + known))
    wanted = [a * b for a, b in zip(w, values, strict=True)]
    expected = [0.7 * a / math.fsum(wanted) + 0.3 * b / math.fsum(w) for a, b in zip(wanted, w, strict=True)]
    nodes, chances, logs = tree.restarts(caution, prior_visits, 0.3)
    assert nodes == tree.branch and chances == pytest.approx(expected)
    assert logs == pytest.approx([math.log(a / (9 * p)) for a, p in zip(w, expected, strict=True)])


@pytest.mark.parametrize("values", [[0.3], [0.3, -1.0], [2.0, 2.0, -math.inf], [-900.0, -901.0], [800.0, 700.0, 1.0]])
def test_the_log_mean_is_a_mean(values: list[float]) -> None:
    top = max(values)
    assert log_mean_exp(values) == pytest.approx(top + math.log(sum(math.exp(v - top) for v in values) / len(values)))
    assert log_mean_exp([top] * 5) == pytest.approx(top), "alike, not their sum"


def test_restarts_follow_priors() -> None:
    tree = Tree([True, True, False])
    for _ in range(2):
        tree.complete(tree.chain(tree.plan_at(0, 0.0, 0.9))[-1], 0.0)
    tree.prior[tree.branch[0]] = 5.0
    _, chances, _ = tree.restarts(0.5, 1.0, 0.2)
    assert chances[0] > chances[1]


def test_undoing_takes_back_all_that_a_plan_noted() -> None:
    tree, wide = Tree([True] * 3), Widening(9.0, 1.0)
    tree.plan(Boltzmann(), wide, lambda: 0.5)
    tree.plan(Boltzmann(), wide, lambda: 0.5)
    tree.undo(wide)
    assert len(tree.importance) == len(tree.branch) == len(tree.leaves) == 1

"""Tree sampling against the exact law of a discretised chain; tree search; budgets and identities of both."""

import itertools
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rsm_guidance.core.transitions import Transition
from rsm_guidance.oracles.mixture import GaussianMixtureDenoiser, QuadraticReward
from rsm_guidance.samplers import BestOfN, FKSteering, SamplerOutput, Unguided
from rsm_guidance.samplers.run import DeadlinePassed, run
from rsm_guidance.samplers.tree.methods import TreeSampling, TreeSearch
from rsm_guidance.samplers.tree.tree import Tree
from tests.samplers.tree_cases import BOTH, MIXTURE, RARE, REWARD, SCHEDULE, A, ids, problem, same


def exact(reward: QuadraticReward) -> tuple[float, float]:
    """log Z and E*[r] of the discretised chain itself, by quadrature of its Gaussian transitions."""
    grid = torch.linspace(-7, 7, 1401, dtype=torch.float64)[:, None]
    denoiser = GaussianMixtureDenoiser(MIXTURE, SCHEDULE, [])
    for level in reversed(range(SCHEDULE.steps)):
        step = A(denoiser.predict(grid, level), SCHEDULE, level, level + 1)
        if step.std == 0:
            h = reward(step.mean).exp()
            q = reward(step.mean) * h
        else:
            kernel = torch.exp(-0.5 * ((grid.T - step.mean) / step.std) ** 2) / step.std / math.sqrt(2 * math.pi) * 0.01
            h, q = kernel @ h, kernel @ q
    start = MIXTURE.noised(*SCHEDULE.coefficients(0)).log_prob(grid).exp() * 0.01
    z = float((start * h).sum())
    return math.log(z), float((start * q).sum()) / z


def measured(output: SamplerOutput, log_z: float) -> tuple[Tensor, Tensor]:
    """Per prompt, the self-normalised estimate of E*[r], and Z-hat / Z."""
    assert output.log_normalizer is not None and output.particles is not None
    return torch.tensor([p.mean_reward for p in output.particles], dtype=torch.float64), (
        output.log_normalizer - log_z
    ).exp()


def error_of(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)


def test_tree_sampling_finds_the_tilted_posterior_and_the_published_form_does_not() -> None:
    log_z, mean = exact(REWARD)
    biases = []
    for simulations in (8, 32, 96):
        rewards, z = measured(run(TreeSampling(simulations, transition=A), problem(100)), log_z)
        assert abs(float(z.mean()) - 1) < 3 * error_of(z), "the normaliser is unbiased at every budget"
        biases.append(abs(float(rewards.mean()) - mean))
    assert biases[0] > biases[1] > biases[2] and biases[2] < 3 * error_of(rewards)
    published = TreeSampling(64, batch=1, transition=A, selection="boltzmann", caution=0.0)
    naive, z = measured(run(published, problem(50)), log_z)
    assert abs(float(naive.mean()) - mean) > 5 * error_of(naive) and float(z.mean()) < 0.6


def test_where_values_mislead_its_log_normalizer_is_less_biased_than_that_of_fk_steering() -> None:
    """This alone: at equal cost FK steering has the smaller error of E*[r], and on the easy case of log Z, too."""
    log_z, _ = exact(RARE)
    tree = run(TreeSampling(192, transition=A), problem(150, RARE))
    particles = math.ceil(tree.ledger.denoiser_evaluations / 150 / SCHEDULE.steps)
    fk = run(FKSteering(particles, transition=A), problem(150, RARE))
    biases = [abs(float(measured(output, log_z)[1].log().mean())) for output in (tree, fk)]
    assert biases[0] < biases[1]


def test_the_restarts_of_a_batch_are_spread_evenly_and_by_a_stream_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """100 equal chances, from which each batch of 8 draws every eighth, another one in every batch, prompt and seed."""
    drawn: dict[int, list[float]] = {}
    plan_at = Tree.plan_at

    def counted(tree: Tree, node: int, importance: float, place: float | None) -> int:
        drawn.setdefault(id(tree), []).append(importance)
        return plan_at(tree, node, 0.0, place)

    monkeypatch.setattr(Tree, "restarts", lambda *_: ([0] * 100, [0.01] * 100, [float(i) for i in range(100)]))
    monkeypatch.setattr(Tree, "plan_at", counted)
    sampler = TreeSampling(1 + 8 * 10, batch=8, fresh=0.0)
    for seed in (0, 1):
        run(sampler, problem(2, seed=seed))
    offsets = []
    for restarts in drawn.values():
        for batch in range(10):
            picks = sorted(restarts[1 + 8 * batch : 9 + 8 * batch])
            gaps = [b - a for a, b in itertools.pairwise([*picks, picks[0] + 100])]
            assert all(12 <= gap <= 13 for gap in gaps), "an eighth apart"
            offsets.append(picks[0])
    assert len(drawn) == 4 and len(set(offsets)) > 8, "batches, prompts and seeds draw differently"
    assert 3 < sum(offsets) / len(offsets) < 9, "evenly over the eighth"


def test_it_stays_unbiased_where_good_samples_are_rare() -> None:
    log_z, mean = exact(RARE)
    rewards, z = measured(run(TreeSampling(96, transition=A), problem(100, RARE)), log_z)
    assert abs(float(z.mean()) - 1) < 3 * error_of(z) and error_of(z) < 0.15
    assert abs(float(rewards.mean()) - mean) < 0.6


def test_returned_samples_follow_the_target() -> None:
    output = run(TreeSampling(48, transition=A), problem(200))
    assert output.rewards is not None
    assert abs(float(output.rewards.mean()) - exact(REWARD)[1]) < 3.5 * error_of(output.rewards)
    assert torch.allclose(REWARD(output.latents), output.rewards)


def test_tree_search_returns_its_best_leaf_and_beats_best_of_n() -> None:
    output = run(TreeSearch(64, transition=A), problem(100, RARE))
    assert output.rewards is not None
    assert output.rewards.tolist() == [max(r) for r in output.trace["candidates"]["rewards"]]
    assert torch.allclose(RARE(output.latents), output.rewards)
    count = math.ceil(output.ledger.denoiser_evaluations / 100 / SCHEDULE.steps)
    best = run(BestOfN(count, A), problem(100, RARE)).rewards
    assert best is not None
    gain = output.rewards - best
    assert float(gain.mean()) > 2 * error_of(gain)


# --- identities ---


@pytest.mark.parametrize("transition", [A, Transition("cps", 0.9), Transition("ode")])
@pytest.mark.parametrize("kind", [TreeSampling, TreeSearch])
def test_one_simulation_is_the_unguided_run(kind: Any, transition: Transition) -> None:
    plain = run(Unguided(transition), problem()).latents
    assert torch.equal(run(kind(1, transition=transition), problem()).latents, plain)
    output = run(kind(12, transition=transition), problem())
    assert [t["leaves"][0] for t in output.trace["tree"]] == [SCHEDULE.steps + 1] * 4


def test_starts_alone_are_best_of_n() -> None:
    best = run(BestOfN(12, A), problem())
    for sampler in (TreeSearch(12, exponent=1.0, transition=A), TreeSampling(12, fresh=1.0, transition=A)):
        output = run(sampler, problem())
        assert output.trace["candidates"]["rewards"] == best.trace["candidates"]["rewards"]
        assert output.ledger.denoiser_evaluations == best.ledger.denoiser_evaluations


def test_a_constant_reward_makes_all_leaves_alike() -> None:
    task = problem()
    task.reward = lambda x, p: torch.full((len(x),), 0.7)
    output = run(TreeSampling(30, temperature=0.5, transition=A), task)
    assert output.log_normalizer is not None
    assert torch.allclose(output.log_normalizer, torch.full((4,), 1.4, dtype=torch.float64))
    weights = torch.tensor(output.trace["candidates"]["log_weights"])
    assert torch.allclose(weights, torch.full((4, 30), -math.log(30)))


@pytest.mark.parametrize("sampler", BOTH, ids=ids)
def test_prompts_are_independent(sampler: Any) -> None:
    together = run(sampler, problem(5))
    for row in (0, 3):
        alone = run(sampler, problem(prompts=[f"point {row}"]))
        assert torch.equal(alone.latents[0], together.latents[row])
        assert alone.trace["tree"][0] == together.trace["tree"][row]
    small = run(type(sampler)(**(vars(sampler) | {"batch_rows": 3})), problem(5))
    same(small, together)


@pytest.mark.parametrize("sampler", BOTH, ids=ids)
def test_every_transition_is_computed_once_and_the_trace_is_json(sampler: Any) -> None:
    output = run(sampler, problem())
    trees = json.loads(json.dumps(output.trace))["tree"]
    inner = sum(0 <= level < SCHEDULE.steps for tree in trees for level in tree["level"])
    assert output.ledger.denoiser_evaluations == inner < 4 * 20 * SCHEDULE.steps
    for tree, chosen, rewards in zip(
        trees, *(output.trace["candidates"][k] for k in ("chosen", "rewards")), strict=True
    ):
        assert tree["chosen"] == tree["leaves"][chosen] and tree["visits"][0] == len(rewards) == 20
        assert tree["value"][tree["chosen"]] == rewards[chosen]


# --- good enough ---


@pytest.mark.parametrize("batch", [1, 4])
def test_a_prompt_is_done_with_its_first_good_leaf(batch: int) -> None:
    full = run(TreeSearch(20, batch=batch, transition=A), problem(30, RARE))
    output = run(TreeSearch(20, batch=batch, transition=A, accept=-20.0), problem(30, RARE))
    counts = []
    for row, rewards in enumerate(output.trace["candidates"]["rewards"]):
        every = full.trace["candidates"]["rewards"][row]
        first = next((i for i, r in enumerate(every) if r >= -20.0), 19)
        last = first if first == 0 else min(20, 1 + math.ceil(first / batch) * batch) - 1  # the end of its batch
        assert rewards == every[: last + 1]
        assert output.rewards is not None and output.rewards[row] == max(rewards)
        counts.append(len(rewards))
    assert min(counts) == 1 and max(counts) > 5 and output.ledger.stopped is None
    assert output.ledger.denoiser_evaluations < full.ledger.denoiser_evaluations
    with pytest.raises(ValueError, match="accept must be finite"):
        TreeSearch(accept=math.inf)


# --- budgets ---


@pytest.mark.parametrize("sampler", [TreeSampling(50, transition=A), TreeSearch(50, transition=A, prior="value")])
@pytest.mark.parametrize(
    "caps", [{"evaluations": 10.5}, {"evaluations": 61.3}, {"reward_calls": 17}, {"decodes": 9}, {"seconds": 1e-9}]
)
def test_budgets_are_hard_caps_and_what_is_found_is_returned(sampler: Any, caps: dict[str, float]) -> None:
    task = problem(**caps)
    if "seconds" in caps:
        with pytest.raises((KeyboardInterrupt, DeadlinePassed)):  # not one step was taken
            run(sampler, task)
        return
    output = run(sampler, task)
    ledger = output.ledger
    assert ledger.stopped == "budget" and len(output.latents) == 4
    spent = {"evaluations": ledger.evaluations, "reward_calls": ledger.reward_calls, "decodes": ledger.decodes + 4}
    for name, cap in caps.items():
        assert spent[name] <= 4 * cap + 1e-6
    alone = run(sampler, problem(prompts=["point 2"], **caps))
    assert torch.equal(alone.latents[0], output.latents[2])


def test_the_deadline_returns_the_best_so_far() -> None:
    task = problem(seconds=1000.0)

    def late(progress: Any) -> None:
        if task.ledger.reward_calls >= 4 * 9:
            task.ledger._started -= 2000.0

    task.progress = late
    output = run(TreeSearch(400, transition=A), task)
    assert output.ledger.stopped == "deadline" and len(output.trace["candidates"]["rewards"][0]) == 9
    first = problem()
    first.progress = lambda p: (_ for _ in ()).throw(KeyboardInterrupt) if p.level == 4 else None
    output = run(TreeSampling(8, transition=A), first)
    assert output.ledger.stopped == "interrupted" and output.latents.shape == (4, 1)


def test_bad_input() -> None:
    for options, words in (
        ({"simulations": 0}, "simulations must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"branching": 0}, "branching must be at least 1"),
        ({"exponent": 1.5}, r"exponent must lie in \[0, 1\]"),
        ({"prior": "drm"}, "prior must be"),
        ({"node_dtype": "int8"}, "node_dtype must be"),
        ({"transition": Transition("scheduler")}, "between single levels"),
        ({"selection": "uct"}, "selection must be"),
        ({"defence": 0.0}, "defence must lie"),
        ({"fresh": 1.1}, "fresh must lie"),
        ({"selection": "restarts", "branching": 3}, "widening"),
    ):
        with pytest.raises(ValueError, match=words):
            TreeSampling(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="exploration"):
        TreeSearch(exploration=-1.0)
    with pytest.raises(ValueError, match="cannot finish one image"):
        run(TreeSampling(4, transition=A), problem(evaluations=9.0))
    task = problem()
    task.value = None
    with pytest.raises(ValueError, match="prior='value' needs"):
        run(TreeSearch(4, transition=A, prior="value"), task)

"""Tree sampling against the exact law of a discretised chain; tree search; budgets, files and identities of both."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import rsm_guidance as rg
from rsm_guidance.core.forest import Forest
from rsm_guidance.core.ledger import Budget, Ledger
from rsm_guidance.core.mixture import GaussianMixture, GaussianMixtureDenoiser, QuadraticReward
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.samplers import BestOfN, FKSteering, Interrupted, Problem, SamplerOutput, Unguided, growth
from rsm_guidance.samplers.tree import TreeSampling, TreeSearch

A = Transition("ddim", 1.0)
MIXTURE = GaussianMixture.from_weights([0.5, 0.5], [[-2.0], [2.0]], 0.25)
REWARD = QuadraticReward.around([1.0], [1.0])
RARE = QuadraticReward.around([3.0], [10.0])
SCHEDULE = NoiseSchedule.variance_preserving(10)


class Tweedie:
    """The reward of the posterior mean."""

    evaluations_per_row = 0.5
    reward_calls_per_row = 1
    reads_prediction = False

    def __init__(self, ledger: Ledger, reward: QuadraticReward) -> None:
        self.ledger, self.reward = ledger, reward

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        self.ledger.charge_value(len(x), 0.5)
        self.ledger.reward_calls += len(x)
        if level < SCHEDULE.steps:
            x = GaussianMixtureDenoiser(MIXTURE, SCHEDULE, []).predict(x, level).x0
        return self.reward(x)


def problem(
    count: int = 4, reward: QuadraticReward = REWARD, seed: int = 0, prompts: list[str] | None = None, **caps: float
) -> Problem:
    prompts = prompts or [f"point {i}" for i in range(count)]
    ledger = Ledger(Budget(**caps), images=len(prompts))
    denoiser = GaussianMixtureDenoiser(MIXTURE, SCHEDULE, prompts, seed)
    inner, decode = denoiser.predict, denoiser.decode

    def counted(x: Tensor, level: int, rows: Tensor | None = None) -> Prediction:
        ledger.denoiser_evaluations += len(x)
        return inner(x, level, rows)

    def decoded(x0: Tensor, rows: Tensor | None = None) -> Tensor:
        ledger.decodes += len(x0)
        return decode(x0, rows)

    object.__setattr__(denoiser, "predict", counted)
    object.__setattr__(denoiser, "decode", decoded)
    streams = RandomStreams.for_prompts(seed, prompts)
    return Problem(denoiser, streams, ledger, lambda x, p: reward(x), Tweedie(ledger, reward))


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
    table = output.trace["candidates"]
    pairs = zip(table["log_weights"], table["rewards"], strict=True)
    means = [math.fsum(math.exp(w) * r for w, r in zip(*pair, strict=True)) for pair in pairs]
    assert output.log_normalizer is not None
    return torch.tensor(means, dtype=torch.float64), (output.log_normalizer - log_z).exp()


def error_of(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)


def test_tree_sampling_finds_the_tilted_posterior_and_the_published_form_does_not() -> None:
    log_z, mean = exact(REWARD)
    biases = []
    for simulations in (8, 32, 96):
        rewards, z = measured(TreeSampling(simulations, transition=A).sample(problem(100)), log_z)
        assert abs(float(z.mean()) - 1) < 3 * error_of(z), "the normaliser is unbiased at every budget"
        biases.append(abs(float(rewards.mean()) - mean))
    assert biases[0] > biases[1] > biases[2] and biases[2] < 3 * error_of(rewards)
    published = TreeSampling(64, batch=1, transition=A, selection="boltzmann", caution=0.0)
    naive, z = measured(published.sample(problem(50)), log_z)
    assert abs(float(naive.mean()) - mean) > 5 * error_of(naive) and float(z.mean()) < 0.6


def test_where_values_mislead_its_log_normalizer_is_less_biased_than_that_of_fk_steering() -> None:
    """This alone: at equal cost FK steering has the smaller error of E*[r], and on the easy case of log Z, too."""
    log_z, _ = exact(RARE)
    tree = TreeSampling(192, transition=A).sample(problem(60, RARE))
    particles = math.ceil(tree.ledger.denoiser_evaluations / 60 / SCHEDULE.steps)
    fk = FKSteering(particles, transition=A).sample(problem(60, RARE))
    biases = [abs(float(measured(output, log_z)[1].log().mean())) for output in (tree, fk)]
    assert biases[0] < biases[1]


def test_it_stays_unbiased_where_good_samples_are_rare() -> None:
    log_z, mean = exact(RARE)
    rewards, z = measured(TreeSampling(96, transition=A).sample(problem(100, RARE)), log_z)
    assert abs(float(z.mean()) - 1) < 3 * error_of(z) and error_of(z) < 0.15
    assert abs(float(rewards.mean()) - mean) < 0.6


def test_returned_samples_follow_the_target() -> None:
    output = TreeSampling(48, transition=A).sample(problem(200))
    assert output.rewards is not None
    assert abs(float(output.rewards.mean()) - exact(REWARD)[1]) < 3.5 * error_of(output.rewards)
    assert torch.allclose(REWARD(output.latents), output.rewards)


def test_tree_search_returns_its_best_leaf_and_beats_best_of_n() -> None:
    output = TreeSearch(64, transition=A).sample(problem(100, RARE))
    assert output.rewards is not None
    assert output.rewards.tolist() == [max(r) for r in output.trace["candidates"]["rewards"]]
    assert torch.allclose(RARE(output.latents), output.rewards)
    count = math.ceil(output.ledger.denoiser_evaluations / 100 / SCHEDULE.steps)
    best = BestOfN(count, A).sample(problem(100, RARE)).rewards
    assert best is not None
    gain = output.rewards - best
    assert float(gain.mean()) > 2 * error_of(gain)


# --- identities ---

BOTH = [
    TreeSampling(20, transition=A),
    TreeSampling(20, transition=A, selection="proportional"),
    TreeSampling(20, transition=A, selection="boltzmann", batch=5, prior="value"),
    TreeSampling(20, transition=A, stored_nodes=6, node_dtype="bfloat16"),
    TreeSearch(20, transition=A, prior="value"),
    TreeSearch(20, transition=A, stored_nodes=30, branching=3),
]


def ids(sampler: Any) -> str:
    return "-".join([sampler.name, getattr(sampler, "selection", "uct"), sampler.prior, str(sampler.stored_nodes)])


def same(one: SamplerOutput, other: SamplerOutput) -> None:
    assert torch.equal(one.latents, other.latents)
    assert one.trace["tree"] == other.trace["tree"] and one.trace["candidates"] == other.trace["candidates"]


@pytest.mark.parametrize("transition", [A, Transition("cps", 0.9), Transition("ode")])
@pytest.mark.parametrize("kind", [TreeSampling, TreeSearch])
def test_one_simulation_is_the_unguided_run(kind: Any, transition: Transition) -> None:
    plain = Unguided(transition).sample(problem()).latents
    assert torch.equal(kind(1, transition=transition).sample(problem()).latents, plain)
    output = kind(12, transition=transition).sample(problem())
    assert [t["leaves"][0] for t in output.trace["tree"]] == [SCHEDULE.steps + 1] * 4


def test_starts_alone_are_best_of_n() -> None:
    best = BestOfN(12, A).sample(problem())
    for sampler in (TreeSearch(12, exponent=1.0, transition=A), TreeSampling(12, fresh=1.0, transition=A)):
        output = sampler.sample(problem())
        assert output.trace["candidates"]["rewards"] == best.trace["candidates"]["rewards"]
        assert output.ledger.denoiser_evaluations == best.ledger.denoiser_evaluations


def test_a_constant_reward_makes_all_leaves_alike() -> None:
    task = problem()
    task.reward = lambda x, p: torch.full((len(x),), 0.7)
    output = TreeSampling(30, temperature=0.5, transition=A).sample(task)
    assert output.log_normalizer is not None
    assert torch.allclose(output.log_normalizer, torch.full((4,), 1.4, dtype=torch.float64))
    weights = torch.tensor(output.trace["candidates"]["log_weights"])
    assert torch.allclose(weights, torch.full((4, 30), -math.log(30)))


@pytest.mark.parametrize("sampler", BOTH, ids=ids)
def test_prompts_are_independent(sampler: Any) -> None:
    together = sampler.sample(problem(5))
    for row in (0, 3):
        alone = sampler.sample(problem(prompts=[f"point {row}"]))
        assert torch.equal(alone.latents[0], together.latents[row])
        assert alone.trace["tree"][0] == together.trace["tree"][row]
    small = type(sampler)(**(vars(sampler) | {"batch_rows": 3})).sample(problem(5))
    same(small, together)


@pytest.mark.parametrize("sampler", BOTH, ids=ids)
def test_every_transition_is_computed_once_and_the_trace_is_json(sampler: Any) -> None:
    output = sampler.sample(problem())
    trees = json.loads(json.dumps(output.trace))["tree"]
    inner = sum(0 <= level < SCHEDULE.steps for tree in trees for level in tree["level"])
    assert output.ledger.denoiser_evaluations == inner < 4 * 20 * SCHEDULE.steps
    for tree, chosen, rewards in zip(
        trees, *(output.trace["candidates"][k] for k in ("chosen", "rewards")), strict=True
    ):
        assert tree["chosen"] == tree["leaves"][chosen] and tree["visits"][0] == len(rewards) == 20
        assert tree["value"][tree["chosen"]] == rewards[chosen]


# --- files ---


@pytest.mark.parametrize("sampler", BOTH, ids=ids)
def test_a_resumed_tree_equals_an_uninterrupted_one(sampler: Any, tmp_path: Path) -> None:
    whole = sampler.sample(problem())
    for stops in ((1, 20), (7, 12, 20), (9, 20, 20)):
        path = tmp_path / f"{stops}.safetensors"
        for simulations in stops:
            part = type(sampler)(**(vars(sampler) | {"simulations": simulations, "tree_file": str(path)}))
            output = part.sample(problem())
        same(output, whole)
        assert [p for p in tmp_path.iterdir() if p.suffix != ".safetensors"] == []
    assert output.ledger.denoiser_evaluations == 4, "nothing but the proof that the model is the same"


def test_an_interrupted_tree_goes_on(tmp_path: Path) -> None:
    whole = TreeSampling(30, transition=A).sample(problem())
    path = str(tmp_path / "tree.safetensors")
    task = problem()
    reports = 0

    def interrupt(progress: Any) -> None:
        nonlocal reports
        reports += 1
        if reports == 26:
            raise KeyboardInterrupt

    task.progress = interrupt
    cut = TreeSampling(30, transition=A, tree_file=path).sample(task)
    assert cut.ledger.stopped == "interrupted" and cut.latents.isfinite().all()
    assert 1 <= len(cut.trace["candidates"]["rewards"][0]) < 30
    same(TreeSampling(30, transition=A, tree_file=path).sample(problem()), whole)


def test_a_killed_tree_goes_on_from_its_last_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, path = TreeSampling(30, transition=A).sample(problem()), tmp_path / "tree.safetensors"
    states: list[bytes] = []
    save = Forest.save

    def recorded(self: Forest, *args: Any) -> None:
        save(self, *args)
        states.append(path.read_bytes())

    monkeypatch.setattr(Forest, "save", recorded)
    monkeypatch.setattr(growth, "_SAVE_EVERY", -1.0)
    TreeSampling(30, transition=A, tree_file=str(path)).sample(problem())
    assert len(states) == 5, "after the first simulation, and after each batch of eight"
    path.write_bytes(states[2])
    same(TreeSampling(30, transition=A, tree_file=str(path)).sample(problem()), whole)


def test_a_tree_file_that_cannot_be_written_costs_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="its folder is missing"):
        TreeSearch(6, transition=A, tree_file=str(tmp_path / "none" / "t.safetensors")).sample(problem())

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Forest, "save", full)
    with pytest.warns(UserWarning, match="no space left"):
        output = TreeSearch(6, transition=A, tree_file=str(tmp_path / "t.safetensors")).sample(problem())
    same(output, TreeSearch(6, transition=A).sample(problem()))


def test_files_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    base = {"transition": A, "tree_file": str(path)}
    TreeSampling(6, **base).sample(problem())  # type: ignore[arg-type]
    for task, options, words in (
        (problem(3), {}, "its prompts was"),
        (problem(seed=1), {}, "its seed was 0 and is now 1"),
        (problem(), {"temperature": 0.5}, "settings.temperature was 1.0"),
        (problem(), {"transition": Transition("cps", 0.9)}, "settings.transition.kind"),
    ):
        with pytest.raises(ValueError, match=words):
            TreeSampling(6, **(base | options)).sample(task)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="settings.* was"):
        TreeSearch(6, **base).sample(problem())  # type: ignore[arg-type]
    task = problem()
    task.denoiser.schedule = NoiseSchedule.variance_preserving(12)  # type: ignore[misc]
    with pytest.raises(ValueError, match="its schedule.alpha"):
        TreeSampling(6, **base).sample(task)  # type: ignore[arg-type]
    task = problem()
    task.denoiser.mixture = GaussianMixture.from_weights([0.5, 0.5], [[-3.0], [1.0]], 0.25)  # type: ignore[attr-defined]
    task.denoiser.initial = problem().denoiser.initial  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="grown with another model"):
        TreeSampling(6, **base).sample(task)  # type: ignore[arg-type]
    task = problem()
    task.reward = lambda x, prompts: 2 * problem().reward(x, prompts)  # type: ignore[misc]
    with pytest.raises(ValueError, match="grown with another reward: a leaf of prompt 0 had"):
        TreeSampling(6, **base).sample(task)  # type: ignore[arg-type]
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], b"", b"nonsense" * 40):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="is damaged or no tree file"):
            TreeSampling(6, **base).sample(problem())  # type: ignore[arg-type]


def test_stored_latents_are_bounded(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for sampler in BOTH[3], BOTH[5]:
        path = tmp_path / f"{sampler.name}.safetensors"
        type(sampler)(**(vars(sampler) | {"simulations": 41, "tree_file": str(path)})).sample(problem())
        tensors = load_file(path)
        counts = tensors["means.at"][:, 0].bincount()
        assert int(counts.max()) <= sampler.stored_nodes
        assert tensors["means"].dtype == (torch.bfloat16 if sampler.node_dtype else torch.float64)
        assert len(tensors["clean"]) == (4 if sampler.greedy else 4 * 41)


# --- budgets ---


@pytest.mark.parametrize("sampler", [TreeSampling(50, transition=A), TreeSearch(50, transition=A, prior="value")])
@pytest.mark.parametrize(
    "caps", [{"evaluations": 10.5}, {"evaluations": 61.3}, {"reward_calls": 17}, {"decodes": 9}, {"seconds": 1e-9}]
)
def test_budgets_are_hard_caps_and_what_is_found_is_returned(sampler: Any, caps: dict[str, float]) -> None:
    task = problem(**caps)
    if "seconds" in caps:
        with pytest.raises(Interrupted):  # not one step was taken
            sampler.sample(task)
        return
    output = sampler.sample(task)
    ledger = output.ledger
    assert ledger.stopped == "budget" and len(output.latents) == 4
    spent = {"evaluations": ledger.evaluations, "reward_calls": ledger.reward_calls, "decodes": ledger.decodes + 4}
    for name, cap in caps.items():
        assert spent[name] <= 4 * cap + 1e-6
    alone = sampler.sample(problem(prompts=["point 2"], **caps))
    assert torch.equal(alone.latents[0], output.latents[2])


def test_the_deadline_returns_the_best_so_far() -> None:
    task = problem(seconds=1000.0)

    def late(progress: Any) -> None:
        if task.ledger.reward_calls >= 4 * 9:
            task.ledger._started -= 2000.0

    task.progress = late
    output = TreeSearch(400, transition=A).sample(task)
    assert output.ledger.stopped == "deadline" and len(output.trace["candidates"]["rewards"][0]) == 9
    first = problem()
    first.progress = lambda p: (_ for _ in ()).throw(KeyboardInterrupt) if p.level == 4 else None
    output = TreeSampling(8, transition=A).sample(first)
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
        TreeSampling(4, transition=A).sample(problem(evaluations=9.0))
    task = problem()
    task.value = None
    with pytest.raises(ValueError, match="prior='value' needs"):
        TreeSearch(4, transition=A, prior="value").sample(task)


def test_a_tree_grown_through_a_pipeline_is_resumed(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel, tmp_path: Path
) -> None:
    path = tmp_path / "tree.safetensors"
    call: dict[str, Any] = {
        "prompt": ["a red star", "two blue circles"],
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
    }

    def grown(simulations: int, file: str | None, **extra: Any) -> Any:
        sampler = TreeSearch(simulations, batch=2, tree_file=file)
        return guided(**(call | extra), sampler=sampler, reward=drm, seed=1, output_type="np")

    whole, part = grown(9, None), grown(4, str(path))
    resumed = grown(9, str(path))
    assert np.abs(resumed.images - whole.images).max() <= 1 / 255 + 1e-6
    assert resumed.rewards == pytest.approx(whole.rewards, abs=1e-3)
    assert resumed.ledger.denoiser_evaluations < whole.ledger.denoiser_evaluations
    assert part.ledger.denoiser_evaluations < whole.ledger.denoiser_evaluations
    with pytest.raises(ValueError, match="its prompts was"):
        grown(9, str(path), prompt=["a red star", "two green circles"])
    with pytest.raises(ValueError, match="its judges"):
        guided(**call, sampler=TreeSearch(9, batch=2, tree_file=str(path)), reward="shapes-verifier", seed=1)

"""Sequential Monte Carlo against the exact tilted posterior of Gaussian mixtures, and the published bugs it avoids."""

import itertools
import math
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import rsm_guidance as rg
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import CPS, Transition
from rsm_guidance.oracles.mixture import (
    expected_reward,
    tilt,
)
from rsm_guidance.samplers import (
    SVDD,
    BestOfN,
    FKSteering,
    PsiSampler,
    SamplerOutput,
    StepwiseSampling,
    TreeSampling,
    TwistedSMC,
    Unguided,
)
from rsm_guidance.samplers.psi import CrankNicolson
from rsm_guidance.samplers.run import run
from tests.samplers.cases import (
    ANCESTRAL,
    CASES,
    COARSE,
    SCHEDULES,
    SHORT,
    ConstantValue,
    mean_normalizer,
    problem,
    weighted_reward,
)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_fk_steering_finds_the_tilted_posterior(case: str, name: str) -> None:
    mixture, reward = CASES[case]
    posterior, log_z = tilt(mixture, reward)
    output = run(FKSteering(64, transition=ANCESTRAL), problem(case, SCHEDULES[name], 40))
    mean, error = weighted_reward(output)
    assert abs(mean - float(expected_reward(posterior, reward))) < 3 * error + 0.03
    z, error = mean_normalizer(output)
    assert abs(z - float(log_z.exp())) < 3 * error + 0.03 * float(log_z.exp())


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
@pytest.mark.parametrize("tempering", ["none", "polynomial", "adaptive"])
def test_any_potential_and_tempering_targets_the_same_posterior_with_a_crude_value(
    potential: str, tempering: str
) -> None:
    """Tweedie's value is far off at noisy levels; the last potential makes up for it."""
    mixture, reward = CASES["linear"]
    exact = float(expected_reward(tilt(mixture, reward)[0], reward))
    sampler = FKSteering(128, potential=potential, tempering=tempering, interval=10, transition=ANCESTRAL)  # type: ignore[arg-type]
    mean, error = weighted_reward(run(sampler, problem("linear", COARSE, 20, exact=False)))
    assert abs(mean - exact) < 3 * error + 0.05


def test_more_particles_come_closer_and_best_of_n_overshoots() -> None:
    mixture, reward = CASES["ring"]
    exact = float(expected_reward(tilt(mixture, reward)[0], reward))
    errors = []
    for k in (2, 16, 128):
        mean, _ = weighted_reward(run(FKSteering(k, transition=ANCESTRAL), problem("ring", COARSE, 30)))
        errors.append(abs(mean - exact))
    assert errors[0] > 2 > 0.5 > errors[1] and errors[2] < 0.06
    best = run(BestOfN(64, ANCESTRAL), problem("ring", COARSE, 20)).rewards
    assert best is not None and best.mean() > exact + 0.3, "maximising is not sampling"


def test_the_normalizer_is_unbiased_at_few_particles() -> None:
    _, log_z = tilt(*CASES["linear"])
    z, error = mean_normalizer(run(FKSteering(4, transition=ANCESTRAL), problem("linear", COARSE, 1500)))
    assert abs(z - float(log_z.exp())) < 3 * error + 0.02 * float(log_z.exp())


def test_all_potentials_together_weigh_as_one_value() -> None:
    """As published, at the temperature of the target: 0.9 off at 64 particles and 1.5 off at 16,384."""
    mixture, reward = CASES["linear"]
    exact, log_z = float(expected_reward(tilt(mixture, reward)[0], reward)), float(tilt(mixture, reward)[1])
    for potential in ("max", "sum"):
        sampler = FKSteering(64, potential=potential)
        output = run(sampler, problem("linear", COARSE, 100, exact=False))
        mean, error = weighted_reward(output)
        assert abs(mean - exact) < 3 * error + 0.1, potential
        z, error = mean_normalizer(output)
        assert abs(z / math.exp(log_z) - 1) < 3 * error / math.exp(log_z) + 0.1, potential


DEFAULTS = [FKSteering(64), TwistedSMC(32), PsiSampler(64), TreeSampling(64)]
FINE = {"flow": NoiseSchedule.flow(80), "vp": NoiseSchedule.variance_preserving(60)}


@pytest.mark.parametrize(
    ("sampler", "name"),
    [*itertools.product(DEFAULTS[:3], FINE), (DEFAULTS[3], "vp")],
    ids=lambda s: getattr(s, "name", s),
)
def test_what_a_user_gets_by_default_is_a_sample_of_the_target(sampler: Any, name: str) -> None:
    """Both the returned latents, which weigh alike, and all particles with their weights."""
    mixture, reward = CASES["linear"]
    exact = float(expected_reward(tilt(mixture, reward)[0], reward))
    output = run(sampler, problem("linear", FINE[name], 100))
    assert output.rewards is not None and output.particles is not None
    mean, error = float(output.rewards.mean()), float(output.rewards.std() / 100**0.5)
    assert abs(mean - exact) < 3 * error + 0.03
    mean, error = weighted_reward(output)
    assert abs(mean - exact) < 3 * error + 0.04
    first, table = output.particles[0], output.trace["candidates"]
    assert torch.allclose(reward(first.latents), first.rewards) and first.rewards.tolist() == table["rewards"][0]
    assert first.log_weights.tolist() == table["log_weights"][0]
    assert output.trace["target"] == "p(x) exp(r(x) / temperature) / Z"


def test_claims_are_of_the_chain_where_the_transition_does_not_keep_marginals_and_none_of_the_best() -> None:
    assert "p of this chain: cps 0.9 does not keep" in str(FKSteering(transition=CPS(0.9)).target)
    assert TwistedSMC(returned="best").target is None and BestOfN().target is None
    best = run(FKSteering(8, returned="best"), problem("ring", SHORT, 5))
    assert best.rewards is not None and best.rewards.tolist() == [max(r) for r in best.trace["candidates"]["rewards"]]
    assert best.trace["target"] is None and best.log_normalizer is not None
    assert best.trace["log_normalizer"] == best.log_normalizer.tolist()
    greedy = run(BestOfN(3, ANCESTRAL), problem("ring", SHORT, 5))
    assert greedy.particles is None and greedy.trace["log_normalizer"] is None


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("case", CASES)
def test_twisted_proposals_find_the_tilted_posterior_with_even_weights(case: str, name: str) -> None:
    mixture, reward = CASES[case]
    posterior, log_z = tilt(mixture, reward)
    twisted = run(TwistedSMC(32, transition=ANCESTRAL), problem(case, SCHEDULES[name], 30))
    mean, error = weighted_reward(twisted)
    assert abs(mean - float(expected_reward(posterior, reward))) < 3 * error + 0.03
    z, error = mean_normalizer(twisted)
    assert abs(z - float(log_z.exp())) < 3 * error + 0.03 * float(log_z.exp())
    plain = run(FKSteering(32, transition=ANCESTRAL), problem(case, SCHEDULES[name], 30))
    assert resampled(twisted) < 0.5 * resampled(plain), "following the exact value's gradient keeps the weights even"


def resampled(output: SamplerOutput) -> float:
    """How often a prompt was resampled."""
    k = len(output.trace["candidates"]["rewards"][0])
    return sum(row != list(range(k)) for entry in output.trace["levels"] for row in entry["ancestors"])


@pytest.mark.parametrize("jacobian", [True, False])
@pytest.mark.parametrize("power", [0.0, 2.0])
def test_twists_from_tweedies_estimate_are_weighed_out(jacobian: bool, power: float) -> None:
    mixture, reward = CASES["linear"]
    exact = float(expected_reward(tilt(mixture, reward)[0], reward))
    sampler = TwistedSMC(128, power=power, jacobian=jacobian, transition=ANCESTRAL)
    mean, error = weighted_reward(run(sampler, problem("linear", COARSE, 20, exact=False)))
    assert abs(mean - exact) < 3 * error + 0.05


@pytest.mark.parametrize("threshold", [1e-6, 1.0])
@pytest.mark.parametrize("gradient", [True, False])
def test_what_a_value_has_read_is_not_asked_again_and_follows_its_particle(
    gradient: bool, threshold: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One denoiser evaluation per particle and level, with resampling and without, and of the particle that goes on."""
    proposed, moves = TwistedSMC._proposed, []

    def checked(self: TwistedSMC, task: Any, state: Any, slope: Tensor, jump: tuple[int, int]) -> Any:
        assert torch.equal(state.prediction.x, state.x)
        assert torch.equal(state.prediction.x0, task.denoiser.inner.predict(state.x, jump[0]).x0)
        moves.append(jump)
        return proposed(self, task, state, slope, jump)

    monkeypatch.setattr(TwistedSMC, "_proposed", checked)
    for sampler in (
        TwistedSMC(4, gradient=gradient, threshold=threshold),
        PsiSampler(4, initial=None, gradient=gradient),
    ):
        output = run(sampler, problem("ring", SHORT, 5, exact=False))
        assert output.ledger.denoiser_evaluations == 5 * 4 * SHORT.steps
    assert len(moves) == 2 * SHORT.steps


def test_a_value_without_gradient_is_refused_and_nan_gradients_are_dropped() -> None:
    class Blind(ConstantValue):
        def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
            return torch.ones(len(x))

    class Broken(ConstantValue):
        def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
            return (0 * x.flatten(1).sum(1)).sqrt()  # finite, with an infinite derivative

    task = problem("ring", SHORT, 3)
    task.value = Blind()
    with pytest.raises(ValueError, match="constant is not differentiable"):
        run(TwistedSMC(), task)
    task = problem("ring", SHORT, 3)
    task.value = Broken()
    assert run(TwistedSMC(), task).latents.isfinite().all()


# --- identities ---


@pytest.mark.parametrize(
    "sampler",
    [
        FKSteering(5, transition=ANCESTRAL),
        SVDD(5, transition=ANCESTRAL),
        SVDD(3, 4),
        TwistedSMC(4, transition=ANCESTRAL),
    ],
)
def test_a_constant_reward_leaves_the_unguided_run(sampler: Any) -> None:
    task = problem("ring", SHORT, 6)
    task.value, task.reward = None, lambda x, p: torch.zeros(len(x))
    task.value = ConstantValue()
    plain = run(Unguided(sampler.transition), problem("ring", SHORT, 6)).latents
    assert torch.equal(run(sampler, task).latents, plain)


@pytest.mark.parametrize("sampler", [FKSteering(1, transition=ANCESTRAL), SVDD(1, transition=ANCESTRAL)])
def test_one_particle_is_the_unguided_run(sampler: Any) -> None:
    plain = run(Unguided(ANCESTRAL), problem("ring", SHORT, 6)).latents
    assert torch.equal(run(sampler, problem("ring", SHORT, 6)).latents, plain)


@pytest.mark.parametrize(
    "sampler",
    [FKSteering(6, transition=ANCESTRAL), SVDD(4, 3, 1.0, ANCESTRAL), TwistedSMC(4, transition=ANCESTRAL)],
)
def test_prompts_are_independent_and_shifts_of_the_reward_change_nothing(sampler: Any) -> None:
    together = run(sampler, problem("ring", SHORT, 7)).latents
    for row in (0, 3, 6):
        task = problem("ring", SHORT, 7)
        task.denoiser.prompts[:] = [f"point {row}"]
        task.streams = RandomStreams.for_prompts(0, [f"point {row}"])
        assert torch.equal(run(sampler, task).latents[0], together[row])
    shifted = problem("ring", SHORT, 7)
    value_of, reward_of = shifted.value.inner, CASES["ring"][1]

    class Shifted(ConstantValue):
        def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
            assert value_of is not None
            return value_of(x, level, rows) + 64.0  # a power of two, so that rounding stays the same

    shifted.value, shifted.reward = Shifted(), lambda x, p: reward_of(x, p) + 64.0  # type: ignore[misc]
    assert torch.allclose(run(sampler, shifted).latents, together)


def test_a_block_as_long_as_the_run_is_best_of_n() -> None:
    code, best = SVDD(4, 8, transition=ANCESTRAL), BestOfN(4, ANCESTRAL)
    assert torch.equal(run(code, problem("ring", SHORT, 5)).latents, run(best, problem("ring", SHORT, 5)).latents)
    stepwise = run(StepwiseSampling(4, ANCESTRAL), problem("ring", SHORT, 5))
    svdd = run(SVDD(4, transition=ANCESTRAL), problem("ring", SHORT, 5))
    assert torch.equal(svdd.latents, stepwise.latents), "a block of one level is step-wise sampling"
    assert svdd.ledger.evaluations == stepwise.ledger.evaluations


# --- published bugs ---


def test_increments_are_carried_when_no_resampling_is_due() -> None:
    """A threshold that is never reached: the final weights must be those of the final rewards alone."""
    output = run(FKSteering(8, threshold=1e-6, transition=ANCESTRAL), problem("ring", SHORT, 4))
    rewards = torch.tensor(output.trace["candidates"]["rewards"], dtype=torch.float64)
    weights = torch.tensor(output.trace["candidates"]["log_weights"], dtype=torch.float64)
    assert torch.allclose(weights, rewards.log_softmax(-1))
    assert all(entry["ancestors"] == [list(range(8))] * 4 for entry in output.trace["levels"])


def test_huge_rewards_neither_overflow_nor_tie() -> None:
    task = problem("ring", SHORT, 4)
    mild = CASES["ring"][1]
    task.reward = lambda x, p: 1e5 * mild(x, p)  # type: ignore[misc]
    output = run(FKSteering(8, temperature=1.0, transition=ANCESTRAL), task)
    assert output.latents.isfinite().all() and output.log_normalizer is not None
    assert output.log_normalizer.isfinite().all()
    rewards = torch.tensor(output.trace["candidates"]["rewards"])
    assert torch.equal(torch.tensor(output.trace["candidates"]["chosen"]), rewards.argmax(1)), "its weight is one"


def test_the_last_step_weighs_and_every_prompt_gets_its_sample() -> None:
    output = run(FKSteering(8, returned="sample", window=(0.999, 1.0), transition=ANCESTRAL), problem("ring", SHORT, 9))
    assert output.latents.shape == (9, 2) and not output.trace["levels"]
    weights = torch.tensor(output.trace["candidates"]["log_weights"])
    assert (weights.std(1) > 0.1).all(), "particles that were never resampled still count by their rewards"


@pytest.mark.parametrize("sampler", [partial(FKSteering, interval=1), TwistedSMC], ids=["fk-steering", "smc"])
def test_an_interrupted_run_returns_a_particle_that_survived(sampler: Any) -> None:
    task = problem("ring", SHORT, 40, exact=True)
    predict, seen = task.denoiser.predict, []

    def recorded(x: Tensor, level: int, rows: Tensor | None = None) -> Prediction:
        seen.append(predict(x, level, rows))
        return seen[-1]

    def interrupt(progress: Any) -> None:
        if progress.level == 5:
            raise KeyboardInterrupt

    object.__setattr__(task.denoiser, "predict", recorded)
    task.progress = interrupt
    output = run(sampler(4, temperature=0.1, transition=ANCESTRAL, threshold=1.0), task)
    ancestors = output.trace["levels"][-1]["ancestors"]
    assert any(len(set(row)) < 4 for row in ancestors), "some died"
    for b, survivors in enumerate(ancestors):
        assert any(torch.equal(output.latents[b], seen[-1].x0[b * 4 + a]) for a in survivors)


def test_budgets_interruptions_and_bad_input() -> None:
    once = SHORT.steps + 0.5 * 7
    output = run(FKSteering(8, transition=ANCESTRAL), problem("ring", SHORT, 3, evaluations=3.2 * once))
    assert len(output.trace["candidates"]["rewards"][0]) == 3 and output.ledger.stopped == "budget"
    assert output.ledger.evaluations <= 3 * 3.2 * once

    def interrupt(progress: Any) -> None:
        if progress.level == 3:
            raise KeyboardInterrupt

    for sampler in (FKSteering(4, transition=ANCESTRAL), SVDD(4, transition=ANCESTRAL)):
        task = problem("ring", SHORT, 3)
        task.progress = interrupt
        output = run(sampler, task)
        assert output.ledger.stopped == "interrupted" and output.latents.isfinite().all()
        assert output.latents.shape == (3, 2)
    for options, words in (
        ({"particles": 0}, "particles must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"threshold": 1.5}, r"in \(0, 1\]"),
        ({"potential": "product"}, "potential must be one of"),
        ({"transition": Transition("ode")}, "stochastic"),
    ):
        with pytest.raises(ValueError, match=words):
            FKSteering(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="block must be at least 1"):
        SVDD(block=0)


@pytest.mark.parametrize("chain", [False, True])
@pytest.mark.parametrize("name", ["fk-steering", "smc", "psi"])
def test_final_weights_are_those_of_the_tempered_reward(name: str, chain: bool) -> None:
    """Without resampling, and less what the chain of starts has paid for; on noise that is not pure, where values differ."""
    options: dict[str, Any] = {"temperature": 0.5, "threshold": 1e-6, "transition": ANCESTRAL}
    if name == "psi":
        options["initial"] = CrankNicolson(2, 2, 1) if chain else None
    task = problem("ring", NoiseSchedule.variance_preserving(8, start=0.3) if chain else SHORT, 4)
    if name == "smc":
        task.value = ConstantValue()  # proposes as the base model does
    trace = run(rg.make_sampler(name, particles=8, **options), task).trace
    rewards, weights = (torch.tensor(trace["candidates"][k], dtype=torch.float64) for k in ("rewards", "log_weights"))
    paid = torch.tensor(trace["chain"]["values"]) if "chain" in trace else 0.0
    assert torch.allclose(weights, ((rewards - paid) / 0.5).log_softmax(-1), atol=1e-4)


def test_a_cold_draw_of_svdd_is_greedy() -> None:
    greedy, cold = (SVDD(4, temperature=t, transition=ANCESTRAL) for t in (0.0, 1e-9))
    assert torch.equal(run(cold, problem("ring", SHORT, 20)).latents, run(greedy, problem("ring", SHORT, 20)).latents)

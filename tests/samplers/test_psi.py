"""Psi-Sampler: the chain's stationary law against quadrature, the target against the exact posterior, and identities."""

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import rsm_guidance as rg
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import Transition
from rsm_guidance.oracles.mixture import expected_reward, tilt
from rsm_guidance.samplers import TwistedSMC, Unguided
from rsm_guidance.samplers.psi import CrankNicolson, PsiSampler
from rsm_guidance.samplers.run import run
from tests.samplers.cases import ANCESTRAL, CASES, SHORT, ConstantValue, exhausted, problem, weighted_reward

LATE = NoiseSchedule.variance_preserving(8, start=0.3)  # its noisiest level knows something of the data
CHAIN = CrankNicolson(2, 3, 1)


class Bumpy(ConstantValue):
    """A value of pure noise with two unequal bumps."""

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        return (1.5 * torch.sin(2 * x.double()) - 0.3 * (x.double() - 0.5) ** 2)[:, 0]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(
    "chain",
    [
        CrankNicolson(2, 40, 4, rho=0.5),
        CrankNicolson(2, 60, 4, rho=0.8),
        CrankNicolson(2, 200, 4, rho=0.5, gradient=True),
        CrankNicolson(2, 200, 4, rho=0.8, gradient=True),
    ],
)
def test_the_stationary_law_of_the_chain_is_the_tilted_prior(chain: CrankNicolson, temperature: float) -> None:
    grid = torch.linspace(-8, 8, 20_001, dtype=torch.float64)[:, None]
    log_density = -0.5 * grid[:, 0] ** 2 + Bumpy()(grid, 0, torch.zeros(0)) / temperature
    weights = log_density.softmax(0)
    exact = [float((weights * f(grid[:, 0])).sum()) for f in (lambda x: x, lambda x: x**2, lambda x: (x > 0).double())]
    task = problem("linear", SHORT, 150)
    task.value = Bumpy()
    x, values, taken = exhausted(chain.draw(task, 8, temperature))
    assert x.shape == (8 * 150, 1) and values.shape == (150, 8)
    assert torch.allclose(values, Bumpy()(x, 0, torch.zeros(0)).view(150, 8))
    for f, wanted in zip((lambda x: x, lambda x: x**2, lambda x: (x > 0).double()), exact, strict=True):
        means = f(x[:, 0]).view(150, 8).mean(1)  # rows are independent, the states of one are not
        assert abs(float(means.mean()) - wanted) < 4 * float(means.std()) / math.sqrt(150), f
    assert 0.1 < taken.mean() < 0.999


def test_burn_in_and_thinning_keep_the_states_that_they_name() -> None:
    """Chains of one seed make the same moves, whatever is kept of them."""

    def states(chain: CrankNicolson, count: int) -> Tensor:
        task = problem("linear", SHORT, 5)
        task.value = Bumpy()
        return exhausted(chain.draw(task, count, 1.0))[0].view(5, count // 2, 2)

    every = states(CrankNicolson(2, 0, 1), 28)  # two chains, and all 14 states of each
    assert (every[:, 1:] != every[:, :-1]).any(2).float().mean() > 0.9, "the chains move"
    for burn_in, thin in ((0, 3), (4, 1), (2, 3), (5, 2)):
        kept = states(CrankNicolson(2, burn_in, thin), 8)
        places = [burn_in + thin * (i + 1) - 1 for i in range(4)]
        assert torch.equal(kept, every[:, places]), (burn_in, thin)
    assert CrankNicolson(2, 5, 2).moves(8) == 13


def test_the_acceptance_ratio_is_that_of_the_written_out_densities() -> None:
    """log pi(x') q(x | x') - log pi(x) q(x' | x), the values aside, for starts of standard deviation 3."""
    generator = torch.Generator().manual_seed(0)
    x, y, g, h = torch.randn(4, 5, 7, generator=generator, dtype=torch.float64)
    chain, scale = CrankNicolson(rho=0.6, gradient=True), 3.0

    def move(start: Tensor, slope: Tensor, end: Tensor) -> Tensor:
        push = math.sqrt(1 - 0.36) * math.sqrt(4 * 0.4 / 1.6) / 2 * scale**2
        law = torch.distributions.Normal(0.6 * start + push * slope, math.sqrt(1 - 0.36) * scale)
        return law.log_prob(end).sum(1)

    prior = torch.distributions.Normal(0.0, scale)
    expected = (prior.log_prob(y) - prior.log_prob(x)).sum(1) + move(y, h, x) - move(x, g, y)
    assert torch.allclose(chain.correction(x, y, g, h, scale), expected)


def test_a_gradient_raises_the_share_of_moves_taken_and_a_flat_value_takes_all() -> None:
    class Slope(ConstantValue):
        def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
            return 2 * x.double().sum(1)

    task = problem("ring", SHORT, 100)
    task.value = Slope()
    shares = [exhausted(CrankNicolson(1, 20, 1, gradient=g).draw(task, 20, 1.0))[2].mean() for g in (False, True)]
    assert shares[0] < shares[1]
    task.value = ConstantValue()
    x, _, taken = exhausted(CrankNicolson(2, 5, 1).draw(task, 20, 1.0))
    assert bool((taken == 1).all()) and abs(float(x.var()) - 1) < 0.06, "noise stays noise"


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("initial", [None, CrankNicolson(4, 10, 2), CrankNicolson(4, 6, 1, gradient=True)])
def test_particles_target_the_tilted_posterior(initial: CrankNicolson | None, gradient: bool) -> None:
    mixture, reward = CASES["linear"]
    exact = float(expected_reward(tilt(mixture, reward)[0], reward))
    sampler = PsiSampler(64, initial=initial, gradient=gradient, transition=ANCESTRAL)
    output = run(sampler, problem("linear", NoiseSchedule.flow(40), 40))
    mean, error = weighted_reward(output)
    assert abs(mean - exact) < 3 * error + 0.04
    assert (output.log_normalizer is None) == (initial is not None)


def test_the_chains_potential_is_paid_for() -> None:
    """Were V(x_T) counted twice, the mean reward would lie far above that of the target."""
    mixture, reward = CASES["linear"]
    exact = float(expected_reward(tilt(mixture, reward)[0], reward))
    task = problem("linear", SHORT, 40)

    class Opinionated(ConstantValue):
        def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
            assert inner is not None
            return 2 * x.double()[:, 0] if level == 0 else inner(x, level, rows)

    inner, task.value = task.value.inner, Opinionated()
    ode_like = Transition("cps", 0.3)  # the start decides where the sample ends
    mean, error = weighted_reward(run(PsiSampler(64, initial=CrankNicolson(8, 10, 1), transition=ode_like), task))
    plain, _ = weighted_reward(run(PsiSampler(256, initial=None, transition=ode_like), problem("linear", SHORT, 40)))
    assert abs(mean - plain) < 3 * error + 0.1 and abs(plain - exact) < 0.6


def test_without_a_chain_it_is_twisted_smc_and_a_constant_reward_is_the_unguided_run() -> None:
    smc = run(TwistedSMC(4, transition=ANCESTRAL), problem("ring", SHORT, 5))
    psi = run(PsiSampler(4, initial=None, gradient=True, transition=ANCESTRAL), problem("ring", SHORT, 5))
    assert torch.equal(psi.latents, smc.latents) and psi.trace["candidates"] == smc.trace["candidates"]
    plain = run(Unguided(ANCESTRAL), problem("ring", SHORT, 6)).latents
    for gradient in (False, True):
        task = problem("ring", SHORT, 6)
        task.value, task.reward = ConstantValue(), lambda x, p: torch.zeros(len(x))
        sampler = PsiSampler(4, initial=None, gradient=gradient, transition=ANCESTRAL)
        assert torch.equal(run(sampler, task).latents, plain)
    one = run(PsiSampler(1, initial=None, transition=ANCESTRAL), problem("ring", SHORT, 6))
    assert torch.equal(one.latents, plain)


def test_it_climbs_and_the_trace_tells_of_the_chain() -> None:
    output = run(PsiSampler(4, initial=CHAIN, transition=ANCESTRAL), problem("ring", SHORT, 100))
    plain = run(Unguided(ANCESTRAL), problem("ring", SHORT, 100)).rewards
    assert output.rewards is not None and plain is not None and output.rewards.mean() > plain.mean() + 3
    trace = json.loads(json.dumps(output.trace))
    assert len(trace["chain"]["values"][0]) == 4 and trace["sampler"]["initial"]["rho"] == 0.8
    assert len(trace["levels"]) == SHORT.steps


@pytest.mark.parametrize("gradient", [False, True])
def test_prompts_are_independent(gradient: bool) -> None:
    sampler = PsiSampler(3, initial=CrankNicolson(2, 2, 1, gradient=gradient), transition=ANCESTRAL)
    together = run(sampler, problem("ring", LATE, 5)).latents
    for row in (0, 3):
        task = problem("ring", LATE, 5)
        task.denoiser.prompts[:] = [f"point {row}"]
        task.streams = RandomStreams.for_prompts(0, [f"point {row}"])
        assert torch.equal(run(sampler, task).latents[0], together[row])


@pytest.mark.parametrize("cap", [8.0, 12.0, 21.0, 60.0])
@pytest.mark.parametrize("gradient", [False, True])
def test_budget_is_a_hard_cap(gradient: bool, cap: float) -> None:
    sampler = PsiSampler(8, initial=CrankNicolson(2, 3, 1, gradient=gradient), gradient=gradient, transition=ANCESTRAL)
    output = run(sampler, problem("ring", SHORT, 3, evaluations=cap))
    assert output.ledger.evaluations <= 3 * cap and output.ledger.stopped == "budget"
    assert output.rewards is not None and output.trace["sampler"]["name"] == "psi"


def test_an_interrupted_run_returns_its_estimate() -> None:
    def interrupt(progress: Any) -> None:
        if progress.level == 3:
            raise KeyboardInterrupt

    task = problem("ring", SHORT, 3)
    task.progress = interrupt
    output = run(PsiSampler(4, initial=CHAIN), task)
    assert output.ledger.stopped == "interrupted" and output.latents.isfinite().all()


@pytest.mark.parametrize("gradient", [False, True])
def test_through_the_pipeline(guided: Any, drm: rg.DiffusionRewardModel, gradient: bool) -> None:
    call = {"num_inference_steps": 6, "guidance_scale": 3.0, "output_type": "latent", "seed": 1}
    prompts = ["two red circles and a blue square", "a red star", "three green squares"]
    plain = guided(prompt=prompts, sampler=rg.Unguided(Transition("cps", 0.9)), reward=drm, **call)
    sampler = PsiSampler(4, initial=CrankNicolson(2, 1, 1, gradient=gradient), gradient=gradient)
    steered = guided(prompt=prompts, sampler=sampler, reward=drm, **call)
    assert steered.images.isfinite().all() and not torch.allclose(steered.images, plain.images, atol=0.1)
    table = steered.trace["candidates"]
    assert steered.rewards == [row[i] for row, i in zip(table["rewards"], table["chosen"], strict=True)]
    assert steered.log_weights == table["log_weights"] and steered.log_normalizer is None
    values, taken = (torch.tensor(steered.trace["chain"][name]) for name in ("values", "accepted"))
    assert values.shape == (3, 4) and bool((taken > 0).any())
    alone = guided(prompt=prompts[2:], sampler=sampler, reward=drm, **call)
    assert torch.allclose(alone.images[0], steered.images[2], atol=1e-2)


def test_bad_input() -> None:
    for options, words in (
        ({"particles": 0}, "particles must be at least 1"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"threshold": 1.5}, r"in \(0, 1\]"),
        ({"resampling": "none"}, "resampling must be one of"),
        ({"transition": Transition("ode")}, "copies of a particle have to part"),
    ):
        with pytest.raises(ValueError, match=words):
            PsiSampler(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chains and thin must be at least 1"):
        CrankNicolson(0)
    with pytest.raises(ValueError, match="rho must be in"):
        CrankNicolson(rho=1.0)
    task = problem("ring", SHORT, 1)
    task.value = None
    with pytest.raises(ValueError, match="scores noisy latents"):
        run(PsiSampler(), task)

"""Reverse matching: the log-ratio identity, ratio 1 on policy, time weights and what they do to the strength of guidance."""

import math

import pytest
import torch

from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import CPS, DDIM, FlowSDE, Gaussian, GaussianTransition
from rsm_guidance.oracles.mixture import GaussianMixture, GaussianMixtureDenoiser
from rsm_guidance.rollouts import collect
from rsm_guidance.training.alignment.forms.reverse import log_ratio, step_log_ratio
from rsm_guidance.training.alignment.levels import StepGeometry, geometry
from rsm_guidance.training.alignment.time_weights import ZETA, reverse_strength, step_scale
from rsm_guidance.training.alignment.trust_regions import clipped, hinge, kl_mask, mean_penalty, ratio_clip

SD3 = NoiseSchedule.flow(10, shift=3.0)
MIXTURE = GaussianMixture.from_weights([1.0, 2.0, 1.0], [[-2.0, 0.0], [1.0, 1.0], [0.0, -2.0]], 0.3)
NOISY = [FlowSDE(0.7), DDIM(1.0), CPS(0.8)]


def rollout(transition: GaussianTransition, schedule: NoiseSchedule) -> list:
    denoiser = GaussianMixtureDenoiser(MIXTURE, schedule, ["a", "b"])
    steps = collect(denoiser, RandomStreams.for_prompts(0, denoiser.prompts), transition, group=3).stochastic
    return [s for s in steps if s.gaussian(schedule).std > 0]


def moved(p: Prediction, schedule: NoiseSchedule, level: int, by: float) -> Prediction:
    """What a model says whose velocity, or noise where the schedule is no flow, differs by a pattern of some size."""
    alpha, sigma = schedule.coefficients(level)
    change = by * torch.sin(torch.arange(p.x.numel(), dtype=p.x.dtype)).view_as(p.x)
    if p.velocity is None:
        return Prediction(p.x, p.x0 - sigma / alpha * change, p.eps + change)
    return Prediction(p.x, p.x0 - sigma * change, p.eps + alpha * change, p.velocity + change)


WORLDS = [(t, SD3) for t in NOISY] + [(t, NoiseSchedule.variance_preserving(8)) for t in NOISY[1:]]


@pytest.mark.parametrize(("transition", "schedule"), WORLDS)
def test_the_log_ratio_is_the_difference_of_log_densities(
    transition: GaussianTransition, schedule: NoiseSchedule
) -> None:
    for step in rollout(transition, schedule):
        new = moved(step.prediction, schedule, step.level, 0.1)
        expected = step.log_prob(schedule, new) - step.log_prob(schedule)
        laws = step.gaussian(schedule, new), step.gaussian(schedule)
        summed = step_log_ratio(*laws, step.next, reduction="sum")
        assert torch.allclose(summed, expected, atol=1e-6)
        assert torch.allclose(step.log_ratio(schedule, new), summed, atol=1e-6)
        assert torch.allclose(step_log_ratio(*laws, step.next), expected / 2, atol=1e-6)  # two dimensions
        assert float(summed.abs().max()) > 1e-4


@pytest.mark.parametrize("transition", NOISY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ratio_is_exactly_one_on_policy_whatever_the_micro_batch(
    transition: GaussianTransition, dtype: torch.dtype
) -> None:
    for step in rollout(transition, SD3):
        p = Prediction(
            *(
                x.to(dtype)
                for x in (step.prediction.x, step.prediction.x0, step.prediction.eps, step.prediction.velocity)
            )
        )
        law = transition(p, SD3, step.level, step.target)
        reached = law.sample(step.noise)
        assert reached.dtype == dtype
        for size in (1, 2, 5, 6):
            for rows in torch.arange(len(p.x)).split(size):
                again = transition(p.pick(rows), SD3, step.level, step.target)
                old = Gaussian(law.mean[rows], law.std, law.dtype)
                assert step_log_ratio(again, old, reached[rows]).abs().max() == 0


def test_laws_of_other_noise_are_refused() -> None:
    zero = torch.zeros(1, 2)
    with pytest.raises(ValueError, match="transition and levels that it was recorded with"):
        step_log_ratio(Gaussian(zero, 0.5), Gaussian(zero, 0.4), zero)


@pytest.mark.parametrize("a", [0.3, 0.7, math.sqrt(2)])
def test_gamma_of_the_flow_sde(a: float) -> None:
    for level in range(1, 9):
        step = geometry(FlowSDE(a), SD3, level, level + 1)
        assert step.gamma == pytest.approx(a**2 / (1 + a**2 / 2), rel=1e-6)
        assert step.weight == pytest.approx(math.sqrt(step.drop) / step.diffusion * (1 + a**2 / 2), rel=1e-6)
    assert geometry(FlowSDE(math.sqrt(2)), SD3, 4, 5).gamma == pytest.approx(1, rel=1e-6)


def test_published_numbers_of_ten_levels_of_sd3() -> None:
    """Its table starts at sigma = 1 and ends at 0.0089; the interior is quoted."""
    sigma = torch.tensor([1, 0.9601, 0.9133, 0.8577, 0.7904, 0.7073, 0.6022, 0.4649, 0.2780, 0.0089, 0])
    schedule = NoiseSchedule(1 - sigma, sigma, 1000 * sigma)
    steps = [geometry(FlowSDE(0.7), schedule, i, i + 1) for i in range(9)]
    assert [s.std for s in steps] == pytest.approx(
        [0.70, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225], abs=2e-3
    )
    assert [s.weight for s in steps[1:]] == pytest.approx(
        [0.078, 0.129, 0.188, 0.264, 0.371, 0.536, 0.825, 1.487], abs=2e-3
    )


def shape(values: list[float]) -> list[float]:
    return [v / values[-1] for v in values]


@pytest.mark.parametrize(
    ("weight", "region", "follows"),
    [
        ("flow-grpo", "ratio", lambda s: s.drop),
        ("pcpo", "ratio", lambda s: s.drop * s.std),
        ("tempflow", "ratio", lambda s: s.drop * s.std),
        ("tempflow", "hinge", lambda s: s.drop * s.std),
        ("fair-clip", "hinge", lambda s: s.drop),
        ("fair-clip-2", "hinge", lambda s: s.std),
        ("guard", "ratio", lambda s: s.std),
        ("guard-unscaled", "ratio", lambda s: s.drop * s.std),
    ],
)
def test_realised_strengths(weight: str, region: str, follows) -> None:
    """The published reading: D for Flow-GRPO, D S for PCPO and TempFlow; fair clip 2 lifts noisy steps to S."""
    steps = [geometry(FlowSDE(0.7), SD3, level, level + 1) for level in range(1, 9)]
    found = [reverse_strength(s, step_scale(weight, s, region)) for s in steps]  # type: ignore[arg-type]
    assert shape(found) == pytest.approx(shape([follows(s) for s in steps]), rel=1e-6)


def test_the_strength_is_the_gradient_it_says_it_is() -> None:
    """E[A e] = S grad V for an advantage that is linear in the next state; the loss then pulls v along grad V by h."""
    generator = torch.Generator().manual_seed(0)
    for weight in ("flow-grpo", "pcpo", "guard", "fair-clip-2"):
        step = geometry(FlowSDE(0.7), SD3, 5, 6)
        scale = step_scale(weight, step, "hinge")
        noise = torch.randn(20_000, 1, generator=generator, dtype=torch.float64)
        noise = torch.cat([noise, -noise]) / noise.square().mean().sqrt()
        advantage = (step.std * noise * 3.0).squeeze(1)  # V(x') = 3 x'
        v = torch.zeros((), dtype=torch.float64, requires_grad=True)
        shift = (-step.response * v / step.std).expand_as(noise)
        loss = (scale.outer * -advantage * log_ratio(shift, noise, scale)).mean()
        (gradient,) = torch.autograd.grad(loss, v)
        assert float(gradient) == pytest.approx(3.0 * reverse_strength(step, scale), rel=1e-6)


def test_guard_is_the_official_ratio() -> None:
    step, generator = geometry(FlowSDE(0.7), SD3, 5, 6), torch.Generator().manual_seed(1)
    shift, noise = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    change = (shift * noise - shift.square() / 2).mean(1)  # mean log-ratio over dimensions
    bias = (step.std * shift).square().mean(1) / (2 * step.std**2)
    scale = step_scale("guard", step)
    assert torch.allclose(log_ratio(shift, noise, scale), (change + bias) * step.std)
    assert scale.outer == pytest.approx(1 / step.drop)


def test_pcpo_recomputes_the_ratio_with_its_own_weight() -> None:
    step = geometry(FlowSDE(0.7), SD3, 5, 6)
    dv, noise = torch.full((1, 3), 0.2, dtype=torch.float64), torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64)
    w = ZETA * step.drop
    expected = -((w * dv).square() / 2 + w * dv * noise).mean(1)
    assert torch.allclose(log_ratio(-step.weight * dv, noise, step_scale("pcpo", step)), expected)


def test_hinge_and_clip_agree_on_policy_and_stop_in_the_same_place() -> None:
    advantage = torch.tensor([2.0, -1.0, 2.0, -1.0, 2.0, -1.0], dtype=torch.float64)
    for at in ([0.0] * 6, [0.2, -0.2, -0.2, 0.2, 0.05, -0.05]):
        gradients = []
        for region in (hinge, ratio_clip):
            x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
            gradients.append(torch.autograd.grad(region(x, advantage, 0.1).sum(), x)[0])
        assert torch.equal(gradients[0] == 0, gradients[1] == 0)
        assert torch.equal(gradients[0] == 0, clipped(torch.tensor(at), advantage, 0.1))
        if not any(at):
            assert torch.allclose(gradients[0], -advantage) and torch.allclose(gradients[1], -advantage)


def test_kl_mask_lets_steps_come_back() -> None:
    x = torch.tensor([0.1, -0.1, 0.1], dtype=torch.float64, requires_grad=True)
    loss = kl_mask(x, torch.tensor([1.0, 1.0, 1.0]), torch.tensor([2e-5, 2e-5, 1e-6]), 1e-5)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert (gradient == 0).tolist() == [True, False, False]


@pytest.mark.parametrize(("name", "divisor"), [("variance", "std"), ("diffusion", "diffusion"), ("one", None)])
def test_a_hold_to_the_reference_has_the_closed_form_of_its_name(name: str, divisor: str | None) -> None:
    step: StepGeometry = geometry(FlowSDE(0.7), SD3, 5, 6)
    by = 1.0 if divisor is None else getattr(step, divisor) ** 2
    shift = torch.full((2, 3, 4), 0.1 * step.response, dtype=torch.float64)  # dv = 0.1
    found = mean_penalty(shift, torch.zeros_like(shift), step, name)  # type: ignore[arg-type]
    assert found.tolist() == pytest.approx([(0.1 * step.response) ** 2 / (2 * by)] * 2)


def test_a_hold_to_the_reference_changes_gradients_as_finite_differences_say() -> None:
    step, generator = geometry(FlowSDE(0.7), SD3, 5, 6), torch.Generator().manual_seed(0)
    mean, reference, noise = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)

    def loss(mu: torch.Tensor, weight: float) -> torch.Tensor:
        ratio = log_ratio((mu - mean.detach()) / step.std, noise)
        return (
            ratio_clip(ratio, torch.tensor([1.0, -1.0]), 0.1) + weight * mean_penalty(mu, reference, step, "variance")
        ).mean()

    gradients = []
    for weight in (0.0, 1.0):
        mu = mean.clone().requires_grad_()
        gradients.append(torch.autograd.grad(loss(mu, weight), mu)[0])
    assert not torch.allclose(gradients[0], gradients[1])
    assert torch.autograd.gradcheck(
        lambda mu: mean_penalty(mu, reference, step, "variance").mean(), mean.clone().requires_grad_()
    )

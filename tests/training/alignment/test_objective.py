"""Every preset composes: its loss on a toy step or sample pulls towards what was rewarded, and its holds act."""

import math

import pytest
import torch
from torch import Tensor

from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import Gaussian, parse_transition
from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.levels import geometry
from rsm_guidance.training.alignment.objective import (
    Holds,
    Matched,
    coefficients,
    forward_loss,
    implicit_loss,
    path_loss,
    reverse_loss,
    step_pair_loss,
    strengths,
)
from rsm_guidance.training.alignment.read import presets, read_align
from tests.training.alignment.worlds import chosen

R, D = 6, 5
GROUPS = torch.arange(R) // 2
ADVANTAGE = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], dtype=torch.float64)
FLOW = NoiseSchedule.flow(10, shift=3.0)


def configs(family: str) -> list[str]:
    return [n for n in presets() if read_align(name=n, options=chosen(n)).form.family == family]


def load(name: str, **options) -> AlignConfig:
    return read_align(name=name, options=chosen(name) | options)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def recorded(config: AlignConfig) -> tuple:
    """A step of the flow: its geometry, law of the old policy, noise and latents, and a law of moved velocities."""
    transition = parse_transition(config.rollout.transition)
    step = geometry(transition, FLOW, 4, 5)
    x, x0, noise = normal(0, R, D), normal(1, R, D), normal(2, R, D)
    alpha, sigma = FLOW.coefficients(4)

    def law(change: Tensor | float) -> Gaussian:
        velocity = (x - x0) / sigma + change
        return transition(Prediction(x, x - sigma * velocity, x + alpha * velocity, velocity), FLOW, 4, 5)

    old = law(0.0)
    return step, law, old, old.sample(noise), noise


@pytest.mark.parametrize("name", configs("reverse"))
def test_policy_gradients_make_what_was_rewarded_more_likely(name: str) -> None:
    config = load(name)
    step, law, old, reached, _ = recorded(config)
    change = torch.zeros(R, D, dtype=torch.float64, requires_grad=True)
    terms = reverse_loss(config, step, law(change), old, reached, ADVANTAGE, reference=old)
    assert terms.log["log_ratio"].abs().max() == 0 and terms.log["divergence"].max() == 0
    (gradient,) = torch.autograd.grad(terms.loss.sum(), change)
    after = law(-1e-3 * gradient / gradient.abs().max())
    z_old, z_new = ((reached - m.mean) / old.std for m in (old, after))
    more_likely = (z_old.square() - z_new.square()).sum(1)
    assert ((more_likely * ADVANTAGE) > 0).all()


@pytest.mark.parametrize("name", [n for n in configs("reverse") if load(n).trust.reference == "mean"])
def test_holds_of_policy_gradients_change_gradients(name: str) -> None:
    config = load(name)
    step, law, old, reached, _ = recorded(config)
    found = []
    for held in (torch.ones(R, dtype=torch.bool), torch.arange(R) < 3):
        change = torch.full((R, D), 0.01, dtype=torch.float64, requires_grad=True)
        terms = reverse_loss(config, step, law(change), old, reached, 0 * ADVANTAGE, law(0.0), holds=Holds(rows=held))
        found.append(torch.autograd.grad(terms.loss.sum(), change)[0])
    assert found[0].abs().min() > 0
    assert torch.equal(found[1][:3], found[0][:3]) and (found[1][3:] == 0).all()


def test_velocities_of_policy_gradients_can_be_held_too() -> None:
    hold = {"reference": "velocity", "denominator": None, "reference_weight": 2.0, "norm_weight": 1.0}
    config = load("flow-grpo", trust=hold)
    step, law, old, reached, _ = recorded(config)
    v = torch.full((R, D), 2.0, dtype=torch.float64, requires_grad=True)
    holds = Holds(reference=torch.ones(R, D, dtype=torch.float64))
    terms = reverse_loss(config, step, old, old, reached, 0 * ADVANTAGE, velocity=v, holds=holds)
    assert terms.loss.tolist() == pytest.approx([2 * 1 + 1.0] * R)
    with pytest.raises(ValueError, match="reference velocity"):
        reverse_loss(config, step, old, old, reached, 0 * ADVANTAGE, velocity=v)


def matched(config: AlignConfig, velocity: Tensor, old: Tensor, rewards: Tensor) -> Matched:
    sigma = torch.linspace(0.2, 0.8, 3, dtype=torch.float64).repeat_interleave(2)
    c = coefficients(config, rewards, ADVANTAGE, GROUPS)
    return Matched(velocity, normal(4, R, D), 1 - sigma, sigma, c, GROUPS, old, Holds(old, old))


@pytest.mark.parametrize("name", configs("forward"))
def test_forward_matching_prefers_what_was_rewarded(name: str) -> None:
    config = load(name)
    old, rewards = normal(3, R, D), torch.tensor([0.9, 0.1, 0.6, 0.2, 0.9, 0.05], dtype=torch.float64)
    v = old.clone().requires_grad_()
    rows = matched(config, v, old, rewards)
    (gradient,) = torch.autograd.grad(forward_loss(config, rows).loss.sum(), v)
    toward = -(gradient * (rows.target - old)).sum(1)
    assert (toward[0::2] > toward[1::2]).all()
    assert (toward[0::2] > 0).all()


@pytest.mark.parametrize("name", configs("forward"))
def test_micro_batches_change_nothing(name: str) -> None:
    config = load(name)
    old, rewards = normal(3, R, D), torch.rand(R, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v = (old + 0.05 * normal(5, R, D)).requires_grad_()
    rows = matched(config, v, old, rewards)
    (whole,) = torch.autograd.grad(forward_loss(config, rows).loss.sum(), v)
    size = 2 if config.form.whole_groups else 1
    parts = torch.zeros_like(whole)
    for index in torch.arange(R).split(size):
        part = Matched(
            v[index], rows.target[index], rows.alpha[index], rows.sigma[index], rows.coefficient[index],
            torch.zeros(len(index), dtype=torch.int64), old[index], Holds(old[index], old[index]),
        )  # fmt: skip
        parts += torch.autograd.grad(forward_loss(config, part).loss.sum(), v, retain_graph=True)[0]
    assert torch.allclose(parts, whole)


@pytest.mark.parametrize("name", ["dpo", "flow-dpo", "gdro"])
def test_pairs_and_groups(name: str) -> None:
    config = load(name)
    reference = normal(6, 3, config.rollout.group).square()
    rewards = normal(7, 3, config.rollout.group)
    errors = reference.clone().requires_grad_()
    terms = implicit_loss(config, errors, reference, rewards)
    if config.form.name == "dpo":
        assert terms.loss.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-6)
    assert (terms.log["margin"] == 0).all()
    (gradient,) = torch.autograd.grad(terms.loss.sum(), errors)
    best, worst = rewards.argmax(1, keepdim=True), rewards.argmin(1, keepdim=True)
    assert (gradient.gather(1, best) > 0).all() and (gradient.gather(1, worst) < 0).all()


def test_a_proximal_hold_pulls_back_to_its_anchor() -> None:
    config = load("awm", trust={"reference": "none", "reference_weight": None, "proximal_weight": 3.0})
    v, anchor = normal(3, R, D).requires_grad_(), normal(8, R, D)
    rows = matched(config, v, v.detach(), ADVANTAGE)
    still = Matched(
        v, rows.target, rows.alpha, rows.sigma, 0 * rows.coefficient, GROUPS, rows.old, Holds(proximal=anchor)
    )
    (gradient,) = torch.autograd.grad(forward_loss(config, still).loss.sum(), v)
    assert torch.allclose(gradient, 3 * 2 * (v - anchor).detach() / D)


def test_paths_regress_on_differences_of_rewards() -> None:
    config = load("prdp")
    rewards = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    at = [[[0.1, 0.1], [0.0, 0.0]]]  # implies a difference of 0.2 = (3 - 1) / 10
    right = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    assert float(path_loss(config, right, right, rewards).loss.detach()) == pytest.approx(0)
    start = torch.zeros(1, 2, 2, dtype=torch.float64, requires_grad=True)
    terms = path_loss(config, start, start, rewards)
    assert float(terms.loss.detach()) == pytest.approx(0.04)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), start)
    assert (gradient[0, 0] < 0).all() and (gradient[0, 1] > 0).all()
    far = torch.tensor([[[0.5, 0.0], [0.0, 0.0]]], dtype=torch.float64, requires_grad=True)
    clipped = path_loss(config, far, torch.zeros_like(far), rewards).loss  # 0.5 is cut to 0.1: the larger miss counts
    assert float(clipped.detach()) == pytest.approx(0.09)


def test_children_are_paired_where_scores_differ_enough() -> None:
    config = load("lpo")
    ratios = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    scores = torch.tensor([[0.0, 2.0, 1.0], [0.0, 0.1, 0.05]], dtype=torch.float64)
    terms = step_pair_loss(config, ratios, scores, 0.5)
    assert terms.loss.tolist() == pytest.approx([math.log(2), 0])
    (gradient,) = torch.autograd.grad(terms.loss.sum(), ratios)
    assert gradient.tolist() == [pytest.approx([250, -250, 0]), [0, 0, 0]]


def test_a_missing_velocity_is_named() -> None:
    config = load("ram")
    old = normal(3, R, D)
    rows = matched(config, old, old, ADVANTAGE)
    with pytest.raises(ValueError, match="reference velocity"):
        forward_loss(config, Matched(rows.velocity, rows.target, rows.alpha, rows.sigma, rows.coefficient, GROUPS))


def test_strengths_by_level() -> None:
    flow = parse_transition("flow_sde 0.7")
    h = strengths(load("flow-grpo"), FLOW, flow)  # type: ignore[arg-type]
    drops = -FLOW.sigma.diff()
    assert h[-1] == 0  # the flow SDE's last step draws no noise
    assert h[1:-1] == pytest.approx((1.245 * drops[1:-1]).tolist(), rel=1e-3)
    nft = strengths(load("diffusion-nft"), FLOW, flow)  # type: ignore[arg-type]
    t = FLOW.sigma[1:-1]
    assert nft[0] == math.inf and nft[1:] == pytest.approx((2 * t * t / (1 - t)).tolist(), rel=1e-5)

"""Forward matching: every method has the gradient of its published loss, and all start in the same direction."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rsm_guidance.training.alignment.advantages import advantages, optimality
from rsm_guidance.training.alignment.forms import forward as f
from rsm_guidance.training.alignment.forms.implicit import dpo, gdro, implicit_reward
from rsm_guidance.training.alignment.time_weights import forward_cost, forward_strength
from rsm_guidance.training.alignment.trust_regions import norm_hinge, uncertain, velocity_penalty

R, D = 6, 5
GROUPS = torch.tensor([0, 0, 0, 1, 1, 1])


def world(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(v, v_old, u, t, rewards), where v is off policy."""
    g = torch.Generator().manual_seed(seed)
    v, old, u = torch.randn(3, R, D, generator=g, dtype=torch.float64)
    t = torch.rand(R, generator=g, dtype=torch.float64) * 0.8 + 0.1
    return old + 0.1 * v, old, u, t, torch.rand(R, generator=g, dtype=torch.float64)


def gradient(loss: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    v = v.clone().requires_grad_()
    return torch.autograd.grad(loss(v).sum(), v)[0]


def mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean(1)


def good(rewards: Tensor) -> Tensor:
    return optimality(advantages(rewards, GROUPS).values)


def nft_as_published(v: Tensor, old: Tensor, u: Tensor, t: Tensor, r: Tensor, b: float, adaptive: bool) -> Tensor:
    """A_max [ r ||x0+ - x0||^2 / w+ / b + (1 - r) ||x0- - x0||^2 / w- / b ], written with clean predictions."""
    total = torch.zeros(len(v), dtype=v.dtype)
    for branch, share in ((b * v + (1 - b) * old, r), ((1 + b) * old - b * v, 1 - r)):
        miss = t[:, None] * (branch - u)  # x0hat - x0 for x_t = (1 - t) x0 + t eps
        weight = miss.detach().abs().mean(1) if adaptive else torch.ones_like(t)
        total = total + share * miss.square().mean(1) / weight / b
    return 5 * total


@pytest.mark.parametrize("b", [0.1, 1.0])
@pytest.mark.parametrize("adaptive", [True, False])
def test_nft_has_the_gradient_of_its_two_branches(b: float, adaptive: bool) -> None:
    v, old, u, t, rewards = world()
    r = good(rewards)

    def ours(v: Tensor) -> Tensor:
        weights = f.nft_weights(v, old, u, t, b) if adaptive else None
        pull = f.nft(r, b, 5.0, weights)
        cost, before = (forward_cost("t2", x, u, 1 - t, t) for x in (v, old))
        return f.forward_match(cost, before, pull, t.square() * f.squared_distance(v, old))

    assert torch.allclose(gradient(ours, v), gradient(lambda v: nft_as_published(v, old, u, t, r, b, adaptive), v))


def test_nfts_expansion() -> None:
    v, old, u, _, rewards = world()
    r, b = good(rewards), 0.7
    e, d = old - u, v - old
    published = (r * mse(e, -b * d) + (1 - r) * mse(e, b * d)) / b
    expanded = e.square().mean(1) / b + 2 * (2 * r - 1) * (e * d).mean(1) + b * d.square().mean(1)
    assert torch.allclose(published, expanded)
    pull = f.nft(r, b, 1.0)
    assert torch.allclose(f.forward_match(mse(v, u), mse(old, u), pull, mse(v, old)), expanded - e.square().mean(1) / b)


def test_nfts_value_on_policy_ignores_rewards_and_its_gradient_does_not() -> None:
    _, old, u, t, rewards = world()
    r = good(rewards)
    for value in (r, 1 - r):
        pull = f.nft(value, 1.0, 5.0)
        assert f.forward_match(mse(old, u), mse(old, u), pull, mse(old, old)).abs().max() == 0
    both = [
        gradient(lambda v, x=x: f.forward_match(mse(v, u), mse(old, u), f.nft(x, 1.0, 5.0), mse(v, old)), old)
        for x in (r, 1 - r)
    ]
    assert torch.allclose(both[0], -both[1]) and both[0].abs().min() > 0
    assert t.min() > 0


def test_ram_has_the_gradient_of_its_regression() -> None:
    v, reference, u, _, rewards = world()
    centred = (rewards - torch.stack([rewards[:3].mean(), rewards[3:].mean()]).repeat_interleave(3)) / 0.5
    target = reference + centred[:, None] * (u - v)
    published = gradient(lambda x: mse(x, target), v)
    pull = f.ram(rewards, GROUPS, 0.5)
    ours = gradient(lambda x: f.forward_match(mse(x, u), None, pull, velocity_penalty(x, reference)), v)
    assert torch.allclose(ours, published)


def test_crd_has_the_gradient_of_its_regression() -> None:
    v, old, u, t, rewards = world()
    r, beta, largest = good(rewards), 0.3, 5.0

    def centre(x: Tensor) -> Tensor:
        return x - torch.stack([x[:3].mean(), x[3:].mean()]).detach().repeat_interleave(3)

    def cost(x: Tensor) -> Tensor:
        return forward_cost("adaptive", x, u, 1 - t, t)

    published = gradient(lambda x: (beta * centre(cost(old) - cost(x)) - centre(r)).square() * largest / beta, v)
    ours = gradient(
        lambda x: f.forward_match(cost(x), cost(old), f.crd(r, cost(x), cost(old), GROUPS, beta, largest)), v
    )
    assert torch.allclose(ours, published)


def test_awm_has_the_gradient_of_ppo_on_its_cost() -> None:
    v, old, u, t, rewards = world()
    a = advantages(rewards, GROUPS).values

    def cost(x: Tensor) -> Tensor:
        return forward_cost("ghuber", x, u, 1 - t, t)

    for clip in (0.01, 10.0):

        def published(x: Tensor, clip: float = clip) -> Tensor:
            ratio = (cost(old) - cost(x)).exp()
            return torch.maximum(-a * ratio, -a * ratio.clamp(1 - clip, 1 + clip))

        ours = gradient(lambda x, clip=clip: f.forward_match(cost(x), cost(old), f.awm(a, cost(x), cost(old), clip)), v)
        assert torch.allclose(ours, gradient(published, v))
        assert (ours == 0).any() == (clip == 0.01)


def test_dgpo_has_the_gradient_of_its_group_preference() -> None:
    v, reference, u, _, rewards = world()
    a = advantages(rewards, GROUPS).values

    def published(x: Tensor) -> Tensor:
        score = a * 10 * (mse(x, u) - mse(reference, u))
        return -F.logsigmoid(-torch.stack([score[:3].mean(), score[3:].mean()])) * 3 / 10

    ours = gradient(lambda x: f.forward_match(mse(x, u), None, f.dgpo(a, mse(x, u), mse(reference, u), GROUPS, 10)), v)
    assert torch.allclose(ours, gradient(published, v))


def direction(x: Tensor) -> Tensor:
    return x / x.norm()


def test_first_steps_agree_up_to_a_factor() -> None:
    """At v = v_old = v_ref, groups of any size: NFT, CRD, DGPO, RVM and RAM (of advantages) follow AWM."""
    _, old, u, _, rewards = world()
    a = advantages(rewards, GROUPS, clip=None).values
    before, r = mse(old, u), optimality(a)
    pulls = {
        "awm": f.awm(a, before, before),
        "nft": f.nft(r, 0.4, 5.0),
        "crd": f.crd(r, before, before, GROUPS, 0.3, 5.0),
        "dgpo": f.dgpo(a, before, before, GROUPS, 10.0),
        "rvm": f.plain(a, 1.0),
        "ram": f.ram(a, GROUPS, 0.5),
    }
    found = {
        n: gradient(lambda v, p=p: f.forward_match(mse(v, u), before, p, mse(v, old)), old) for n, p in pulls.items()
    }
    for name, g in found.items():
        assert torch.allclose(direction(g), direction(found["awm"]), atol=1e-9), name


def test_first_steps_of_pairs_agree_up_to_a_factor() -> None:
    """DPO joins in groups of two, and RWR once flow matching on the policy's own samples is taken away."""
    _, old, u, _, _ = world()
    old, u, groups = old[:2], u[:2], torch.tensor([0, 0])
    rewards = torch.tensor([0.9, 0.2], dtype=torch.float64)
    before = mse(old, u)
    along = direction(
        gradient(lambda v: f.forward_match(mse(v, u), before, f.plain(advantages(rewards, groups).values)), old)
    )

    def pairs(v: Tensor) -> Tensor:
        s = implicit_reward(mse(v, u), before, 2000.0)
        return dpo(s[:1], s[1:])

    assert torch.allclose(direction(gradient(pairs, old)), along)
    weights = f.rwr(rewards, groups, 0.5)
    weighted = gradient(lambda v: f.forward_match(mse(v, u), before, weights), old)
    own = gradient(lambda v: mse(v, u), old)
    assert torch.allclose(direction(weighted - own), along)


def test_selection_and_weights() -> None:
    rewards = torch.tensor([1.0, 3.0, 3.0, 5.0, 4.0, 6.0])
    assert f.raft(rewards, GROUPS).coefficient.tolist() == [0, 1, 0, 0, 0, 1]
    assert f.raft(rewards, torch.tensor([0, 1, 0, 1, 0, 1]), 2).coefficient.tolist() == [0, 0, 1, 1, 1, 1]
    w = f.rwr(rewards, GROUPS, 2.0).coefficient
    assert w[:3].mean() == pytest.approx(1) and float(w[1] / w[0]) == pytest.approx(torch.tensor(1.0).exp().item())
    assert f.orw(rewards[:1], 0.5, 2.0).coefficient.item() == pytest.approx(torch.tensor(0.5).exp().item())


@pytest.mark.parametrize(
    ("name", "expected"),
    [("uniform", 4.0), ("t", 2.0), ("t2", 1.0), ("huber", 1.0), ("ghuber", 2 * (2**0.5 - 1e-10**0.25)), ("snr", 4.0), ("adaptive", 2.0)],
)  # fmt: skip
def test_costs_by_hand(name: str, expected: float) -> None:
    """An error of 2 in every dimension at t = 1/2."""
    t = torch.tensor([0.5], dtype=torch.float64)
    v = torch.full((1, 3), 2.0, dtype=torch.float64)
    found = forward_cost(name, v, torch.zeros_like(v), 1 - t, t)  # type: ignore[arg-type]
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_strength_of_forward_matching_at_pure_noise() -> None:
    assert forward_strength(1.0, 0.5, 0.5) == 2
    assert forward_strength(1.0, 0.0, 1.0) == float("inf")


def test_norm_hinge_only_pushes_inflated_velocities() -> None:
    reference = torch.ones(2, 4, dtype=torch.float64)
    g = gradient(lambda v: norm_hinge(v, reference), torch.stack([1.5 * reference[0], 0.5 * reference[1]]))
    assert (g[0] > 0).all() and (g[1] == 0).all()


def test_overrated_rows_are_those_that_only_the_main_reward_likes() -> None:
    main = torch.tensor([0.0, 1.0, 2.0, 3.0])
    others = torch.tensor([[0.0, 0.0], [1.0, 1.0], [3.0, 3.0], [2.0, 2.0]])
    assert uncertain(main, others, 0.5).tolist() == [False, False, False, True]
    assert not uncertain(main, main[:, None], 0.5).any()


def test_gdro_of_two_is_dpo_of_twice_the_strength() -> None:
    errors, reference = torch.rand(2, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    groups = gdro(implicit_reward(errors, reference, 3.0), rewards, 1e-3)
    s = implicit_reward(errors, reference, 6.0).gather(1, rewards.argsort(1, descending=True))
    assert torch.allclose(groups, dpo(s[:, 0], s[:, 1]))


def test_swapping_winner_and_loser_negates_the_inner_term() -> None:
    s = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.allclose(dpo(s[:, 0], s[:, 1]) - dpo(s[:, 1], s[:, 0]), (s[:, 1] - s[:, 0]) / 2)  # log-odds


def test_gdro_of_three_is_the_cross_entropy_of_what_is_left() -> None:
    implied = torch.tensor([[0.5, -0.2, 1.0]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, 3.0, 2.0]], dtype=torch.float64)  # order: second, third, first
    s, r = torch.tensor([-0.2, 1.0, 0.5], dtype=torch.float64), torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64) / 0.5
    expected = F.cross_entropy(s[None], r.softmax(0)[None]) + F.cross_entropy(s[None, 1:], r[1:].softmax(0)[None])
    assert torch.allclose(gdro(implied, rewards, 0.5), expected)

"""Level laws: their distributions, the tables of schedulers, and that a generator alone decides."""

import math
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from scipy.stats import beta, kstest, norm, uniform

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.reward_models.levels import LevelTable, level_table, noised
from rsm_guidance.training.reward_model.levels import LEVEL_LAWS
from rsm_guidance.training.reward_model.noise import pair_noise

COUNT = 4000


def uniforms(seed: int = 0) -> torch.Tensor:
    return torch.rand(COUNT, generator=seeded(seed), dtype=torch.float64)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shifted() -> LevelTable:
    return level_table(FlowMatchEulerDiscreteScheduler(shift=3.0))


@pytest.mark.parametrize("name", LEVEL_LAWS)
def test_a_law_is_a_monotone_function_of_its_uniforms(name: str) -> None:
    table = shifted()
    u = torch.linspace(0, 1, 101, dtype=torch.float64)[:-1]
    indices = LEVEL_LAWS[name](u, table)
    assert indices.dtype == torch.int64 and indices.shape == (100,)
    assert 0 <= indices.min() and indices.max() < len(table)
    steps = indices.diff()
    assert (steps >= 0).all() or (steps <= 0).all()
    assert torch.equal(indices[7:9], LEVEL_LAWS[name](u[7:9], table)), "whatever the batch"


def test_places_in_the_table_have_the_laws_they_are_named_for() -> None:
    table = shifted()
    places = (LEVEL_LAWS["uniform"](uniforms(), table).double() + 0.5) / len(table)
    assert kstest(places.numpy(), uniform.cdf).pvalue > 0.01
    for mean, std in ((0.0, 1.0), (0.8, 0.6)):
        places = (LEVEL_LAWS["logit-normal"](uniforms(), table, mean=mean, std=std).double() + 0.5) / len(table)
        assert kstest(places.logit().numpy(), norm(mean, std).cdf).pvalue > 0.01


def test_half_of_the_papers_levels_lie_above_three_quarters() -> None:
    """Place 1/2 of the shift-3 table is sigma .75, as in the DRM's code."""
    table = shifted()
    sigma = table.sigma[LEVEL_LAWS["logit-normal"](uniforms(), table)]
    assert float(sigma.median()) == pytest.approx(0.75, abs=0.01)
    assert float(table.sigma[500]) == pytest.approx(0.75, abs=1e-3)


def test_levels_drawn_as_such_do_not_depend_on_the_shift() -> None:
    for table in (shifted(), level_table(FlowMatchEulerDiscreteScheduler())):
        sigma = table.sigma[LEVEL_LAWS["uniform-sigma"](uniforms(), table)]
        assert kstest(sigma.numpy(), uniform.cdf).pvalue > 0.01
        sigma = table.sigma[LEVEL_LAWS["beta"](uniforms(), table, a=2.0, b=3.0)]
        assert kstest(sigma.numpy(), beta(2, 3).cdf).pvalue > 0.01


def test_tables_are_those_that_schedulers_were_trained_with() -> None:
    table = shifted()
    assert (
        len(table) == 1000
        and table.sigma[0] == 1
        and torch.allclose(table.alpha + table.sigma, torch.ones(1000).double())
    )
    assert torch.allclose(table.timesteps, 1000 * table.sigma) and (table.sigma.diff() < 0).all()
    few = FlowMatchEulerDiscreteScheduler(shift=3.0)
    few.set_timesteps(5)
    assert torch.equal(level_table(few).sigma, table.sigma), "not those of the last sampling run"
    for scheduler in (
        DDPMScheduler(beta_schedule="scaled_linear"),
        EulerDiscreteScheduler(beta_schedule="scaled_linear"),
    ):
        table = level_table(scheduler)
        assert torch.allclose(table.alpha**2 + table.sigma**2, torch.ones(1000).double())
        assert table.timesteps[0] == 999 and table.timesteps[-1] == 0 and (table.sigma.diff() < 0).all()
        cumulative = scheduler.alphas_cumprod[250]
        assert float(table.alpha[749]) == pytest.approx(math.sqrt(float(cumulative))) and table.timesteps[749] == 250


@pytest.mark.parametrize("cls", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_a_scheduler_of_both_kinds_is_read_as_what_it_is_used_for(cls: Any) -> None:
    table = level_table(cls(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0))
    assert torch.allclose(table.sigma, shifted().sigma, atol=1e-6) and table.timesteps[0] == 1000


def test_a_scheduler_without_a_table_is_refused() -> None:
    class Bare:
        config: dict[str, object] = {}

        @classmethod
        def from_config(cls, config: object) -> "Bare":
            return cls()

    with pytest.raises(UsageError, match="Bare has no table of training levels"):
        level_table(Bare())


def test_constants_out_of_range_are_refused() -> None:
    for name, constants in (("logit-normal", {"std": 0.0}), ("beta", {"a": 0.0}), ("beta", {"b": -1.0})):
        with pytest.raises(UsageError, match="positive"):
            LEVEL_LAWS[name](uniforms(), shifted(), **constants)


def test_noise_has_the_size_of_its_level_and_pairs_their_own() -> None:
    table = shifted()
    x0, indices = torch.randn(3, 2, 64, 64, generator=seeded()), torch.tensor([0, 500, 999])
    shape = (2, 64, 64)
    first, second = pair_noise(1, "pair", 0, [0, 1, 2], shape).unbind(1)
    assert not torch.equal(first, second)
    assert abs(float((first * second).mean())) < 0.02, "independent"
    same = pair_noise(1, "pair", 0, [0, 1, 2], shape, same=True)
    assert torch.equal(same[:, 0], same[:, 1]) and torch.equal(same[:, 0], first)
    assert torch.equal(pair_noise(1, "pair", 0, [2], shape)[:, 0], first[2:]), "whatever the batch"
    x = noised(x0, indices, table, first)
    for row, index in enumerate(indices):
        by_hand = table.alpha[index] * x0[row].double() + table.sigma[index] * first[row].double()
        assert torch.allclose(x[row].double(), by_hand, atol=1e-6)
    assert noised(x0.bfloat16(), indices, table, first).dtype == torch.bfloat16

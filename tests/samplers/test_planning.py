"""Dry runs: what samplers cost, and how large they may be for a budget, against real runs."""

from dataclasses import replace
from typing import Any

import pytest
from diffusers import DiffusionPipeline

import rsm_guidance as rg
from rsm_guidance.core.ledger import Budget, Ledger
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.samplers.planning import Costs, cost, dry_run, fit_to_budget, rehearsal
from rsm_guidance.evaluation.generate import Generation, costs_of
from rsm_guidance.samplers import SAMPLERS, Sampler, make_sampler, parse_sampler, run

DRM = Costs(NoiseSchedule.flow(6), 2.0, 2 / 3, 2 / 3)
FUNCTION = Costs(NoiseSchedule.flow(6), 2.0, None, 0.0)
GENERATION = Generation(6, 3.0)
ADAPTIVE = ("rbf", "backtracking")


def spent(sampler: Sampler, costs: Costs, budget: Budget) -> Ledger:
    """What a run on a toy of the same costs spends under a budget."""
    if getattr(sampler, "accept", None) is not None:
        sampler = replace(sampler, accept=None)  # type: ignore[type-var]
    return run(sampler, rehearsal(costs, budget)).ledger


def redness(images: Any, prompts: list[str]) -> Any:
    return (images[:, 0] - images[:, 2]).mean((1, 2))


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", ["drm", "function"])
def test_a_dry_run_costs_what_the_real_run_costs(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel, name: str, kind: str
) -> None:
    judge = drm if kind == "drm" else redness
    sampler = make_sampler(name)
    expected = cost(sampler, costs_of(guided, GENERATION, judge))
    out = guided("a red star", sampler=sampler, reward=judge, seed=0, **GENERATION.call())
    if name in ADAPTIVE:
        assert out.ledger.evaluations <= 1.5 * expected
    else:
        assert out.ledger.evaluations == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize("costs", [DRM, FUNCTION])
@pytest.mark.parametrize("name", [n for n, cls in SAMPLERS.items() if cls.budget_field])
def test_the_fitted_sampler_is_the_largest_that_the_budget_pays_for(name: str, costs: Costs) -> None:
    sampler, field = make_sampler(name), SAMPLERS[name].budget_field
    assert field is not None
    for budget in (60.0, 120.0):
        try:
            fitted: Any = fit_to_budget(sampler, budget, costs)
        except ValueError as error:
            assert "at its smallest" in str(error)
            continue
        assert cost(fitted, costs) <= budget + 1e-6
        size = getattr(fitted, field)
        if size < 512 and name not in ADAPTIVE:
            larger: Sampler = type(fitted)(**{**vars(fitted), field: size + 1})
            assert cost(larger, costs) > budget


OPTIONS = [
    *SAMPLERS, "reward-gradient:recurrence=3", "reward-gradient:recurrence=2:trajectories=3", "reward-gradient:jacobian=false",
    "smc:jacobian=false", "psi:initial=null", "psi:gradient=true", "tree-search:prior=value", "tree-sampling:prior=value",
    "stepwise:trajectories=3", "noise-search:mode=paths", "noise-optimization:gradient=zeroth-order", "fk-steering:interval=1",
    "best-of-n:accept=-1", "tree-search:accept=-1",
]  # fmt: skip


@pytest.mark.parametrize("costs", [DRM, FUNCTION], ids=["drm", "function"])
@pytest.mark.parametrize("text", OPTIONS)
def test_no_sampler_spends_more_than_its_budget(text: str, costs: Costs) -> None:
    sampler, free = parse_sampler(text), dry_run(parse_sampler(text), costs)
    for share in (0.0, 0.3, 0.7):
        cap = costs.once + share * max(0.0, free.evaluations - costs.once)
        assert spent(sampler, costs, Budget(evaluations=cap)).evaluations <= cap + 1e-6
        calls = 1 + int(share * free.reward_calls)
        assert spent(sampler, costs, Budget(reward_calls=calls)).reward_calls <= calls
        decodes = 2 + int(share * free.decodes)
        assert spent(sampler, costs, Budget(decodes=decodes)).decodes <= decodes


@pytest.mark.parametrize("costs", [DRM, FUNCTION], ids=["drm", "function"])
@pytest.mark.parametrize("text", [t for t in OPTIONS if t not in ADAPTIVE])
def test_what_was_fitted_to_a_budget_is_not_cut_by_it(text: str, costs: Costs) -> None:
    try:
        fitted = fit_to_budget(parse_sampler(text), 120.0, costs)
    except ValueError as error:
        assert "at its smallest" in str(error)
        return
    free, capped = dry_run(fitted, costs), spent(fitted, costs, Budget(evaluations=120.0))
    assert capped.evaluations == pytest.approx(free.evaluations)
    assert capped.stopped is None


def test_budgets_that_pay_for_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="less than the 12.6667 of one image"):
        fit_to_budget(make_sampler("stepwise"), 5, DRM)
    assert fit_to_budget(make_sampler("none"), 20, DRM) == make_sampler("none")


def test_samplers_are_read_from_text() -> None:
    sampler: Any = parse_sampler("stepwise:trajectories=2:window=[0.2, 0.9]:transition=cps 0.5", candidates=3)
    assert (sampler.trajectories, sampler.window, sampler.candidates) == (2, (0.2, 0.9), 3)
    assert sampler.transition == rg.Transition("cps", 0.5)
    assert parse_sampler("none:transition=glass 4").transition == rg.Transition("glass", inner=4)  # type: ignore[attr-defined]
    for text, words in (
        ("step", "unknown sampler"),
        ("stepwise:candidates", "sets nothing"),
        ("stepwise:candidates=many", "cannot take candidates='many': it must be a whole number"),
        ("best-of-n:candidates=1.5", "cannot take candidates=1.5: it must be a whole number"),
        ("fk-steering:particles=.inf", "must be a whole number"),
        ("psi:initial=abc", "must be a CrankNicolson or null"),
        ("tree-search:tree_file=5", "must be a text or null"),
        ("reward-gradient:window=[0, 1, 2]", r"must be \[a number, a number\]"),
        ("reward-gradient:jacobian=abc", "must be true or false"),
        ("stepwise:particles=3", "has no option"),
        ("none:transition=cps x", "cannot read the transition"),
        ("none:transition=walk", "unknown transition"),
    ):
        with pytest.raises(ValueError, match=words):
            parse_sampler(text)


@pytest.mark.parametrize("name", ["best-of-n", "tree-search"])
def test_who_may_stop_early_is_fitted_as_if_it_did_not(name: str) -> None:
    for bar in (-1e9, 0.0, 1.0):
        fitted: Any = fit_to_budget(make_sampler(name, accept=bar), 120.0, DRM)
        whole: Any = fit_to_budget(make_sampler(name), 120.0, DRM)
        assert fitted.accept == bar and getattr(fitted, fitted.budget_field) == getattr(whole, whole.budget_field) > 4

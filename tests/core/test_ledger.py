"""The compute ledger and its caps."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rsm_guidance.core import ledger as module
from rsm_guidance.core.ledger import Budget, Ledger


class Clock:
    """A perf_counter that moves when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module.time, "perf_counter", clock)
    return clock


def test_no_budget_affords_everything() -> None:
    assert Ledger().affords(evaluations=1e12, reward_calls=10**9, decodes=10**9)


@pytest.mark.parametrize("name", ["evaluations", "reward_calls", "decodes"])
def test_caps_are_hard_and_count_per_image(name: str) -> None:
    ledger = Ledger(Budget(**{name: 10}), images=3)
    spent = "denoiser_evaluations" if name == "evaluations" else name
    setattr(ledger, spent, 24)
    assert ledger.affords(**{name: 6})
    assert not ledger.affords(**{name: 7})
    others = {"evaluations", "reward_calls", "decodes"} - {name}
    assert ledger.affords(**dict.fromkeys(others, 10**6))


def test_value_models_count_by_their_share() -> None:
    ledger = Ledger(Budget(evaluations=10))
    ledger.denoiser_evaluations = 4
    ledger.charge_value(rows=8, share=0.5)
    assert (ledger.value_evaluations, ledger.value_cost, ledger.evaluations) == (8, 4.0, 8.0)
    assert ledger.affords(evaluations=2) and not ledger.affords(evaluations=2.5)


@given(st.integers(1, 400), st.integers(1, 7), st.sampled_from([0.1, 0.3, 1 / 3, 0.7]))
@settings(max_examples=60, deadline=None)
def test_rounding_never_costs_the_last_step(calls: int, images: int, share: float) -> None:
    """A run that costs exactly its budget in many small amounts may finish."""
    ledger = Ledger(Budget(evaluations=calls * share), images)
    for _ in range(calls):
        assert ledger.affords(evaluations=images * share)
        ledger.charge_value(images, share)
    assert not ledger.affords(evaluations=share)
    assert math.isclose(ledger.evaluations, calls * share * images)


def test_deadline(clock: Clock) -> None:
    ledger = Ledger(Budget(seconds=5), images=4, _started=clock())
    clock.now += 4.9
    assert ledger.seconds == pytest.approx(4.9) and not ledger.late
    clock.now += 0.2
    assert ledger.late and not Ledger(_started=clock()).late


def test_the_clock_stops(clock: Clock) -> None:
    ledger = Ledger(_started=clock())
    clock.now += 2
    ledger.finish()
    clock.now += 50
    assert ledger.seconds == pytest.approx(2)
    assert ledger.to_dict()["seconds"] == pytest.approx(2)


def test_the_first_reason_stays() -> None:
    ledger = Ledger()
    assert ledger.stopped is None
    ledger.stop("deadline")
    ledger.stop("budget")
    assert ledger.stopped == "deadline"
    thinned = Ledger()
    for why in ("budget", "deadline", "interrupted"):
        thinned.stop(why)
    assert thinned.stopped == "deadline", "a budget that thinned the search is not what ended it"


def test_totals_are_json() -> None:
    ledger = Ledger(Budget(evaluations=100), images=2)
    ledger.denoiser_evaluations += 20
    ledger.charge_value(4, 0.25)
    ledger.reward_calls += 2
    ledger.charge_backward(3, 0.5)
    totals = json.loads(json.dumps(ledger.to_dict()))
    assert totals.pop("seconds") >= 0
    assert totals == {
        "images": 2,
        "denoiser_evaluations": 20,
        "value_evaluations": 4,
        "value_cost": 1.0,
        "reward_calls": 2,
        "decodes": 0,
        "backward_passes": 3,
        "backward_cost": 3.0,
        "peak_memory_bytes": 0,
        "stopped": None,
        "evaluations": 24,
    }


@pytest.mark.parametrize("name", ["evaluations", "reward_calls", "decodes", "seconds"])
@pytest.mark.parametrize("cap", [0, -1, float("nan")])
def test_budgets_are_positive(name: str, cap: float) -> None:
    with pytest.raises(ValueError, match=f"{name}="):
        Budget(**{name: cap})

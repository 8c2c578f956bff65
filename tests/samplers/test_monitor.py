"""The monitor: what it sees, and when it stops a run."""

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import rsm_guidance as rg
from rsm_guidance.samplers import BestOfN, Monitor, Watch
from rsm_guidance.samplers.run import run
from tests.samplers.cases import ANCESTRAL, CASES, SHORT, problem


def test_it_follows_the_best_by_the_guide_and_stops_when_all_rows_have_parted() -> None:
    watch = Watch(Monitor(lambda images, prompts: images, patience=2), ["a", "b"])
    rows = torch.tensor([0, 1])
    for proxy, gold, bad_rounds in (
        ([1.0, 1.0], [5.0, 5.0], [0, 0]),
        ([2.0, 0.5], [4.0, 9.0], [1, 0]),  # row 0 rises without the monitor; row 1 does not rise at all
        ([3.0, 2.0], [4.0, 4.0], [2, 1]),
        ([2.0, 3.0], [9.0, 3.0], [2, 2]),
    ):
        assert not watch.stopped
        watch.see(torch.tensor(gold), rows, torch.tensor(proxy))
        assert watch.bad_rounds.tolist() == bad_rounds
    assert watch.stopped and watch.proxy.tolist() == [3, 3] and watch.gold.tolist() == [4, 3]
    assert watch.history[1] == {"guide": [2, 1], "monitor": [4, 5]}


def test_a_run_that_over_optimises_is_stopped_and_returns_its_best() -> None:
    """The monitor is the guide turned around: every rise is a miss."""
    task = problem("ring", SHORT, 6)
    proxy, prompts = CASES["ring"][1], task.denoiser.prompts
    task.watch = Watch(Monitor(lambda x, p: -proxy(x, p), patience=1), prompts)
    output = run(BestOfN(400, ANCESTRAL, batch_rows=6), task)
    assert output.ledger.stopped == "over-optimised"
    tried = len(output.trace["candidates"]["rewards"][0])
    assert 2 <= tried < 400 and output.rewards is not None
    assert output.rewards.tolist() == pytest.approx(task.watch.proxy.tolist())
    assert len(output.trace["monitor"]["history"]) == tried
    free = problem("ring", SHORT, 6)
    free.watch = Watch(Monitor(proxy, patience=1), prompts)
    assert run(BestOfN(8, ANCESTRAL), free).ledger.stopped is None, "a monitor that agrees never stops"


def test_it_watches_through_the_pipeline(guided: DiffusionPipeline, drm: rg.DiffusionRewardModel) -> None:
    call: dict[str, Any] = {"prompt": ["a red star", "a blue circle"], "num_inference_steps": 5, "seed": 0}
    out = guided(**call, sampler=BestOfN(3), reward=drm, monitor="shapes-verifier")
    history = out.trace["monitor"]["history"]
    assert out.trace["monitor"]["name"] == "shapes_verifier" and history[-1]["guide"] == pytest.approx(out.rewards)
    assert all(0 <= v <= 1 for v in history[-1]["monitor"])
    plain = guided(**call, sampler=BestOfN(3), reward=drm)
    assert plain.rewards == out.rewards, "watching changes nothing"
    with pytest.raises(ValueError, match="no effect without a sampler"):
        guided(**call, monitor="shapes-verifier")
    with pytest.raises(ValueError, match="patience must be at least 1"):
        Monitor(drm.score_images, 0)


def test_watching_respects_the_budget(guided: DiffusionPipeline, drm: rg.DiffusionRewardModel) -> None:
    call = {"prompt": "a red star", "num_inference_steps": 3, "seed": 0, "monitor": "shapes-verifier"}
    out = guided(**call, sampler=BestOfN(6, batch_rows=1), reward=drm, budget=rg.Budget(decodes=3))
    assert out.ledger.decodes <= 3 and len(out.trace["monitor"]["history"]) == 2


@pytest.mark.parametrize("gradient", ["exact", "zeroth-order"])
@pytest.mark.parametrize("kind", ["reward", "drm"])
def test_of_noise_optimisation_it_sees_every_result_and_no_probe(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel, gradient: Any, kind: str
) -> None:
    def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return (images[:, 0] - images[:, 2]).mean((1, 2))

    out = guided(
        "a red star", num_inference_steps=2, seed=0, reward=redness if kind == "reward" else drm, monitor="shapes-verifier",
        sampler=rg.NoiseOptimization(iterations=3, gradient=gradient),
    )  # fmt: skip
    history = out.trace["monitor"]["history"]
    assert len(history) == len(out.trace["candidates"]["rewards"][0]) == 4
    assert history[-1]["guide"] == pytest.approx(out.rewards)

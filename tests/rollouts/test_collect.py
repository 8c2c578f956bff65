"""Recorded rollouts: exact log-ratios, trees that share their stem, and costs."""

from contextlib import closing

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import CPS, DDIM, GLASS, ODE, FlowSDE, Transition
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.engine.replay import Replay
from rsm_guidance.oracles.cases import CASES
from rsm_guidance.oracles.mixture import GaussianMixtureDenoiser
from rsm_guidance.rollouts import Rollout, collect, trajectories

SCHEDULE = NoiseSchedule.flow(6)
PROMPTS = ["point 0", "point 1", "point 2"]
STOCHASTIC = [CPS(0.7), DDIM(1.0), FlowSDE(0.7)]


def mixture(prompts: list[str] = PROMPTS) -> GaussianMixtureDenoiser:
    return GaussianMixtureDenoiser(CASES["ring"][0], SCHEDULE, prompts)


def streams(prompts: list[str] = PROMPTS) -> RandomStreams:
    return RandomStreams.for_prompts(0, prompts)


def shapes(pipe: StableDiffusion3Pipeline) -> PipelineDenoiser:
    prompts = ["two red circles and a blue square", "a red star"]
    generators = [torch.Generator().manual_seed(s) for s in (3, 4)]
    call = {"prompt": prompts, "num_inference_steps": 5, "guidance_scale": 1.0, "generator": generators}
    return PipelineDenoiser(pipe, call)


def ratios(old: Rollout, new: Rollout, schedule: NoiseSchedule) -> list[float]:
    found = []
    for before, after in zip(old.stochastic, new.stochastic, strict=True):
        assert after.prediction is not None
        if before.gaussian(schedule).std > 0:
            found.append(float(before.log_ratio(schedule, after.prediction).abs().max()))
    return found


@pytest.mark.parametrize("transition", STOCHASTIC, ids=str)
def test_two_runs_of_a_recorded_rollout_have_log_ratio_zero(transition: Transition) -> None:
    old, new = (collect(mixture(), streams(), transition, group=2) for _ in range(2))
    assert ratios(old, new, SCHEDULE) == [0.0] * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_log_ratios_through_a_pipeline_are_zero_on_policy_whatever_the_precision(
    stock: StableDiffusion3Pipeline, dtype: torch.dtype
) -> None:
    stock.to(dtype)
    try:
        with torch.no_grad(), closing(shapes(stock)) as denoiser:
            named = RandomStreams.for_prompts(0, denoiser.prompts)
            old, new = (collect(denoiser, named, FlowSDE(0.7)) for _ in range(2))
            schedule = denoiser.schedule
    finally:
        stock.to(torch.float32)
    assert old.steps[1].x.dtype == dtype and old.steps[1].gaussian(schedule).mean.dtype == torch.float32
    assert ratios(old, new, schedule) == [0.0] * 4
    step = old.stochastic[1]
    density = step.log_prob(schedule)
    assert density.dtype == torch.float32 and torch.equal(density, step.log_prob(schedule, step.prediction))


def test_replayed_predictions_of_all_levels_at_once_have_log_ratio_zero(stock: StableDiffusion3Pipeline) -> None:
    """What a trainer does: the states of a rollout, each at its level, in one plain module call."""
    with torch.no_grad(), closing(shapes(stock)) as denoiser:
        rollout = collect(denoiser, RandomStreams.for_prompts(0, denoiser.prompts), CPS(0.7))
        replay, schedule = Replay.record(denoiser), denoiser.schedule
    steps = rollout.stochastic[:4]
    x, rows = torch.cat([s.x for s in steps]), torch.cat([s.rows for s in steps])
    levels = torch.tensor([s.level for s in steps]).repeat_interleave(2)
    with torch.no_grad():
        together = replay.denoise(x, levels, rows)
    for i, step in enumerate(steps):
        own = together.pick(torch.arange(2 * i, 2 * i + 2))
        assert float(step.log_ratio(schedule, own).abs().max()) < 1e-2, "a larger batch rounds in the last bits alone"
        alone = replay.denoise(step.x, levels[2 * i : 2 * i + 2], step.rows)
        assert float(step.log_ratio(schedule, alone).abs().max()) < 1e-7


@pytest.mark.parametrize("transition", STOCHASTIC, ids=str)
def test_the_ratio_is_the_difference_of_the_densities(transition: Transition) -> None:
    step = collect(mixture(), streams(), transition).stochastic[2]
    assert step.prediction is not None and step.prediction.velocity is not None
    p = step.prediction
    moved = Prediction(p.x, p.x0 + 0.1, p.eps - 0.1, p.velocity - 0.2)
    expected = step.log_prob(SCHEDULE, moved) - step.log_prob(SCHEDULE)
    assert torch.allclose(step.log_ratio(SCHEDULE, moved), expected) and expected.abs().min() > 1e-4
    gaussian = step.gaussian(SCHEDULE)
    assert step.noise is not None
    assert torch.allclose(step.next, gaussian.mean + gaussian.std * step.noise), "the noise is what was drawn"


def test_children_share_the_evaluation_of_their_parent_and_the_first_is_the_unguided_run() -> None:
    denoiser = mixture()
    tree = collect(denoiser, streams(), CPS(0.7), splits={1: 3, 3: 2})
    assert denoiser.evaluations == 3 * (2 + 3 * 2 + 6 * 2), "one per parent at the levels 1 and 3"
    assert tree.rows.tolist() == [row for row in range(3) for _ in range(6)]
    *_, last = trajectories(mixture(), streams(), CPS(0.7), [0])
    assert torch.equal(tree.latents[::6], last.next)
    places = tree.lineage()
    assert [len(s.x) for s in tree.steps] == [3, 9, 9, 18, 18, 18]
    assert places[0].tolist() == [row for row in range(3) for _ in range(6)]
    assert places[2].tolist() == [place for place in range(9) for _ in range(2)]
    for step, before, place, above in zip(tree.steps[1:], tree.steps[:-1], places[1:], places[:-1], strict=True):
        assert torch.equal(step.x[place], before.next[above])
    assert len(torch.unique(tree.latents, dim=0)) == 18


def test_a_window_is_stochastic_inside_and_deterministic_outside() -> None:
    windowed = collect(mixture(), streams(), CPS(0.7), group=2, window=(2, 4))
    assert [step.noise is not None for step in windowed.steps] == [False, False, True, True, False, False]
    ode = collect(mixture(), streams(), ODE(), group=2)
    assert torch.equal(windowed.steps[2].x, ode.steps[2].x) and not ode.stochastic
    with pytest.raises(ValueError, match="deterministic"):
        assert ode.steps[0].prediction is not None
        ode.steps[0].log_ratio(SCHEDULE, ode.steps[0].prediction)


@pytest.mark.parametrize("transition", [*STOCHASTIC, ODE(), GLASS(2)], ids=str)
def test_prompts_are_independent_and_groups_are_the_candidates_of_samplers(transition: Transition) -> None:
    together = collect(mixture(), streams(), transition, group=2)
    alone = collect(mixture(PROMPTS[2:]), streams(PROMPTS[2:]), transition, group=2)
    assert torch.allclose(alone.latents, together.latents[4:], atol=1e-6)
    *_, last = trajectories(mixture(), streams(), transition, [0, 1])
    assert torch.equal(last.next, together.latents)


def test_impossible_trees_are_refused() -> None:
    for options, words in (
        ({"group": 0}, "at least 1"),
        ({"splits": {1: 0}}, "at least 1"),
        ({"splits": {9: 2}}, "only part where a step draws noise"),
        ({"splits": {1: 2}, "window": (2, 4)}, "only part where a step draws noise"),
    ):
        with pytest.raises(ValueError, match=words):
            collect(mixture(), streams(), CPS(0.7), **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only part where a step draws noise"):
        collect(mixture(), streams(), ODE(), splits={1: 2})
    glass = collect(mixture(), streams(), GLASS(2)).steps[0]
    with pytest.raises(ValueError, match="has no Gaussian"):
        glass.log_prob(SCHEDULE)

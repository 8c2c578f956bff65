"""What a pipeline does otherwise than most is found by trying, and driven rightly or refused with the reason."""

import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import rsm_guidance as rg
from rsm_guidance.core.transitions import DDIM, ODE
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.engine.probe import probe
from tests.zoo import strange
from tests.zoo.strange import Plain

PROMPTS = ["a cat", "a red dog on a tree"]
WHOLE = ("none", rg.BestOfN(2))
STEPPING = (rg.StepwiseSampling(2, DDIM(1.0)), rg.FKSteering(2), rg.RewardGradient(transition=ODE()))
PICTURES = [torch.full((4, 1, 1), value) for value in (-1.0, 0.5)]


def red(images: Tensor, prompts: list[str]) -> Tensor:
    return (images[:, 0] - images[:, 2]).mean((1, 2))


def guided(cls: type[Plain], seed: int = 0, sampler: Any = "none", prompt: Any = PROMPTS, **call: Any) -> Any:
    pipe = rg.RewardGuidedPipeline.from_pipe(strange.strange(cls))
    pipe.set_progress_bar_config(disable=True)
    return pipe(prompt, seed=seed, output_type="np", sampler=sampler, reward=red, **call)


@contextmanager
def driven(cls: type[Plain], **call: Any) -> Iterator[PipelineDenoiser]:
    generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
    with (
        torch.no_grad(),
        closing(PipelineDenoiser(strange.strange(cls), {"prompt": PROMPTS, "generator": generators} | call)) as d,
    ):
        yield d


# --- driven rightly ---


@pytest.mark.parametrize("sampler", [*WHOLE, *STEPPING], ids=str)
@pytest.mark.parametrize("cls", [strange.Raw, strange.Negated, strange.Attending])
def test_other_conventions_give_what_the_usual_ones_give(cls: type[Plain], sampler: Any) -> None:
    found, usual = guided(cls, sampler=sampler), guided(strange.Plain, sampler=sampler)
    assert np.array_equal(found.images, usual.images) and found.rewards == usual.rewards


def test_arrays_serve_where_there_are_no_tensors_but_not_under_gradient() -> None:
    for sampler in (*WHOLE, *STEPPING[:2]):
        assert np.array_equal(guided(strange.Arrays, sampler=sampler).images, guided(Plain, sampler=sampler).images)
    with pytest.raises(ValueError, match="decodes to arrays and not to tensors, so that no gradient"):
        guided(strange.Arrays, sampler=STEPPING[2])


@pytest.mark.parametrize("sampler", [*WHOLE, *STEPPING], ids=str)
@pytest.mark.parametrize(("cls", "way"), [(strange.Pictured, "entries"), (strange.Shared, "texts")])
def test_inputs_follow_the_rows_if_the_call_has_them_follow(cls: type[Plain], way: str, sampler: Any) -> None:
    both = guided(cls, sampler=sampler, pictures=PICTURES)
    for row, prompt in enumerate(PROMPTS):
        own = PICTURES[row : row + 1] if way == "entries" else PICTURES
        alone = guided(cls, sampler=sampler, prompt=prompt, pictures=own)
        assert np.allclose(both.images[row], alone.images[0], atol=1e-5)
    if sampler == "none":
        with driven(cls, pictures=PICTURES) as denoiser:
            assert denoiser.batches and denoiser._driver.known.way == way


class Unbatched(strange.Pictured):
    """It takes as many pictures as it was made for, and no others."""

    def begin(self, latents: Tensor, pictures: Any) -> Any:
        if len(latents) != 2:
            raise ValueError("two rows, please")
        return super().begin(latents, pictures)


def test_rows_that_cannot_be_asked_for_together_take_turns() -> None:
    with driven(Unbatched, pictures=PICTURES) as turns, driven(strange.Pictured, pictures=PICTURES) as together:
        rows = torch.tensor([1, 0, 1, 1])
        x = torch.randn(4, *turns.initial().shape[1:], generator=torch.Generator().manual_seed(5))
        assert together.batches and not turns.batches
        for level in (0, 1, 3):
            assert torch.allclose(turns.predict(x, level, rows).x0, together.predict(x, level, rows).x0, atol=1e-5)
        assert torch.allclose(turns.decode(x, rows), together.decode(x, rows), atol=1e-5)
        generators = [[torch.Generator().manual_seed(s) for s in range(4)] for _ in range(2)]
        ends = [list(d.follow(rows, g))[-1][1] for d, g in zip((turns, together), generators, strict=True)]
        assert torch.allclose(*ends, atol=1e-5)
        assert turns.evaluations > together.evaluations  # slots that nobody asked for are evaluated, and counted


def test_global_draws_are_named_by_the_seed_and_the_level() -> None:
    outputs = []
    for state in (1, 2):
        torch.manual_seed(state)
        outputs.append(guided(strange.Drawing, sampler=STEPPING[0]).images)
        assert torch.equal(torch.get_rng_state(), torch.Generator().manual_seed(state).get_state())
    assert np.array_equal(*outputs)
    assert not np.array_equal(outputs[0], guided(Plain, sampler=STEPPING[0]).images)
    with driven(strange.Drawing) as denoiser:
        x = denoiser.initial()
        first = denoiser.predict(x, 0)
        arrived = denoiser.predict(first.x0, 1)
        assert torch.equal(denoiser.predict(first.x0.clone(), 1).x0, arrived.x0), "a jump draws what arriving draws"
        assert not torch.equal(denoiser.predict(x.clone(), 2).eps, denoiser.predict(x.clone(), 3).eps)


def test_without_a_seed_global_draws_are_those_of_the_stock_call() -> None:
    pipe = rg.RewardGuidedPipeline.from_pipe(strange.strange(strange.Drawing))
    images = []
    for sampler in (None, "none"):
        torch.manual_seed(7)
        call = {"generator": torch.Generator().manual_seed(0), "output_type": "np", "sampler": sampler}
        images.append(pipe(PROMPTS, **call).images)
    assert np.array_equal(*images)


def test_an_abandoned_call_puts_back_what_the_stock_call_puts_back_at_its_end() -> None:
    pipe = strange.strange(strange.Attending)
    first, second = (PipelineDenoiser(pipe, {"prompt": PROMPTS}) for _ in range(2))
    with torch.no_grad():
        x = first.initial()
        first.predict(x, 0)
        assert pipe.unet.processor == "own", "also while the call is paused"
        second.predict(second.initial(), 0)
        first.close()
        second.predict(second.initial().clone(), 1)
        second.close()
    assert pipe.unet.processor == "own"


# --- refused ---


@pytest.mark.parametrize("sampler", [*WHOLE, *STEPPING], ids=str)
@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (strange.Part, r"latents of shape \[\d, 4, 7, 8\], a part or another arrangement of the \[\d, 4, 8, 8\]"),
        (strange.Twice, "several times per level|depends on the levels before"),
        (strange.Embeddings, r"is no image, video or sound that a reward could see, but a tensor of shape \[\d, 256\]"),
    ],
)
def test_no_sampler_where_there_is_nothing_to_guide(cls: type[Plain], reason: str, sampler: Any) -> None:
    with pytest.raises(ValueError, match=reason):
        guided(cls, sampler=sampler)


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (strange.Remembering, "depends on the levels before"),
        (strange.Scaling, "changes its latents between preparing them and its first step"),
        (strange.Uneven, "makes something else than its noise levels say .it moves the latents by something else"),
    ],
)
def test_only_whole_runs_where_levels_are_not_what_the_schedule_says(cls: type[Plain], reason: str) -> None:
    pipe = strange.strange(cls)
    for sampler in WHOLE:
        out = guided(cls, sampler=sampler)
        assert out.rewards == pytest.approx(
            red(torch.from_numpy(out.images).movedim(-1, 1), PROMPTS).tolist(), abs=1e-6
        )
    for sampler in STEPPING:
        with pytest.raises(ValueError, match=reason):
            guided(cls, sampler=sampler)
    call = {"prompt": "a cat", "output_type": "np"}
    stock = pipe(**call, generator=torch.Generator().manual_seed(3)).images
    found = rg.RewardGuidedPipeline.from_pipe(pipe)(**call, generator=torch.Generator().manual_seed(3), sampler="none")
    assert np.array_equal(found.images, stock)


def test_prompts_that_are_encoded_together_are_told() -> None:
    with pytest.warns(UserWarning, match="encodes the prompts of a batch together"):
        guided(strange.Padding)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        guided(Plain)
        guided(strange.Padding, prompt="a cat")


# --- the probe ---


def test_the_probe_tells_what_calls_do_and_costs_no_evaluation() -> None:
    usual = probe(strange.strange(Plain))
    assert not any(vars(usual).values())
    told = {
        strange.Raw: (True, True),
        strange.Negated: (True, True),
        strange.Drawing: (True, True),
        strange.Remembering: (True, False),
        strange.Scaling: (True, False),
        strange.Uneven: (True, False),
        strange.Part: (False, False),
        strange.Twice: (False, False),
    }
    for cls, (runs, levels) in told.items():
        pipe, asked = strange.strange(cls), []
        pipe.unet.register_forward_pre_hook(lambda *_, asked=asked: asked.append(1))
        state, attributes = torch.get_rng_state(), dict(vars(pipe))
        found = probe(pipe)
        assert (found.runs is None, found.levels is None) == (runs, levels), cls
        assert torch.equal(torch.get_rng_state(), state) and vars(pipe) == attributes
        assert len(asked) <= 2, "but for the two of prompts that are encoded together"
    assert probe(strange.strange(strange.Embeddings)).images is not None
    assert "arrays" in str(probe(strange.strange(strange.Arrays)).gradients)
    assert any("encodes the prompts" in note for note in probe(strange.strange(strange.Padding)).notes)


def test_what_is_tried_changes_neither_results_nor_books() -> None:
    pipe = rg.RewardGuidedPipeline.from_pipe(strange.strange(strange.Pictured))
    pipe.set_progress_bar_config(disable=True)
    call = {"seed": 0, "output_type": "np", "reward": red, "pictures": PICTURES, "sampler": STEPPING[0]}
    first, second = pipe(PROMPTS, **call), pipe(PROMPTS, **call)
    assert np.array_equal(first.images, second.images)
    assert first.ledger.denoiser_evaluations == second.ledger.denoiser_evaluations
    counted: list[int] = []
    pipe.unet.register_forward_pre_hook(lambda _, args: counted.append(len(args[0])))
    assert pipe(PROMPTS, **call).ledger.denoiser_evaluations == sum(counted)

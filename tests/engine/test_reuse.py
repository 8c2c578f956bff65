"""What a denoiser keeps between two questions: answers, loops and books; each against a denoiser that was asked nothing."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import ImageOps
from torch import Tensor

from rsm_guidance.engine import PipelineDenoiser
from tests.zoo import ZOO


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def opened(name: str = "sd3", **extra: Any) -> Iterator[tuple[PipelineDenoiser, PipelineDenoiser]]:
    """Two denoisers of the same call: one to be asked, one that is fresh."""
    pipe = ZOO[name].build()
    calls = [ZOO[name].call() | {"generator": generator()} | extra for _ in range(2)]
    with closing(PipelineDenoiser(pipe, calls[0])) as asked, closing(PipelineDenoiser(pipe, calls[1])) as fresh:
        yield asked, fresh


def noise(like: Tensor, seed: int = 7) -> Tensor:
    return torch.randn(like.shape, generator=generator(seed))


def test_a_known_answer_is_free_and_served_for_its_latents_alone() -> None:
    with opened() as (denoiser, fresh):
        x = denoiser.initial().clone()
        with torch.no_grad():
            for level in (0, 2):
                first, spent = denoiser.predict(x, level), denoiser.evaluations
                assert torch.equal(denoiser.predict(x, level).x0, first.x0)
                assert denoiser.evaluations == spent
            x += 1
            assert torch.equal(denoiser.predict(x, 2).x0, fresh.predict(x.clone(), 2).x0)


def test_answers_have_a_graph_where_one_is_due_and_each_its_own() -> None:
    with opened() as (denoiser, _):
        x = denoiser.initial().clone()
        with torch.no_grad():
            denoiser.predict(x, 0)
        x.requires_grad_()
        gradients = [torch.autograd.grad(denoiser.predict(x, 0).velocity.sum(), x)[0] for _ in range(2)]
        assert torch.equal(*gradients) and gradients[0].abs().max() > 0
        with torch.no_grad():
            assert not denoiser.predict(x, 0).velocity.requires_grad


@torch.no_grad()
def test_other_rows_are_another_question() -> None:
    two = {"prompt": ["a cat", "a red dog on a tree"], "generator": [generator(0), generator(1)]}
    with opened(**two) as (denoiser, fresh):
        x, rows = denoiser.initial(), torch.tensor([1, 0])
        for level in (0, 1):  # the one that is known, and the next one
            denoiser.predict(x, 0)
            y = x if level == 0 else x.clone()
            assert torch.equal(denoiser.predict(y, level, rows).x0, fresh.predict(y.clone(), level, rows).x0)


@torch.no_grad()
def test_a_run_of_the_scheduler_begins_anew_and_is_no_start_for_other_latents() -> None:
    with opened() as (denoiser, fresh):
        end = [x for _, x in denoiser.follow()][-1]
        for before in (lambda: None, lambda: denoiser.predict(denoiser.initial(), 0), lambda: next(denoiser.follow())):
            before()
            assert torch.equal([x for _, x in denoiser.follow()][-1], end)
        next(denoiser.follow())
        x = noise(end)
        assert torch.equal(denoiser.predict(x, 1).x0, fresh.predict(x.clone(), 1).x0)


@torch.no_grad()
def test_a_run_of_the_scheduler_says_what_is_predicted_at_its_levels() -> None:
    with opened() as (denoiser, fresh):
        x = denoiser.initial().clone()
        for level, (prediction, following) in enumerate(denoiser.follow()):
            assert prediction is not None and torch.equal(prediction.x0, fresh.predict(x, level).x0)
            x = following.clone()


@torch.no_grad()
def test_a_run_that_failed_in_its_first_step_can_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with opened() as (denoiser, fresh):
        end = [x for _, x in fresh.follow()][-1]
        denoiser.initial()
        with monkeypatch.context() as patch:
            patch.setattr(denoiser.pipe.transformer, "forward", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                next(denoiser.follow())
        assert torch.equal([x for _, x in denoiser.follow()][-1], end)


@torch.no_grad()
def test_the_output_is_of_the_latents_that_are_handed_over() -> None:
    for kind in ("np", "latent"):
        with opened(output_type=kind) as (denoiser, _):
            *_, (_, end) = denoiser.follow()
            assert denoiser.finish(end) is not None
            other = noise(end, 9)
            if kind == "np":
                expected = denoiser.decode(other).movedim(-3, -1).numpy()
                assert np.allclose(np.asarray(denoiser.finish(other)[0]), expected, atol=1e-6)


@torch.no_grad()
def test_the_cost_of_a_row_does_not_depend_on_their_number() -> None:
    with opened() as (denoiser, _):
        rows = torch.zeros(3, dtype=torch.int64)
        denoiser.predict(denoiser.initial()[rows], 0, rows)
        assert denoiser.evaluations_per_row == 2


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15_img2img", "sd3_img2img", "sd15_controlnet"])
def test_rows_keep_their_images_of_a_batch(name: str) -> None:
    image = ZOO[name].call()["image"]
    arrays = [np.asarray(i, np.float32).transpose(2, 0, 1) / 255 for i in (image, ImageOps.invert(image))]
    two = {"prompt": ["a cat"] * 2, "image": torch.from_numpy(np.stack(arrays))}
    with opened(name, **two, generator=[generator(), generator()]) as (denoiser, _):
        *_, (_, end) = denoiser.follow(generators=[generator(), generator()])
        *_, (_, turned) = denoiser.follow(torch.tensor([1, 0]), [generator(), generator()])
        assert torch.allclose(turned, end.flip(0), atol=1e-4) and not torch.allclose(end[0], end[1], atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sana", "sd15_inpaint", "sd3_inpaint", "sd15_controlnet"])
def test_callbacks_are_told_of_the_latents_a_jump_ends_with_and_of_no_step_before(name: str) -> None:
    seen: list[int] = []

    def watch(pipe: DiffusionPipeline, index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(index)
        return tensors

    with opened(name, callback_on_step_end=watch) as (denoiser, _):
        x = denoiser.initial().clone()
        denoiser.predict(x, denoiser.steps - 1)
        denoiser.predict(x.clone(), denoiser.steps - 1)
        denoiser.decode(x)
        assert seen == [denoiser.steps - 2], "once of the same latents"
        denoiser.predict(x + 1, denoiser.steps - 1)
        assert seen == [denoiser.steps - 2] * 2
        with denoiser.aside():
            denoiser.predict(x - 1, denoiser.steps - 1)
        assert len(seen) == 2


def test_closing_unwinds_the_call_and_frees_the_hooks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    freed: list[int] = []
    with opened() as (denoiser, _):
        denoiser.initial()
        monkeypatch.setattr(denoiser.pipe, "maybe_free_model_hooks", lambda: freed.append(1))
        paused = denoiser._driver._paused[(0,), 0]
        denoiser.close()
        denoiser.close()
        assert not paused.loop.alive and freed == [1]

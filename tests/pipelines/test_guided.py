"""The pipeline class: signature, loading routes, errors, interruption."""

import inspect
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline

import rsm_guidance as rg
from rsm_guidance.samplers import Progress

CALL = {"prompt": "a red star", "num_inference_steps": 4, "output_type": "np"}
CPS = rg.Transition("cps", 0.8)


OURS = "sampler reward value budget reward_prompt seed on_step monitor reward_columns".split()


def test_signature_is_stock_plus_ours() -> None:
    stock = list(inspect.signature(StableDiffusion3Pipeline.__call__).parameters)
    ours = list(inspect.signature(rg.RewardGuidedStableDiffusion3Pipeline.__call__).parameters)
    assert ours == [*stock, *OURS]
    assert rg.reward_guided(StableDiffusion3Pipeline) is rg.RewardGuidedStableDiffusion3Pipeline


def test_custom_pipeline_in_a_fresh_process(tmp_path: Path) -> None:
    code = """
import json, sys
from diffusers import DiffusionPipeline
from rsm_guidance import StepwiseSampling, custom_pipeline, shapes
pipe = DiffusionPipeline.from_pretrained(
    shapes.model_path(), custom_pipeline=custom_pipeline("stable_diffusion_3"), trust_remote_code=True)
out = pipe("two red circles and a blue square", num_inference_steps=4, seed=0,
           sampler=StepwiseSampling(candidates=2), reward="shapes-drm")
print(json.dumps([type(pipe).__qualname__, out.images[0].size, out.rewards, out.ledger.evaluations, len(out.trace["levels"])]))
"""
    env = os.environ | {"HF_MODULES_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    name, size, rewards, evaluations, levels = json.loads(done.stdout.splitlines()[-1])
    assert name == "RewardGuidedStableDiffusion3Pipeline"
    assert size == [64, 64] and np.isfinite(rewards).all() and levels == 3
    assert evaluations == pytest.approx(4 * 2 + (3 * 2 + 1) * rg.resolve_reward("shapes-drm").share)
    assert "Expected types" not in done.stderr


def test_sharing_and_saving(stock: StableDiffusion3Pipeline, tmp_path: Path) -> None:
    guided = rg.RewardGuidedStableDiffusion3Pipeline.from_pipe(stock)
    assert guided.transformer is stock.transformer and stock.dtype == torch.float32
    guided.save_pretrained(tmp_path)
    reference = stock(**CALL, generator=torch.Generator().manual_seed(0)).images
    for cls in (rg.RewardGuidedStableDiffusion3Pipeline, StableDiffusion3Pipeline, DiffusionPipeline):
        again = cls.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert np.array_equal(again(**CALL, generator=torch.Generator().manual_seed(0)).images, reference)


def test_from_pipe_keeps_half_precision(stock: StableDiffusion3Pipeline) -> None:
    half = StableDiffusion3Pipeline.from_pretrained(rg.shapes.model_path(), dtype=torch.bfloat16)
    guided = rg.RewardGuidedStableDiffusion3Pipeline.from_pipe(half)
    assert guided.dtype == half.dtype == torch.bfloat16
    guided.set_progress_bar_config(disable=True)
    half.set_progress_bar_config(disable=True)
    reference = half(**CALL, generator=torch.Generator().manual_seed(0)).images
    driven = guided(**CALL, generator=torch.Generator().manual_seed(0), sampler="none").images
    assert np.array_equal(driven, reference), "the ode step must round as the stock scheduler does"


def test_plain_call_is_not_slowed_by_a_missing_third_text_encoder(stock: StableDiffusion3Pipeline) -> None:
    embeds = stock.encode_prompt("a red star", None, None)[0]
    assert embeds.shape[1] == stock.tokenizer_max_length + 1, "one zero token, not 256"


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"prompt": 3, "sampler": "none"}, "text or a list of texts; got 3"),
        ({"prompt": [], "sampler": "none"}, "text or a list of texts"),
        ({"prompt": None, "sampler": "none"}, "no prompt was given"),
        ({"seed": True, "sampler": "none"}, "a seed is a whole number; got True"),
        ({"seed": 1.0}, "a seed is a whole number; got 1.0"),
        ({"prompt": ["a", 3], "sampler": "none"}, "a prompt must be text; got int"),
        ({"sampler": "magic"}, "unknown sampler 'magic'; choose one of none, best-of-n, stepwise"),
        ({"sampler": "stepwise"}, "pass a diffusion reward model"),
        ({"sampler": "best-of-n"}, "compares candidates: pass a reward"),
        ({"sampler": "stepwise", "reward": "magic"}, "unknown reward 'magic'"),
        ({"reward": "shapes-drm"}, "reward has no effect without a sampler"),
        ({"sampler": "none", "budget": 3.0}, "cannot finish one image"),
        ({"sampler": "none", "budget": -1.0}, "a budget must be positive"),
        ({"sampler": "none", "seed": 0, "generator": torch.Generator()}, "either seed or generator"),
    ],
)
def test_bad_input(guided: DiffusionPipeline, extra: dict[str, object], message: str | None) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        guided(**(CALL | extra))


def test_a_reward_beside_a_value_model_judges_the_finished_image(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel
) -> None:
    def blueness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images[:, 2].mean((1, 2))

    sampler = rg.StepwiseSampling(2, CPS)
    by_drm = guided(**CALL, seed=0, sampler=sampler, reward=drm)
    mixed = guided(**CALL, seed=0, sampler=sampler, reward=blueness, value=drm)
    assert np.array_equal(by_drm.images, mixed.images)
    assert mixed.rewards[0] == pytest.approx(mixed.images[0, ..., 2].mean(), rel=1e-4)
    turned = guided(**CALL, seed=0, sampler=sampler, reward=drm, value=blueness)
    pixels = torch.from_numpy(turned.images).permute(0, 3, 1, 2)
    assert turned.rewards[0] == pytest.approx(drm.score_images(pixels, ["a red star"]).item(), rel=1e-3)


@pytest.mark.parametrize("sampler", [rg.StepwiseSampling, rg.BestOfN])
def test_fewer_than_one_candidate_is_refused(sampler: type) -> None:
    with pytest.raises(ValueError, match="at least 1; got 0"):
        sampler(candidates=0)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda n: torch.tensor([float("nan")] * n), "returned nan for item 0"),
        (lambda n: torch.tensor([float("inf")] * n), "returned inf for item 0"),
        (lambda n: torch.zeros(n, 2), "must return one score per image"),
        (lambda n: None, "NoneType, not . numbers"),
    ],
)
@pytest.mark.parametrize("sampler", [rg.BestOfN(3), rg.StepwiseSampling(3, CPS)], ids=["best-of-n", "stepwise"])
def test_rewards_that_misbehave_are_named(guided: DiffusionPipeline, sampler: object, result, message: str) -> None:
    def my_reward(images: torch.Tensor, prompts: list[str]) -> object:
        return result(len(images))

    with pytest.raises(ValueError, match=f"my_reward.*{message}"):
        guided(**CALL, seed=0, sampler=sampler, reward=my_reward)
    assert np.isfinite(guided(**CALL, seed=0, sampler="none").images).all(), "the pipeline works as before"


def test_a_programming_error_in_a_reward_keeps_its_type_and_traceback(guided: DiffusionPipeline) -> None:
    def my_reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        return images[:, 0].mean((1, 2)) + prompts  # type: ignore[operator, no-any-return]

    with pytest.raises(TypeError) as caught:
        guided(**CALL, seed=0, sampler=rg.StepwiseSampling(3, CPS), reward=my_reward)
    assert "my_reward" in "".join(caught.value.__notes__)
    assert any(entry.name == "my_reward" for entry in caught.traceback)
    assert np.isfinite(guided(**CALL, seed=0, sampler="none").images).all(), "the pipeline works as before"


@pytest.mark.parametrize("sampler", [rg.StepwiseSampling(3, CPS), rg.Unguided(), rg.BestOfN(40, CPS, batch_rows=1)])
def test_ctrl_c_returns_the_best_so_far(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel, sampler: object
) -> None:
    seen: list[int] = []

    def interrupt(event: Progress) -> None:
        seen.append(event.level)
        if len(seen) == 7:
            raise KeyboardInterrupt

    call = CALL | {"num_inference_steps": 8 if not isinstance(sampler, rg.BestOfN) else 3}
    out = guided(**call, seed=0, sampler=sampler, reward=drm, on_step=interrupt)
    assert out.ledger.stopped == "interrupted" and len(seen) == 7
    assert out.images.shape == (1, 64, 64, 3) and np.isfinite(out.rewards).all()
    if isinstance(sampler, rg.BestOfN):
        assert len(out.trace["candidates"]["rewards"][0]) == 2, "two whole samples were finished"


def test_a_real_signal_in_the_middle(guided: DiffusionPipeline, drm: rg.DiffusionRewardModel) -> None:
    started = threading.Event()
    held = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits it as ignored
    threading.Thread(
        target=lambda: (started.wait(), time.sleep(0.2), os.kill(os.getpid(), signal.SIGINT)), daemon=True
    ).start()
    out = guided(
        **(CALL | {"num_inference_steps": 400}), seed=0, sampler=rg.StepwiseSampling(2, CPS), reward=drm,
        on_step=lambda e: started.set(),
    )  # fmt: skip
    signal.signal(signal.SIGINT, held)
    assert out.ledger.stopped == "interrupted" and np.isfinite(out.images).all()


def test_deadline_returns_the_best_so_far(guided: DiffusionPipeline, drm: rg.DiffusionRewardModel) -> None:
    call = CALL | {"num_inference_steps": 1000}
    out = guided(**call, seed=0, sampler=rg.StepwiseSampling(2, CPS), reward=drm, budget=rg.Budget(seconds=2))
    assert out.ledger.stopped == "deadline" and out.ledger.seconds < 8


def test_budget_caps_evaluations_through_the_pipeline(guided: DiffusionPipeline, drm: rg.DiffusionRewardModel) -> None:
    out = guided(**CALL, seed=0, sampler=rg.StepwiseSampling(8, CPS), reward=drm, budget=16.0)
    assert 8 < out.ledger.evaluations <= 16 and out.ledger.stopped == "budget"


@pytest.mark.parametrize("sampler", [rg.StepwiseSampling(3, CPS), rg.BestOfN(6, CPS)], ids=["stepwise", "best-of-n"])
def test_caps_on_decodes_and_reward_calls(guided: DiffusionPipeline, sampler: object) -> None:
    calls = []

    def redness(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        calls.extend(prompts)
        return images[:, 0].mean((1, 2))

    out = guided(**CALL, seed=0, sampler=sampler, reward=redness, budget=rg.Budget(reward_calls=4))
    assert 3 <= len(calls) == out.ledger.reward_calls <= 4 and out.ledger.stopped == "budget"
    out = guided(**CALL, seed=0, sampler=sampler, reward=redness, budget=rg.Budget(decodes=5))
    assert 4 <= out.ledger.decodes <= 5 and out.ledger.stopped == "budget"
    with pytest.raises(ValueError, match="one finished image takes 2"):
        guided(**CALL, seed=0, sampler=sampler, reward=redness, budget=rg.Budget(decodes=1))


def test_output_forms(guided: DiffusionPipeline, drm: rg.DiffusionRewardModel) -> None:
    sampler = rg.StepwiseSampling(2, CPS)
    out = guided(prompt=["a star", "a cross"], num_inference_steps=3, seed=0, sampler=sampler, reward=drm)
    assert [i.size for i in out.images] == [(64, 64)] * 2 and len(out.rewards) == 2
    json.dumps(out.trace)
    assert isinstance(guided(**CALL, seed=0, sampler="none", return_dict=False), tuple)
    latent = guided(**(CALL | {"output_type": "latent"}), seed=0, sampler="none").images
    assert latent.shape == (1, 4, 16, 16)


def test_unknown_families_and_arguments(guided: DiffusionPipeline) -> None:
    with pytest.raises(ValueError, match="stable_diffusion_3"):
        rg.custom_pipeline("no-such-family")
    with pytest.raises(TypeError, match="unexpected argument 'promt'"):
        guided(promt="a star")
    with pytest.raises(ValueError, match="has no option 'candidats'"):
        rg.make_sampler("stepwise", candidats=3)


@pytest.mark.parametrize("sampler", ["smc", "reward-gradient"])
def test_gradients_of_the_reward_model_guide_through_the_pipeline(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel, sampler: str
) -> None:
    """The pipeline runs under no_grad; samplers that need a gradient switch it on where they do."""
    prompts = ["a red star", "two blue squares", "a circle and a cross", "three green crosses"]
    call = CALL | {"prompt": prompts, "seed": 0, "reward": drm, "num_inference_steps": 12, "guidance_scale": 3.0}
    plain = guided(**call, sampler=rg.Unguided(rg.Transition("cps", 0.9)))
    out = guided(**call, sampler=sampler)
    assert np.isfinite(out.images).all() and out.ledger.backward_passes > 0
    assert sum(out.rewards) > sum(plain.rewards)
    with pytest.raises(ValueError, match="not differentiable"):
        guided(**call | {"reward": "shapes-verifier"}, sampler=sampler)

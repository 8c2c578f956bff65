"""Replayed calls against the engine: every family at a level per sample, gradients, rows, wrappers, and what is refused."""

import copy
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.callbacks import SDCFGCutoffCallback
from torch import Tensor, nn

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.core.schedule import Prediction
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.engine.arguments import NotReplayable
from rsm_guidance.engine.replay import Replay
from tests.zoo import ZOO

PROMPTS = ["a cat", "a red dog on a tree"]
REFUSED: dict[str, str] = {}
"""Families of the zoo that cannot be replayed, with the reason: none."""
UNGUIDED_ANYWAY = {"sd15_lcm", "sdxl_turbo", "flux", "flux_schnell", "flux_kontext", "flux_fill"}
"""Families whose guidance scale is an input of the denoiser, or that use none."""
WITHOUT_GUIDANCE = {
    "zimage": {"guidance_scale": 0.0},  # it adds the scale to 1
    "qwenimage": {"true_cfg_scale": 1.0},
    "qwenimage_edit": {"true_cfg_scale": 1.0},
}


def call(name: str, guided: bool, **extra: Any) -> dict[str, Any]:
    """The zoo's call for two prompts, with the family's guidance or without classifier-free guidance."""
    base = ZOO[name].call() | {"generator": [torch.Generator().manual_seed(s) for s in (0, 1)], "prompt": PROMPTS}
    if not guided and name not in UNGUIDED_ANYWAY:
        base |= WITHOUT_GUIDANCE.get(name, {"guidance_scale": 1.0})
    if base.get("negative_prompt") is not None:
        base["negative_prompt"] = ["bad", "worse"]
    return base | extra


@pytest.fixture(scope="module")
def table() -> Iterator[dict[str, dict[bool, str]]]:
    """Family by family, how close replay and engine were; printed at the end (`pytest -s`)."""
    rows: dict[str, dict[bool, str]] = {}
    yield rows
    lines = [f"{name:<16} {found.get(False, '-'):<28} {found.get(True, '-')}" for name, found in rows.items()]
    sys.stdout.write("\n".join(["", f"{'family':<16} {'without guidance':<28} with guidance", *lines, ""]))


def parts_of(prediction: Prediction) -> list[Tensor]:
    parts = [prediction.x, prediction.x0, prediction.eps, prediction.velocity]
    return [p for p in parts if p is not None]


@torch.no_grad()
@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("name", ZOO)
def test_a_level_for_each_sample_equals_the_engine(
    table: dict[str, dict[bool, str]], record_property: Any, name: str, guided: bool
) -> None:
    pipe = ZOO[name].build()
    with closing(PipelineDenoiser(pipe, call(name, guided))) as denoiser:
        if name in REFUSED:
            with pytest.raises(NotReplayable, match=REFUSED[name]):
                Replay.record(denoiser)
            return
        spent = denoiser.evaluations
        replay = Replay.record(denoiser)
        passes = 2 if guided and name not in UNGUIDED_ANYWAY else 1
        assert replay.evaluations_per_row == passes
        assert denoiser.evaluations - spent == passes, "a recording asks the denoiser about one row"
        x = denoiser.initial()
        levels = torch.tensor([denoiser.steps // 2, denoiser.steps - 1] if denoiser.steps > 2 else [0, 1])
        driven = [denoiser.predict(x.clone(), level) for level in levels.tolist()]
        replayed = replay.denoise(x, levels)
        assert replay.evaluations == 2 * passes
        apart = (driven[0].eps - driven[1].eps).abs().max()
        assert apart > 0.1, "levels differ too little for the test to notice"
        errors, equal = [0.0], True
        for row, engine in enumerate(driven):
            for expected, found in zip(parts_of(engine), parts_of(replayed), strict=True):
                equal &= torch.equal(expected[row], found[row])
                errors.append(float((expected[row] - found[row]).abs().max() / expected[row].abs().max()))
    verdict = f"{'bitwise' if equal else f'{max(errors):.0e}'}, levels {apart:.1f} apart"
    table.setdefault(name, {})[guided] = verdict
    record_property("replay", f"{name} {'guided' if guided else 'unguided'}: {verdict}")
    assert equal if passes == 1 else max(errors) <= 1e-5


@pytest.mark.parametrize("name", ZOO)
def test_gradients_flow_and_rows_keep_their_prompts_and_other_timesteps_are_told(name: str) -> None:
    pipe = ZOO[name].build()
    with closing(PipelineDenoiser(pipe, call(name, guided=True))) as denoiser:
        replay, x = Replay.record(denoiser), denoiser.initial().detach()
        rows, last = torch.tensor([1, 0, 1]), denoiser.steps - 1
        levels = torch.tensor([0, last, last])
        with torch.no_grad():
            expected = [denoiser.predict(x.clone(), level) for level in (0, last)]
            found = replay.denoise(x[rows], levels, rows)
            assert not found.x0.requires_grad
            for i, (row, level) in enumerate(zip(rows.tolist(), levels.tolist(), strict=True)):
                assert torch.allclose(found.x0[i], expected[level > 0].x0[row], atol=2e-4, rtol=1e-3)
            other = replay.denoise(x[rows], levels, 1 - rows)
            assert not torch.allclose(other.x0, found.x0, atol=1e-6), "each row must keep its own prompt"
    leaf = x[rows].requires_grad_()
    (gradient,) = torch.autograd.grad(replay.denoise(leaf, levels, rows).x0.float().square().sum(), leaf)
    assert gradient.isfinite().all() and all(g.abs().sum() > 0 for g in gradient)
    times = denoiser.schedule.timesteps[levels].float()
    (gradient,) = torch.autograd.grad(replay.call(leaf, times, rows).square().sum(), leaf)
    assert gradient.isfinite().all() and all(g.abs().sum() > 0 for g in gradient)
    with torch.no_grad():
        near, far = replay.call(leaf, times, rows), replay.call(leaf, times * 0.5, rows)
        assert not torch.allclose(near, far, atol=1e-4)
        if denoiser.schedule.is_flow and "inpaint" not in name:  # the denoiser's input is in the scheduler's scale
            velocity = replay.denoise(leaf, levels, rows).velocity
            assert velocity is not None and torch.allclose(near, velocity, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["sdxl", "sd15_inpaint", "flux", "sana", "zimage", "wan"])
def test_half_precision_is_rounded_as_the_engine_rounds(name: str) -> None:
    pipe = ZOO[name].build().to(torch.bfloat16)
    with closing(PipelineDenoiser(pipe, call(name, guided=False))) as denoiser:
        replay, x = Replay.record(denoiser), denoiser.initial()
        levels = torch.tensor([1, denoiser.steps - 1])
        driven = [denoiser.predict(x.clone(), level) for level in levels.tolist()]
    replayed = replay.denoise(x, levels)
    for row, engine in enumerate(driven):
        for expected, found in zip(parts_of(engine), parts_of(replayed), strict=True):
            assert expected.dtype == found.dtype and torch.equal(expected[row], found[row])


@torch.no_grad()
def test_recording_decodes_nothing_and_frees_offloaded_modules() -> None:
    pipe = ZOO["sd3"].build()
    with closing(PipelineDenoiser(pipe, call("sd3", guided=True))) as denoiser:
        x, levels = denoiser.initial(), torch.tensor([1, 3])
        expected = Replay.record(denoiser).denoise(x, levels).x0
    pipe.enable_model_cpu_offload(device="cpu")  # hooks as on a GPU
    decoded: list[int] = []
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: decoded.append(1))
    with closing(PipelineDenoiser(pipe, call("sd3", guided=True))) as denoiser:
        assert torch.equal(Replay.record(denoiser).denoise(x, levels).x0, expected)
    assert not decoded and hasattr(pipe.transformer, "_hf_hook")


@torch.no_grad()
def test_recordings_are_picked_from_and_joined() -> None:
    pipe = ZOO["sd15_inpaint"].build()
    with closing(PipelineDenoiser(pipe, call("sd15_inpaint", guided=True))) as denoiser:
        replay, x = Replay.record(denoiser), denoiser.initial()
    levels = torch.tensor([1, 2])
    whole = replay.denoise(x, levels)
    joined = Replay.joined([replay.pick([1]), replay.pick([0])])
    assert joined.count == 2 and torch.equal(joined.denoise(x, levels, torch.tensor([1, 0])).x0, whole.x0)
    assert 0 < replay.pick([0]).nbytes < replay.nbytes
    with closing(PipelineDenoiser(ZOO["sdxl"].build(), call("sdxl", guided=True))) as other:
        with pytest.raises(NotReplayable, match="differs in shape"):
            Replay.joined([replay, Replay.record(other)])


@torch.no_grad()
def test_recording_leaves_pipeline_paused_call_and_random_numbers_alone() -> None:
    pipe = ZOO["sd15"].build()
    base = call("sd15", guided=True)
    with closing(PipelineDenoiser(pipe, base)) as denoiser:
        x = denoiser.initial()
        first = denoiser.predict(x, 0)
        before, state = dict(vars(pipe)), torch.get_rng_state()
        Replay.record(denoiser)
        assert vars(pipe) == before and torch.equal(torch.get_rng_state(), state)
        spent = denoiser.evaluations
        assert torch.equal(denoiser.predict(x, 0).x0, first.x0) and denoiser.evaluations == spent


@pytest.mark.parametrize(
    ("name", "extra", "reason"),
    [
        ("sd15", {"guidance_rescale": 0.7}, "neither a sign nor classifier-free guidance"),
        ("lumina2", {"cfg_trunc_ratio": 0.5}, "in another way from level to level"),
        ("sd15_controlnet", {"control_guidance_end": 0.5}, "conditioning_scale changes from level to level"),
        ("zimage", {"cfg_normalization": 0.5}, "neither a sign nor classifier-free guidance"),
    ],
)
def test_what_replaying_would_miss_is_refused_with_the_reason(name: str, extra: dict[str, Any], reason: str) -> None:
    with closing(PipelineDenoiser(ZOO[name].build(), call(name, guided=True, **extra))) as denoiser:
        with pytest.raises(NotReplayable, match=reason):
            Replay.record(denoiser)


def test_guidance_that_a_callback_switches_off_is_refused() -> None:
    cutoff = SDCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    with closing(PipelineDenoiser(ZOO["sd15"].build(), call("sd15", True, callback_on_step_end=cutoff))) as denoiser:
        with pytest.raises(NotReplayable):
            Replay.record(denoiser)


def test_bad_input_is_refused() -> None:
    with closing(PipelineDenoiser(ZOO["flux"].build(), call("flux", guided=False))) as denoiser:
        replay, x = Replay.record(denoiser), denoiser.initial()
        bare = Replay.record(denoiser, outputs=False)
    with pytest.raises(UsageError, match=r"levels lie in 0\.\.3"):
        replay.denoise(x, torch.tensor([0, 4]))
    with pytest.raises(UsageError, match="a whole-numbered level each"):
        replay.denoise(x, torch.tensor([0.0, 1.0]))
    with pytest.raises(UsageError, match=r"a row in 0\.\.1 each"):
        replay.denoise(x, torch.tensor([0, 1]), torch.tensor([0, 2]))
    with pytest.raises(UsageError, match="recorded latents have shape"):
        replay.denoise(x[:, :3], torch.tensor([0, 1]))
    with pytest.raises(UsageError, match="outputs=False"):
        bare.denoise(x, torch.tensor([0, 1]))


# --- a plain module call ---


def recorded(name: str = "sd3") -> tuple[DiffusionPipeline, Replay, Tensor]:
    pipe = ZOO[name].build()
    with closing(PipelineDenoiser(pipe, call(name, guided=True))) as denoiser:
        replay = Replay.record(denoiser)
        return pipe, replay, denoiser.initial().detach().clone()


def gradients(replay: Replay, x: Tensor, module: nn.Module, rows: list[int], own: nn.Module) -> dict[str, Tensor]:
    """Gradients of a loss over some rows, each at its own level, with respect to the denoiser's parameters."""
    index = torch.tensor(rows)
    own.zero_grad()
    replay.denoise(x[index], 3 * index, index, module=module).x0.square().mean().backward()
    return {n: p.grad.clone() for n, p in own.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and max(g.abs().max() for g in expected.values()) > 1e-3
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


def test_compiled_checkpointed_and_other_modules_are_called_alike() -> None:
    pipe, replay, x = recorded()
    plain = gradients(replay, x, pipe.transformer, [0, 1], pipe.transformer)
    compiled = torch.compile(pipe.transformer, backend="eager")
    assert_close(gradients(replay, x, compiled, [0, 1], pipe.transformer), plain)
    other = copy.deepcopy(pipe.transformer)
    other.enable_gradient_checkpointing()
    runs: list[int] = []
    other.transformer_blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    assert_close(gradients(replay, x, other, [0, 1], other), plain)
    assert len(runs) == 2, "the block ran again on the way back"
    assert torch.equal(replay.denoise(x, torch.tensor([0, 3])).x0, replay.denoise(x, torch.tensor([0, 3]), module={"transformer": other}).x0)  # fmt: skip


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    pipe, replay, x = recorded()
    wrapped = nn.parallel.DistributedDataParallel(pipe.transformer, find_unused_parameters=True)
    torch.save(gradients(replay, x, wrapped, [rank], pipe.transformer), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_worker, (str(tmp_path),), nprocs=2)
    pipe, replay, x = recorded()
    together = gradients(replay, x, pipe.transformer, [0, 1], pipe.transformer)
    for rank in range(2):
        assert_close(torch.load(tmp_path / f"{rank}.pt"), together)

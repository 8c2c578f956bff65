"""Tree files: resumed, interrupted, damaged and foreign ones."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline

import rsm_guidance as rg
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import Transition
from rsm_guidance.oracles.mixture import GaussianMixture
from rsm_guidance.samplers.run import run
from rsm_guidance.samplers.tree import file as tree_file
from rsm_guidance.samplers.tree.methods import TreeSampling, TreeSearch
from rsm_guidance.samplers.tree.store import Forest
from tests.samplers.tree_cases import BOTH, REWARD, A, ids, problem, same


@pytest.mark.parametrize("sampler", BOTH, ids=ids)
def test_a_resumed_tree_equals_an_uninterrupted_one(sampler: Any, tmp_path: Path) -> None:
    whole = run(sampler, problem())
    for stops in ((1, 20), (7, 12, 20), (9, 20, 20)):
        path = tmp_path / f"{stops}.safetensors"
        for simulations in stops:
            part = type(sampler)(**(vars(sampler) | {"simulations": simulations, "tree_file": str(path)}))
            output = run(part, problem())
        same(output, whole)
        assert [p for p in tmp_path.iterdir() if p.suffix != ".safetensors"] == []
    assert output.ledger.denoiser_evaluations == 4, "nothing but the proof that the model is the same"


def test_a_tree_that_was_good_enough_goes_on_when_more_is_asked(tmp_path: Path) -> None:
    path = str(tmp_path / "tree.safetensors")
    done = run(TreeSearch(20, transition=A, accept=-1.0, tree_file=path), problem())
    assert any(len(rewards) < 20 for rewards in done.trace["candidates"]["rewards"])
    same(run(TreeSearch(20, transition=A, tree_file=path), problem()), run(TreeSearch(20, transition=A), problem()))


def test_an_interrupted_tree_goes_on(tmp_path: Path) -> None:
    whole = run(TreeSampling(30, transition=A), problem())
    path = str(tmp_path / "tree.safetensors")
    task = problem()
    reports = 0

    def interrupt(progress: Any) -> None:
        nonlocal reports
        reports += 1
        if reports == 26:
            raise KeyboardInterrupt

    task.progress = interrupt
    cut = run(TreeSampling(30, transition=A, tree_file=path), task)
    assert cut.ledger.stopped == "interrupted" and cut.latents.isfinite().all()
    assert 1 <= len(cut.trace["candidates"]["rewards"][0]) < 30
    same(run(TreeSampling(30, transition=A, tree_file=path), problem()), whole)


def test_a_killed_tree_goes_on_from_its_last_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, path = run(TreeSampling(30, transition=A), problem()), tmp_path / "tree.safetensors"
    states: list[bytes] = []
    save = Forest.save

    def recorded(self: Forest, *args: Any) -> None:
        save(self, *args)
        states.append(path.read_bytes())

    monkeypatch.setattr(Forest, "save", recorded)
    monkeypatch.setattr(tree_file, "SAVE_EVERY", -1.0)
    run(TreeSampling(30, transition=A, tree_file=str(path)), problem())
    assert len(states) == 5, "after the first simulation, and after each batch of eight"
    path.write_bytes(states[2])
    same(run(TreeSampling(30, transition=A, tree_file=str(path)), problem()), whole)


def test_a_tree_file_that_cannot_be_written_costs_no_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="its folder is missing"):
        run(TreeSearch(6, transition=A, tree_file=str(tmp_path / "none" / "t.safetensors")), problem())

    def full(*_: Any) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Forest, "save", full)
    with pytest.warns(UserWarning, match="no space left"):
        output = run(TreeSearch(6, transition=A, tree_file=str(tmp_path / "t.safetensors")), problem())
    same(output, run(TreeSearch(6, transition=A), problem()))


def test_files_of_other_runs_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tree.safetensors"
    base = {"transition": A, "tree_file": str(path)}
    run(TreeSampling(6, **base), problem())  # type: ignore[arg-type]
    for task, options, words in (
        (problem(3), {}, "its prompts was"),
        (problem(seed=1), {}, "its seed was 0 and is now 1"),
        (problem(), {"temperature": 0.5}, "settings.temperature was 1.0"),
        (problem(), {"transition": Transition("cps", 0.9)}, "settings.transition"),
    ):
        with pytest.raises(ValueError, match=words):
            run(TreeSampling(6, **(base | options)), task)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="settings.* was"):
        run(TreeSearch(6, **base), problem())  # type: ignore[arg-type]
    task = problem()
    task.denoiser.inner.schedule = NoiseSchedule.variance_preserving(12)  # type: ignore[misc]
    with pytest.raises(ValueError, match="its schedule.alpha"):
        run(TreeSampling(6, **base), task)  # type: ignore[arg-type]
    task = problem()
    task.denoiser.inner.mixture = GaussianMixture.from_weights([0.5, 0.5], [[-3.0], [1.0]], 0.25)  # type: ignore[attr-defined]
    task.denoiser.inner.initial = problem().denoiser.initial  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="grown with another model"):
        run(TreeSampling(6, **base), task)  # type: ignore[arg-type]
    task = problem()
    doubled = lambda x, prompts: 2 * REWARD(x)  # noqa: E731
    doubled.name = "QuadraticReward"  # type: ignore[attr-defined]
    task.reward = doubled
    with pytest.raises(ValueError, match="grown with another reward: a leaf of prompt 0 had"):
        run(TreeSampling(6, **base), task)  # type: ignore[arg-type]
    good = path.read_bytes()
    for bad in (good[: len(good) // 2], b"", b"nonsense" * 40):
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="is damaged or no tree file"):
            run(TreeSampling(6, **base), problem())  # type: ignore[arg-type]


def test_stored_latents_are_bounded(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    for sampler in BOTH[3], BOTH[5]:
        path = tmp_path / f"{sampler.name}.safetensors"
        run(type(sampler)(**(vars(sampler) | {"simulations": 41, "tree_file": str(path)})), problem())
        tensors = load_file(path)
        counts = tensors["means.at"][:, 0].bincount()
        assert int(counts.max()) <= sampler.stored_nodes
        assert tensors["means"].dtype == (torch.bfloat16 if sampler.node_dtype else torch.float64)
        assert len(tensors["clean"]) == (4 if sampler.greedy else 4 * 41)


def test_a_tree_grown_through_a_pipeline_is_resumed(
    guided: DiffusionPipeline, drm: rg.DiffusionRewardModel, tmp_path: Path
) -> None:
    path = tmp_path / "tree.safetensors"
    call: dict[str, Any] = {
        "prompt": ["a red star", "two blue circles"],
        "num_inference_steps": 4,
        "guidance_scale": 3.0,
    }

    def grown(simulations: int, file: str | None, **extra: Any) -> Any:
        sampler = TreeSearch(simulations, batch=2, tree_file=file)
        return guided(**(call | extra), sampler=sampler, reward=drm, seed=1, output_type="np")

    whole, part = grown(9, None), grown(4, str(path))
    resumed = grown(9, str(path))
    assert np.abs(resumed.images - whole.images).max() <= 1 / 255 + 1e-6
    assert resumed.rewards == pytest.approx(whole.rewards, abs=1e-3)
    assert resumed.ledger.denoiser_evaluations < whole.ledger.denoiser_evaluations
    assert part.ledger.denoiser_evaluations < whole.ledger.denoiser_evaluations
    with pytest.raises(ValueError, match="its prompts was"):
        grown(9, str(path), prompt=["a red star", "two green circles"])
    with pytest.raises(ValueError, match="its scores"):
        guided(**call, sampler=TreeSearch(9, batch=2, tree_file=str(path)), reward="shapes-verifier", seed=1)

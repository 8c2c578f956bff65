"""The tables of docs/rewards.md say what the code says, and every sampler takes rewards by name."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline

from rsm_guidance.cli.main import main
from rsm_guidance.cli.rewards import facts_of
from rsm_guidance.rewards import REWARDS, built_in, resolve_reward
from rsm_guidance.rewards.builtin import ModelReward
from rsm_guidance.samplers import SAMPLERS
from tests.rewards import layouts

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs/rewards.md").read_text()


def rows(head: str) -> dict[str, list[str]]:
    """Rows by name of the table with that head."""
    lines = DOCS[DOCS.index(head) :].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0].strip("` "): row[1:] for row in cells}


def test_the_table_of_rewards_is_that_of_the_code() -> None:
    table = rows("| reward | score | range |")
    assert list(table) == list(REWARDS)
    for name, (about, bounds, gradient, needs) in table.items():
        facts = facts_of(name)
        low, high = (f"{b:g}" if b is not None else None for b in facts["range"])
        assert (about, needs) == (facts["about"], facts["needs"])
        assert bounds == f"{low or '-inf'} to {high or 'inf'}" and gradient == (
            "yes" if facts["differentiable"] else "no"
        )


def test_common_options_are_those_of_all_models() -> None:
    options = set(rows("| option | meaning |\n|---|---|\n| `model`"))
    assert options - {"model"} == {f.name for f in dataclasses.fields(ModelReward)}
    models = [own for name in REWARDS if isinstance(own := built_in(name), ModelReward)]
    assert len(models) == 6 and all(options <= {f.name for f in dataclasses.fields(m)} for m in models)


def test_the_table_of_checks_is_the_committed_result() -> None:
    measured = json.loads((ROOT / "benchmarks/results/rewards.json").read_text())
    table = rows("| reward | checked against |")
    assert table.keys() | {"ocr"} | {n for n in REWARDS if n.startswith("shapes")} == set(REWARDS)
    for name, (_, images, difference, spread, half) in table.items():
        result = measured[name]
        assert (images, difference, spread) == (
            str(result["images"]),
            f"{result['difference']:.1g}",
            f"{result['spread']:.2g}",
        )
        assert half.strip(" |") == (f"{result['bfloat16']:.1g}" if "bfloat16" in result else "")
        assert result["difference"] < 1e-3 * result["spread"] and result.get("preparation", 0) < 1e-3


def test_the_command_lists_them(capsys: pytest.CaptureFixture[str]) -> None:
    main(["rewards", "--json"])
    listed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [facts["name"] for facts in listed] == list(REWARDS)
    main(["rewards", "hpsv2"])
    assert "version=v2.1" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["rewards", "nothing"])
    assert "there is no reward 'nothing'" in capsys.readouterr().err


def test_graphs_and_gradients_are_as_each_reward_says() -> None:
    for name in ("color", "compressibility"):
        reward = resolve_reward(name)
        scores = reward(torch.rand(2, 3, 16, 16, requires_grad=True), ["a", "b"])
        assert scores.requires_grad is reward.differentiable
        assert not reward(torch.rand(2, 3, 16, 16), ["a", "b"]).requires_grad


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("clip")
    layouts.hf_clip(folder)
    return f"clip-score:model={folder}"


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_takes_a_published_reward_by_name(sampler: str, guided: DiffusionPipeline, clip: str) -> None:
    out = guided("star", num_inference_steps=3, guidance_scale=1.0, seed=0, sampler=sampler, reward=clip)
    shown = layouts.tensor_of(out.images)
    assert out.rewards[0] == pytest.approx(float(resolve_reward(clip)(shown, ["star"])), abs=0.02)

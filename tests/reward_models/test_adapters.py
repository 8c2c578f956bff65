"""Reward models on a pipeline that has a LoRA: they judge as they did, and the LoRA guides none of their layers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rsm_guidance import DiffusionRewardModel, RewardGuidedPipeline
from rsm_guidance.reward_models.hub import load_reward_model
from rsm_guidance.training.alignment.policy import Policy
from tests.zoo import ZOO


@pytest.mark.parametrize("adaptation", ["frozen", "lora", "full"])
@pytest.mark.parametrize("before", [False, True])
def test_a_lora_of_the_pipeline_does_not_reach_the_judge(adaptation: Any, before: bool, tmp_path: Path) -> None:
    ZOO["sd3"].build().save_pretrained(tmp_path / "base")

    def pipeline() -> Any:
        pipe = RewardGuidedPipeline.from_pretrained(tmp_path / "base")
        pipe.set_progress_bar_config(disable=True)
        return pipe

    judge = DiffusionRewardModel.from_pipeline(
        pipeline(), blocks=1, adaptation=adaptation, lora_rank=2, head_width=8, backbone=str(tmp_path / "base")
    )
    judge.save_pretrained(tmp_path / "drm")
    pipe = pipeline()
    if before:  # a judge that was loaded first
        load_reward_model(str(tmp_path / "drm"), pipe)
    policy = Policy(pipe, rank=2)
    with torch.no_grad():
        for parameter in policy.trained.values():
            parameter.fill_(0.1)
    x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    found = load_reward_model(str(tmp_path / "drm"), pipe)
    assert torch.equal(found.score(x, 500.0, ["a", "b"]), judge.score(x, 500.0, ["a", "b"]))
    assert found.pipe.text_encoder is pipe.text_encoder, "nothing but the denoiser is loaded again"
    call = ZOO["sd3"].call() | {"seed": 0}
    out = pipe(**call, sampler="best-of-n:candidates=2", reward=str(tmp_path / "drm"))
    assert len(out.rewards) == 1

"""What scores: rewards by name share the pipeline's modules, columns reach the reward, and reward models are rewards."""

from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline

import rsm_guidance as rg

CALL: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 3.0, "output_type": "latent", "seed": 0}
PROMPTS = ["a red star", "a blue circle"]


def test_a_guided_call_by_name_loads_no_pipeline(guided: DiffusionPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[Any] = []
    plain = DiffusionPipeline.from_pretrained.__func__  # type: ignore[attr-defined]

    def counted(cls: Any, *args: Any, **kwargs: Any) -> Any:
        loaded.append(args)
        return plain(cls, *args, **kwargs)

    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", classmethod(counted))
    sampler = rg.StepwiseSampling(2)
    first = guided(PROMPTS, sampler=sampler, reward="shapes-drm", **CALL)
    assert not loaded
    drm = rg.resolve_reward("shapes-drm", pipe=guided)
    assert drm is rg.resolve_reward("shapes-drm", pipe=guided), "and no second reward model"
    assert drm.pipe is guided  # type: ignore[attr-defined]
    assert torch.equal(guided(PROMPTS, sampler=sampler, reward=drm, **CALL).images, first.images)
    guided(PROMPTS, sampler=sampler, reward="shapes-verifier", value="shapes-drm", monitor="shapes-correct", **CALL)
    assert not loaded


def test_columns_reach_the_reward_of_every_candidate(guided: DiffusionPipeline) -> None:
    class Target:
        """Likes the colour channel that its column names."""

        name, differentiable, requires, share = "target", True, ("channel",), 0.0

        def __call__(self, images: torch.Tensor, prompts: list[str], **columns: list[Any]) -> torch.Tensor:
            assert set(columns) == {"channel"} and len(columns["channel"]) == len(images)
            picked = images[torch.arange(len(images)), torch.tensor(columns["channel"])]
            return 2 * picked.mean((1, 2)) - images.mean((1, 2, 3))

    def colours(channels: list[int]) -> torch.Tensor:
        call: dict[str, Any] = CALL | {"output_type": "pt", "num_inference_steps": 6}
        sampler = rg.BestOfN(6, rg.CPS(0.9))
        columns = {"channel": channels, "unused": [None, None]}
        images = guided(PROMPTS, sampler=sampler, reward=Target(), reward_columns=columns, **call).images
        return images.mean((2, 3))

    change = colours([0, 2]) - colours([2, 0])  # by channel, between what is liked and the other way round
    assert change[0, 0] > change[0, 2] and change[1, 2] > change[1, 0], "among the same candidates it must be so"
    for columns, words in (
        (None, "needs the column 'channel'"),
        ({"channel": [0, 1, 2]}, "3 entries for 2 images"),
        ({"channel": []}, "0 entries for 2 images"),
    ):
        with pytest.raises(ValueError, match=words):
            guided(PROMPTS, sampler="stepwise", reward=Target(), reward_columns=columns, **CALL)


def test_columns_have_one_entry_for_each_prompt_whatever_its_copies(guided: DiffusionPipeline) -> None:
    class Named:
        name, differentiable, requires, share = "named", False, ("tag",), 0.0

        def __call__(self, images: torch.Tensor, prompts: list[str], **columns: list[Any]) -> torch.Tensor:
            return torch.tensor([float(tag == prompt) for tag, prompt in zip(columns["tag"], prompts, strict=True)])

    call = CALL | {"num_images_per_prompt": 2, "sampler": rg.BestOfN(2), "reward": Named()}
    out = guided(PROMPTS, reward_columns={"tag": PROMPTS}, **call)
    assert out.rewards == [1.0] * 4


def test_a_reward_model_is_a_reward_and_has_a_value(guided: DiffusionPipeline, drm: Any) -> None:
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(drm(images, PROMPTS), drm.score_images(images, PROMPTS))
    composite = rg.Composite((rg.Term(drm), rg.Term(rg.resolve_reward("shapes-verifier"), 0.5)))
    assert composite.share == drm.share and composite.differentiable is False
    out = guided(PROMPTS, sampler=rg.BestOfN(2), reward=composite, **CALL)
    assert out.ledger.value_cost == pytest.approx(2 * 2 * drm.share), "booked at its share for every image it scores"
    alone = guided(PROMPTS, sampler=rg.BestOfN(2), reward=drm, **CALL)
    assert alone.ledger.decodes == 0, "alone it scores the latents"

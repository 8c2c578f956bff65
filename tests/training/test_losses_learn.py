"""Every loss teaches a head what was planted in pairs of noised latents: who wins, who ties, how good they are."""

import pytest
import torch
from torch import Tensor

from rsm_guidance.reward_models import DiffusionRewardModel, RewardOutput
from rsm_guidance.reward_models.heads import Features
from rsm_guidance.reward_models.levels import level_table, noised
from rsm_guidance.training.reward_model.levels import LEVEL_LAWS
from rsm_guidance.training.reward_model.losses import LOSSES, NEEDS_ORDINAL, PairLabel, informs, weighted_mean
from tests.zoo import ZOO

PAIRS, TRAINED, TIE = 320, 224, 0.15
RATINGS = (-2.0, -1.0, 0.0, 1.0, 2.0)
Read = tuple[DiffusionRewardModel, Features, PairLabel]


@pytest.fixture(scope="module")
def pairs() -> dict[str, Read]:
    """A frozen model for each output, what its head reads of both members, and labels by the mean of one latent channel."""
    pipe = ZOO["sd3"].build()
    draw = torch.Generator().manual_seed(0)
    quality = torch.randn(2, PAIRS, generator=draw)
    x0 = torch.randn(2, PAIRS, 16, 16, 16, generator=draw)
    x0[:, :, 0] += quality[..., None, None]
    table = level_table(pipe.scheduler)
    levels = LEVEL_LAWS["beta"](torch.rand(PAIRS, generator=draw, dtype=torch.float64), table, a=1.0, b=4.0)
    noise = torch.randn(x0.shape, generator=draw)
    x = torch.cat([noised(latents, levels, table, eps) for latents, eps in zip(x0, noise, strict=True)])
    gap = quality[0] - quality[1]
    label = PairLabel((gap > 0).float(), gap.abs() < TIE, table.sigma[levels].float(), quality.T)
    made: dict[str, Read] = {}
    for output in ("gaussian", "ordinal"):
        torch.manual_seed(0)
        drm = DiffusionRewardModel.from_pipeline(
            pipe,
            head="pool",
            head_width=32,
            adaptation="frozen",
            output=output,
            ratings=RATINGS,  # type: ignore[arg-type]
        )
        with torch.no_grad():
            read = drm.scorer.read(*drm.inputs(x, table.timesteps[levels].repeat(2), ["a cat"] * 2 * PAIRS))
        made[output] = drm, read, label
    return made


def judged(drm: DiffusionRewardModel, read: Features) -> tuple[RewardOutput, RewardOutput]:
    out = drm.read(drm.head(*read))
    return out.pick(slice(0, PAIRS)), out.pick(slice(PAIRS, None))


def accuracy(first: Tensor, second: Tensor, label: PairLabel) -> float:
    held_out = (torch.arange(PAIRS) >= TRAINED) & ~label.tie
    return float((((first > second) == (label.win > 0.5))[held_out]).float().mean())


@pytest.mark.parametrize("name", LOSSES)
def test_a_head_learns_what_was_planted(name: str, pairs: dict[str, Read]) -> None:
    drm, read, label = pairs["ordinal" if name in NEEDS_ORDINAL else "gaussian"]
    torch.manual_seed(0)
    for layer in drm.head.modules():
        if isinstance(layer, torch.nn.Linear):
            layer.reset_parameters()
    weights = informs(name, label).float() * (torch.arange(PAIRS) < TRAINED)
    optimizer = torch.optim.Adam(drm.head.parameters(), lr=5e-3)
    with torch.no_grad():
        before = accuracy(*(out.mean for out in judged(drm, read)), label)
    costs = []
    for _ in range(150):
        loss = weighted_mean(LOSSES[name](*judged(drm, read), label), weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        costs.append(loss.item())
    with torch.no_grad():
        first, second = judged(drm, read)
    after = accuracy(first.mean, second.mean, label)
    assert costs[-1] < 0.8 * costs[0] and after > max(0.85, before), (name, before, after, costs[0], costs[-1])
    if name in ("win-tie", "oprm", "soft"):
        apart = (first.mean - second.mean).abs()
        assert float(apart[label.tie].mean()) < 0.5 * float(apart[~label.tie].mean()), "ties lie closer together"
    if name == "ordinal":
        error = first.mean - label.ratings[:, 0].clamp(-2, 2)  # type: ignore[index]
        assert float(error[TRAINED:].abs().mean()) < 0.5, "on the scale of the ratings"

"""Laws of noise levels."""

import pytest
import torch

from rsm_guidance.core.errors import UsageError
from rsm_guidance.reward_models.levels import LevelTable
from rsm_guidance.training.reward_model.config import NoiseConfig
from rsm_guidance.training.reward_model.noise import drawn_levels

TABLE = LevelTable(*(torch.linspace(1, 0, 1001, dtype=torch.float64)[:-1] for _ in range(3)))


@pytest.mark.parametrize(
    ("config", "mean", "deviation"),
    [
        (NoiseConfig("uniform"), 0.5, 12**-0.5),
        (NoiseConfig("beta", a=2.0, b=5.0), 2 / 7, (10 / (49 * 8)) ** 0.5),
        (NoiseConfig("logit-normal"), 0.5, 0.2083),
    ],
)
def test_levels_follow_their_law(config: NoiseConfig, mean: float, deviation: float) -> None:
    pairs = list(range(4000))
    index = drawn_levels(config, TABLE, 0, 0, pairs)
    sigma = TABLE.sigma[index]
    assert float(sigma.mean()) == pytest.approx(mean, abs=0.012)
    assert float(sigma.std()) == pytest.approx(deviation, abs=0.01)
    assert torch.equal(drawn_levels(config, TABLE, 0, 0, pairs[5:7]), index[5:7]), "whatever the batch"


def test_laws_that_are_none_are_refused() -> None:
    with pytest.raises(UsageError, match="noise.a must be positive; got 0"):
        NoiseConfig("beta", a=0.0)

"""Values of noisy latents; `resolve_value` finds what makes one."""

from dataclasses import dataclass
from typing import Any

from rsm_guidance.core.contracts import Denoiser, Reward, ValueSource
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.rewards import RowReward, resolve_reward
from rsm_guidance.values.base import EstimatedValue
from rsm_guidance.values.lookahead import Lookahead, adapter_on
from rsm_guidance.values.smoothed import Smoothed
from rsm_guidance.values.tweedie import Tweedie, TweedieValue

ESTIMATORS: dict[str, type[Any]] = {"tweedie": Tweedie, "smoothed": Smoothed, "lookahead": Lookahead}


@dataclass(frozen=True)
class TweedieOf:
    """The posterior mean under a reward of its own, whatever scores the finished images."""

    reward: Reward

    def value(self, denoiser: Denoiser, reward: RowReward | None, streams: RandomStreams) -> TweedieValue:
        columns = {} if reward is None else reward.columns
        return TweedieValue(denoiser, RowReward(self.reward, denoiser.prompts, columns))


def resolve_value(spec: object, pipe: Any = None) -> ValueSource:
    """What makes a value of noisy latents: an estimator or its name, or a reward as in `rewards.resolve_reward`.

    A diffusion reward model scores the latents themselves; any other reward, the image of their posterior mean.
    """
    if isinstance(spec, str) and spec in ESTIMATORS:
        estimator: ValueSource = ESTIMATORS[spec]()
        return estimator
    if hasattr(spec, "value"):
        return spec
    reward: Any = resolve_reward(spec, pipe)
    source: ValueSource = reward if hasattr(reward, "value") else TweedieOf(reward)
    return source


__all__ = [
    "ESTIMATORS",
    "EstimatedValue",
    "Lookahead",
    "Smoothed",
    "Tweedie",
    "TweedieOf",
    "adapter_on",
    "resolve_value",
]

"""Composition of rewards: weights, normalisation per prompt, logical and, floors, and windows over the run.

    Composite((Term(aesthetic, 0.5), Term(alignment, 1.0, floor=0.2)), normalize="zscore")

With r_i the terms, normalised where asked, the composite is sum_i w_i r_i (`combine="sum"`) or sum_i w_i log sigmoid(r_i)
(`combine="and"`: high only where every term is high, as the product of probabilities).  A term below its floor costs
`penalty` per unit that it lacks, in the term's own units.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rsm_guidance.core.contracts import Reward
from rsm_guidance.rewards.base import RewardError, as_reward, check_rows


@dataclass(frozen=True)
class Term:
    """One reward of a composite.

    Attributes:
        reward: a reward object, or a function of images and prompts.
        weight: any finite number; negative ones minimise.
        floor: value of the plain reward below which images are penalised, or None.
        window: shares (low, high) of the run, 0 the noisiest level and 1 the finished image, in which the term counts.
    """

    reward: Reward
    weight: float = 1.0
    floor: float | None = None
    window: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", as_reward(self.reward))
        if not -float("inf") < self.weight < float("inf"):
            raise ValueError(f"a weight must be finite; got {self.weight}")
        if not 0 <= self.window[0] < self.window[1] <= 1:
            raise ValueError(f"window must be (low, high) with 0 <= low < high <= 1; got {self.window}")


@dataclass(frozen=True)
class Composite:
    """Several rewards as one; a `Reward`, differentiable where its terms are (but for `rank`).

    Attributes:
        terms: at least one.
        combine: "sum", or "and" for log-sigmoids.
        normalize: "none"; "zscore" or "rank" among the images of the same prompt that are judged together (the candidates of
            a level).  A sampler that judges its candidates in several calls, as best-of-n does, compares across calls:
            use "none" there.
        penalty: of a floor, per unit.
    """

    terms: tuple[Term, ...]
    combine: Literal["sum", "and"] = "sum"
    normalize: Literal["none", "zscore", "rank"] = "none"
    penalty: float = 100.0

    def __post_init__(self) -> None:
        if not self.terms:
            raise ValueError("a composite needs at least one term")
        if self.combine not in ("sum", "and") or self.normalize not in ("none", "zscore", "rank"):
            raise ValueError(
                f"combine is 'sum' or 'and', normalize 'none', 'zscore' or 'rank'; got {self.combine!r}, {self.normalize!r}"
            )
        if not 0 <= self.penalty < float("inf"):
            raise ValueError(f"penalty must be finite and at least 0; got {self.penalty}")

    @property
    def name(self) -> str:
        """The terms, as in "0.5 aesthetic + alignment"."""
        parts = [(f"{t.weight:g} " if t.weight != 1 else "") + t.reward.name for t in self.terms]
        return " + ".join(parts)

    @property
    def identity(self) -> str:
        """The terms with their options."""
        return " + ".join(f"{t.weight:g} {getattr(t.reward, 'identity', t.reward.name)}" for t in self.terms)

    @property
    def differentiable(self) -> bool | None:
        """Whether all terms are; None where one does not know."""
        known = [t.reward.differentiable for t in self.terms]
        return False if False in known or self.normalize == "rank" else None if None in known else True

    @property
    def requires(self) -> tuple[str, ...]:
        """The columns that any term needs."""
        return tuple(dict.fromkeys(name for t in self.terms for name in t.reward.requires))

    @property
    def reads_prompt(self) -> bool:
        """Whether any term cannot do without the prompt."""
        return any(getattr(t.reward, "reads_prompt", False) for t in self.terms)

    @property
    def share(self) -> float:
        """Cost of scoring an image in denoiser evaluations, of all terms together."""
        return sum(t.reward.share for t in self.terms)

    def at(self, progress: float) -> "Composite":
        """What counts at a share of the run, in [0, 1]; the whole composite where no window is open."""
        open_now = tuple(t for t in self.terms if t.window[0] <= progress <= t.window[1])
        return dataclasses.replace(self, terms=open_now or self.terms)

    def check(self, prompts: list[str], columns: dict[str, list[Any]]) -> None:
        """Raise a UsageError for prompts and columns that a term cannot score."""
        for term in self.terms:
            check_rows(term.reward, prompts, columns)

    def __call__(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        """Scores [B] of images [B, 3, H, W] in [0, 1]; columns as the terms require them."""
        total: Tensor | None = None
        for term in self.terms:
            own = {name: columns[name] for name in term.reward.requires}
            plain = torch.as_tensor(term.reward(images, prompts, **own))
            plain = plain if plain.is_floating_point() else plain.double()
            if plain.shape != (len(prompts),):
                raise RewardError(f"{term.reward.name} returned shape {list(plain.shape)} for {len(prompts)} images")
            score = normalized(plain, prompts, self.normalize)
            score = term.weight * (logsigmoid(score) if self.combine == "and" else score)
            if term.floor is not None:
                score = score - self.penalty * (term.floor - plain).clamp(min=0)
            total = score if total is None else total + score.to(total)
        assert total is not None
        return total


def normalized(scores: Tensor, prompts: list[str], how: Literal["none", "zscore", "rank"]) -> Tensor:
    """Scores [B] relative to those of the same prompt: standard scores, or ranks in [0, 1] (equal scores share theirs)."""
    if how == "none":
        return scores
    result = torch.where(scores.isfinite(), torch.zeros_like(scores), torch.nan)
    for prompt in dict.fromkeys(prompts):
        index = torch.tensor([i for i, p in enumerate(prompts) if p == prompt], device=scores.device)
        index = index[scores[index].isfinite()]  # one that is no number stays so, and spoils no other
        group = scores[index]
        if how == "zscore":
            differ = len(group) > 0 and bool(group.amax() > group.amin())
            scaled = (group - group.mean()) / group.std(correction=0) if differ else group - group
        else:
            below = (group[:, None] > group).sum(1) + 0.5 * ((group[:, None] == group).sum(1) - 1)
            scaled = below.to(scores) / max(1, len(group) - 1)
        result = result.index_put((index,), scaled)
    return result

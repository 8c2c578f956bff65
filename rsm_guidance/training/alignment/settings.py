"""The parts of a configuration of `rsm-guidance train align`: plain types, so that the command line reads it without torch.

Each refuses values that have no meaning by themselves; `rules` refuses parts that do not go together.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rsm_guidance.core.errors import UsageError

Noisy = ("flow_sde", "ddim", "cps")


@dataclass(frozen=True)
class RolloutConfig:
    """How samples are made.

    Attributes:
        kind: "ode" (deterministic runs), "sde" (every step draws noise), "window" (the steps of a window do), "branches" (K
            children of single steps of an ODE run, each completed by the ODE), "tree" (trajectories part at some levels),
            "candidates" (K children at every step, one of which goes on), or "data" (no rollouts, groups from a file).
        steps: of a run.
        transition: of the steps that draw noise, such as "flow_sde 0.7" or "cps 0.8".
        group: samples per prompt that start from noises of their own, or from one noise with `same_start`.
        same_start: whether the samples of a prompt start from the same noise.
        children: of "branches", "tree" and "candidates", one number for each level from the noisiest on; 0 or missing for none.
        window: of "window": first level and number of levels.
        advance: updates after which the window moves on by one level; null for a window that stays.
        random_window: whether each rollout draws the place of its window; its first level is then at most that of `window`.
        continues: which of the candidates goes on.
        calibrate: rounds of samples before training, by which the noise of each level is moved until gains of both signs are
            equally frequent (DenseGRPO); 0 for none.
        noise_slope: growth of the noise with the depth of a tree, of the first level's noise (Dynamic-TreeRPO).
        data: of kind "data": JSON lines with "prompt", "images" and "rewards", or pairs in any format of `data check`.
        guidance: guidance scale of rollouts and updates; null for the pipeline's own, 1 for none.
        policy: which adapter samples.
    """

    kind: Literal["ode", "sde", "window", "branches", "tree", "candidates", "data"] = "sde"
    steps: int = 10
    transition: str = "flow_sde 0.7"
    group: int = 24
    same_start: bool = False
    children: tuple[int, ...] = ()
    window: tuple[int, int] | None = None
    advance: int | None = None
    random_window: bool = False
    continues: Literal["random", "best", "first"] = "random"
    calibrate: int = 0
    noise_slope: float | None = None
    data: Path | None = None
    guidance: float | None = None
    policy: Literal["policy", "old"] = "policy"

    def __post_init__(self) -> None:
        require_positive(self, "rollout.", "steps", "group", "advance")
        if self.calibrate < 0:
            raise UsageError(f"rollout.calibrate is a number of rounds, not negative; got {self.calibrate}")
        name, _, number = self.transition.strip().partition(" ")
        try:
            level = float(number or 1)
        except ValueError:
            level = math.nan
        if name not in Noisy or not 0 <= level < math.inf or (name != "flow_sde" and level > 1):
            raise UsageError(
                f"rollout.transition is {', '.join(Noisy)} and its noise level, such as 'flow_sde 0.7' (ddim and cps in "
                f"[0, 1]); got {self.transition!r}"
            )
        if any(k < 0 for k in self.children) or len(self.children) > self.steps:
            raise UsageError(
                f"rollout.children are numbers of at most {self.steps} levels (rollout.steps), none negative; got {list(self.children)}"
            )
        if self.window is not None and not (0 <= self.window[0] and 1 <= self.window[1] <= self.steps - self.window[0]):
            raise UsageError(
                f"rollout.window is a first level and a number of levels within {self.steps} steps; got {list(self.window)}"
            )

    @property
    def noise(self) -> str:
        """Name of the law of noise."""
        return self.transition.strip().partition(" ")[0]

    @property
    def noise_level(self) -> float:
        """Its number."""
        return float(self.transition.strip().partition(" ")[2] or 1)

    def window_at(self, update: int) -> tuple[int, int] | None:
        """Levels (first, last + 1) of the window after so many updates; it wraps round at the end of the run."""
        if self.window is None:
            return None
        first, length = self.window
        if self.advance is not None:
            first = (first + update // self.advance) % (self.steps - length + 1)
        return first, first + length

    @property
    def compared(self) -> int:
        """Size of the smallest group whose members are compared."""
        siblings = [k for k in self.children if k > 0]
        if self.kind in ("branches", "candidates"):
            return min(siblings, default=1)
        return self.group * math.prod(siblings) if self.kind == "tree" else self.group


@dataclass(frozen=True)
class EstimatorConfig:
    """How rewards become credit of steps; see `estimators`.

    Attributes:
        name: of the estimator.
        variant, eta, first: of "turning-point": "paper" or "code", the bonus of the latter, and whether a first step counts.
        discount: of "process-value".
        ratio: whether advantages are multiplied by Q_s / mean Q of "process-value"; rewards must then have one sign.
        softmax: of a tree: whether a node's leaves are weighted by their log-density.
        value: of "immediate", what scores noisy latents: a value's name, such as "tweedie", or a diffusion reward model; default the
            rewards themselves, by the image of Tweedie's estimate where they judge images alone.
    """

    name: Literal[
        "terminal", "branch-group", "immediate", "completion-difference", "tweedie-difference", "turning-point",
        "process-value", "reward-gradient",
    ] = "terminal"  # fmt: skip
    variant: Literal["paper", "code"] = "paper"
    eta: float = 1.0
    first: bool = True
    discount: float | None = None
    ratio: bool = False
    softmax: bool = False
    value: str | None = None

    def __post_init__(self) -> None:
        if self.value is not None and self.name != "immediate":
            raise UsageError(f"estimator.value belongs to the estimator 'immediate'; got {self.name!r}")
        if self.discount is not None and not 0 <= self.discount <= 1:
            raise UsageError(f"estimator.discount must lie in [0, 1]; got {self.discount}")


@dataclass(frozen=True)
class AdvantageConfig:
    """How credits are compared; see `advantages`.

    Attributes:
        by: what samples of a group share.
        deviation: what centred credits are divided by.
        clip: bound of an advantage; null for none.
        min_std, max_mean: groups of smaller deviation or larger mean are left out.
        absolute: weight of an absolute term beside the group's; null for none.
        absolute_steps: first steps of a run that get it; null for all.
        diversity: whether good samples count by their distance to siblings (GARDO).
        positive_only: whether samples below the mean are left out.
        constant_groups: batches in a row without any informative group after which training stops.
    """

    by: tuple[Literal["prompt", "seed", "depth", "step"], ...] = ("prompt",)
    deviation: Literal["group", "global", "none"] = "group"
    clip: float | None = 5.0
    min_std: float = 0.0
    max_mean: float | None = None
    absolute: float | None = None
    absolute_steps: int | None = None
    diversity: bool = False
    positive_only: bool = False
    constant_groups: int = 20

    def __post_init__(self) -> None:
        require_positive(self, "advantage.", "clip", "constant_groups", "absolute", "absolute_steps")
        if not 0 <= self.min_std < math.inf:
            raise UsageError(f"advantage.min_std must be finite and not negative; got {self.min_std}")
        if "prompt" not in self.by and "seed" not in self.by:
            raise UsageError(
                f"advantage.by must hold 'prompt' or 'seed': prompts are not comparable; got {list(self.by)}"
            )


FORWARD = ("rwr", "raft", "orw", "awm", "nft", "crd", "dgpo", "ram", "rvm")
IMPLICIT = ("dpo", "gdro", "prdp", "lpo")
_CONSTANTS = {
    "temperature": ("rwr", "ram", "gdro"),
    "nft_strength": ("nft",),
    "implicit_strength": ("crd", "dgpo", "dpo", "gdro", "prdp", "lpo"),
    "reward_strength": ("orw",),
    "keep": ("raft",),
    "top_weight": ("gdro",),
    "gate": ("lpo",),
}
"""Constants of forms, and the forms that have them."""


@dataclass(frozen=True)
class FormConfig:
    """How credit becomes a loss; see `forms`.

    Attributes:
        name: "reverse" (log-ratios of steps), a method of forward matching, or one of implicit rewards.
        temperature: of rwr (exp(r / temperature)), ram (r / temperature) and gdro (targets).
        nft_strength: NFT's beta, how far its two branches lie from the old policy.
        implicit_strength: beta of implicit rewards, of crd, dgpo, dpo, gdro, prdp and lpo.
        reward_strength: of orw, exp(reward_strength r).
        keep: samples of a group that raft keeps.
        top_weight: weight of flow matching on the best item, of gdro.
        gate: thresholds of lpo at clean and noisy levels.
        levels: noise levels, evenly drawn from the sampler's, at which every sample is trained (forward and implicit forms).
        highest, lowest: part of the run that is trained, as shares from its noisy end; null for its start and end.
        shared_noise: whether the samples of a prompt are noised alike, as whole groups always are (forward forms). Ours: as
            advantages of a group add up to 0, most of the noise then leaves the gradient.
        share: share of the steps or levels of that part which are trained, drawn anew for every sample.
    """

    name: Literal[
        "reverse", "rwr", "raft", "orw", "awm", "nft", "crd", "dgpo", "ram", "rvm", "dpo", "gdro", "prdp", "lpo"
    ] = "reverse"  # fmt: skip
    temperature: float | None = None
    nft_strength: float | None = None
    implicit_strength: float | None = None
    reward_strength: float | None = None
    keep: int | None = None
    top_weight: float | None = None
    gate: tuple[float, float] | None = None
    levels: int | None = None
    highest: float | None = None
    lowest: float | None = None
    shared_noise: bool = False
    share: float = 1.0

    def __post_init__(self) -> None:
        require_positive(
            self, "form.", "temperature", "nft_strength", "implicit_strength", "reward_strength", "keep", "levels"
        )
        low, high = self.part
        if not (0 <= low < high <= 1 and 0 < self.share <= 1):
            raise UsageError(
                f"form.highest and lowest are shares of a run with 0 <= highest < lowest <= 1, and form.share lies in (0, 1]; "
                f"got {low}, {high} and {self.share}"
            )
        for name, users in _CONSTANTS.items():
            if getattr(self, name) is not None and self.name not in users:
                raise UsageError(f"the form {self.name!r} has no {name}; {', '.join(users)} have")

    @property
    def part(self) -> tuple[float, float]:
        """The part of a run that is trained, as shares from its noisy end."""
        return self.highest or 0.0, 1.0 if self.lowest is None else self.lowest

    @property
    def family(self) -> Literal["reverse", "forward", "implicit"]:
        """Which kind of form it is."""
        return "forward" if self.name in FORWARD else "implicit" if self.name in IMPLICIT else "reverse"

    @property
    def whole_groups(self) -> bool:
        """Whether the loss compares samples, so that a micro-batch must hold whole groups at one level and with one noise."""
        return self.name in ("crd", "dgpo", *IMPLICIT)

    @property
    def needs(self) -> tuple[str, ...]:
        """Constants without which it has no meaning."""
        optional = ("top_weight", "gate")
        return tuple(name for name, users in _CONSTANTS.items() if self.name in users and name not in optional)


@dataclass(frozen=True)
class TimeConfig:
    """How much each noise level counts; see `time_weights`.

    Attributes:
        weight: of reverse forms or of forward and implicit ones.
        p: exponent of "ghuber".
        cap: of "snr".
        balanced: whether steps with more branches count no more than others.
    """

    weight: Literal[
        "flow-grpo", "pcpo", "tempflow", "guard", "guard-unscaled", "fair-clip", "fair-clip-2",
        "uniform", "t", "t2", "huber", "ghuber", "snr", "adaptive",
    ] | None = None  # fmt: skip
    p: float | None = None
    cap: float | None = None
    balanced: bool = False

    def __post_init__(self) -> None:
        require_positive(self, "time.", "p", "cap")
        for name, user in (("p", "ghuber"), ("cap", "snr")):
            if getattr(self, name) is not None and self.weight != user:
                raise UsageError(f"time.{name} belongs to the weight {user!r}; got the weight {self.weight!r}")


REVERSE_WEIGHTS = ("flow-grpo", "pcpo", "tempflow", "guard", "guard-unscaled", "fair-clip", "fair-clip-2")


@dataclass(frozen=True)
class TrustConfig:
    """What keeps the policy near where it was; see `trust_regions`.

    Attributes:
        region: on ratios: "ratio" (PPO's clip), "hinge" (RSM's), "kl-mask" (Flow-DPPO's) or "none".
        clip: range of the ratio, of a mean over dimensions; the largest divergence of "kl-mask".
        proximal: velocities are also held to those of the old policy or of an average of the policy, with proximal_weight.
        reference: the base model's "velocity" or transition "mean" is held to, with reference_weight.
        denominator: of "mean": "variance" (S^2, the exact divergence), "diffusion" (S^2 / D, Flow-GRPO's) or "one".
        reference_guidance: guidance scale of the reference's velocity (CRD: 4.5); null for that of the rollout.
        reference_least: weight of the hold on the worst samples, 1 for all alike (CRD); only of forward forms.
        norm_weight, norm_margin: penalty of velocities longer than (1 + margin) times the reference's (NormGuard).
        data, data_weight: JSON lines with "prompt" and "image", whose flow-matching loss is added (DDRL).
        anchors: whether steps of an ODE run that have no branches are held to the reference, too (RSM).
        gate: share of samples, those most overrated, that are held to the reference; null for all (GARDO).
        gate_rewards: rewards that decide what is overrated.
        reset_every, reset_at: updates, or a divergence, at which the current policy becomes the reference (GARDO).
        limit: divergence of a step from the policy that sampled, a mean over dimensions, at which training is stopped as failed;
            for forward forms the squared distance of velocities.
    """

    region: Literal["none", "ratio", "hinge", "kl-mask"] = "none"
    clip: float | None = None
    proximal: Literal["none", "old", "ema"] = "none"
    proximal_weight: float | None = None
    reference: Literal["none", "velocity", "mean"] = "none"
    reference_weight: float | None = None
    denominator: Literal["variance", "diffusion", "one"] | None = None
    reference_guidance: float | None = None
    reference_least: float = 1.0
    norm_weight: float = 0.0
    norm_margin: float = 0.0
    data: Path | None = None
    data_weight: float | None = None
    anchors: bool = False
    gate: float | None = None
    gate_rewards: tuple[str, ...] = ()
    reset_every: int | None = None
    reset_at: float | None = None
    limit: float = 1.0

    def __post_init__(self) -> None:
        require_positive(
            self, "trust.", "clip", "proximal_weight", "reference_weight", "data_weight", "reset_every", "reset_at",
            "limit",
        )  # fmt: skip
        for what, given, weight in (
            ("clip", self.region != "none", self.clip),
            ("proximal_weight", self.proximal != "none", self.proximal_weight),
            ("reference_weight", self.reference != "none", self.reference_weight),
            ("denominator", self.reference == "mean", self.denominator),
            ("data_weight", self.data is not None, self.data_weight),
        ):
            if given != (weight is not None):
                other = {"clip": "region", "denominator": "reference=mean"}.get(what, what.removesuffix("_weight"))
                raise UsageError(
                    f"trust.{what} and trust.{other} go together; got {other.partition('=')[0]}="
                    f"{getattr(self, other.partition('=')[0])} and {what}={weight}"
                )
        if self.norm_weight < 0 or self.norm_margin < 0 or not 0 < self.reference_least <= 1:
            raise UsageError(
                "trust.norm_weight and norm_margin must not be negative and reference_least in (0, 1]; got "
                f"{self.norm_weight}, {self.norm_margin} and {self.reference_least}"
            )
        if self.gate is not None and not 0 < self.gate < 1:
            raise UsageError(f"trust.gate is a share of samples in (0, 1); got {self.gate}")


def require_positive(config: Any, prefix: str, *names: str) -> None:
    """Raise a UsageError that names the first of some numbers which is given and not positive and finite."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{prefix}{name} must be positive; got {value}")

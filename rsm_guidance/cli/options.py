"""Options that several commands share."""

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import tyro

from rsm_guidance.core.ledger import Budget
from rsm_guidance.core.transitions import Transition
from rsm_guidance.samplers import SAMPLERS, Sampler, parse_sampler
from rsm_guidance.shapes.model import model_path
from rsm_guidance.values import Judge, load_judge


@dataclass(frozen=True)
class ModelOptions:
    """What makes the images, and what judges them."""

    model: Annotated[str, tyro.conf.arg(aliases=["--pipeline"])] = "shapes"
    """Hub id or folder of a diffusers pipeline; "shapes" is the embedded one."""
    reward: str = "shapes-drm"
    """A name (shapes-drm, shapes-verifier, shapes-correct), the folder or hub id of a diffusion reward model, or package.module:object."""
    steps: int | None = None
    """Denoising steps; default: the model's own."""
    guidance_scale: float | None = None
    """Classifier-free guidance; default: the model's own."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Precision of the pipeline."""

    @property
    def model_id(self) -> str:
        """Where the pipeline lies."""
        return model_path() if self.model == "shapes" else self.model

    def judge(self) -> Judge:
        """The loaded reward."""
        return load_judge(self.reward)


@dataclass(frozen=True)
class SamplerOptions:
    """How candidates are made; an option that is left out keeps the sampler's default."""

    candidates: int | None = None
    """Samples (best-of-n), children per level (stepwise) or continuations per block (svdd)."""
    particles: int | None = None
    """fk-steering and smc: particles per prompt."""
    transition: Literal["scheduler", "ode", "ddim", "cps", "flow_sde", "glass"] | None = None
    """How to step; ode is deterministic."""
    noise: float | None = None
    """Noise level of the transition: eta in [0, 1] of ddim and cps, a of flow_sde."""
    window: tuple[float, float] | None = None
    """stepwise: noise levels LOW HIGH in [0, 1] where children compete."""
    initial_candidates: int | None = None
    """stepwise: initial noises that compete."""
    trajectories: int | None = None
    """stepwise: independent runs, of which the final judge picks one."""
    temperature: float | None = None
    """stepwise and svdd: 0 keeps the best, above 0 draws by softmax(score / temperature); fk-steering: of the target."""
    block: int | None = None
    """svdd: levels per block."""
    potential: Literal["difference", "max", "sum"] | None = None
    """fk-steering: how values become weights."""
    strength: float | None = None
    """reward-gradient: size of the push, in standard deviations of a step."""
    accept: float | None = None
    """best-of-n and tree-search: final reward with which a prompt is done."""
    threshold: float | None = None
    """rbf: value with which a child is accepted; fk-steering and smc: share of effective particles to resample at."""

    set: tuple[str, ...] = ()
    """Any other option of the sampler, as FIELD=VALUE."""

    def build(self, name: str) -> Sampler:
        """The sampler of that name, which may carry options of its own (see `parse_sampler`).

        Raises:
            ValueError: if it does not have an option that was given.
        """
        options: dict[str, Any] = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        kind, noise, further = options.pop("transition"), options.pop("noise"), options.pop("set")
        given = {k: v for k, v in options.items() if v is not None}
        if kind is not None or noise is not None:
            default = getattr(SAMPLERS.get(name.partition(":")[0]), "transition", Transition())
            kind = kind or default.kind
            given["transition"] = Transition(kind, default.noise if noise is None else noise)
        return parse_sampler(":".join([name, *further]), **given)


def budget_of(evaluations: float | None, seconds: float | None = None) -> Budget | None:
    """A budget from command-line numbers, or None."""
    return None if evaluations is None and seconds is None else Budget(evaluations=evaluations, seconds=seconds)

"""Combinations that have no meaning, each with its reason.

A rule is a condition under which a configuration is refused and the sentence that says why and what to do.  All are checked
when the configuration is read, before any model is.
"""

from collections.abc import Iterator
from typing import Protocol

from rsm_guidance.core.errors import UsageError
from rsm_guidance.training.alignment.settings import (
    REVERSE_WEIGHTS,
    AdvantageConfig,
    EstimatorConfig,
    FormConfig,
    RolloutConfig,
    TimeConfig,
    TrustConfig,
)

STOCHASTIC = ("sde", "window", "branches", "tree", "candidates")


class Point(Protocol):
    """What rules look at; an `AlignConfig` is one."""

    @property
    def rollout(self) -> RolloutConfig: ...
    @property
    def estimator(self) -> EstimatorConfig: ...
    @property
    def advantage(self) -> AdvantageConfig: ...
    @property
    def form(self) -> FormConfig: ...
    @property
    def time(self) -> TimeConfig: ...
    @property
    def trust(self) -> TrustConfig: ...
    @property
    def reward_sign(self) -> str | None: ...
    @property
    def weight(self) -> str: ...


def require_meaning(config: Point) -> None:
    """Raise a UsageError with the reason of the first rule that a configuration breaks."""
    for rules in (_rollout, _estimator, _form, _weight, _trust):
        for broken, reason in rules(config):
            if broken:
                raise UsageError(reason)


Rules = Iterator[tuple[bool, str]]


def _rollout(c: Point) -> Rules:
    r = c.rollout
    yield (
        r.compared < 2,
        f"a group of {r.compared} has no advantage, as its samples are compared with each other: set "
        + ("rollout.children" if r.kind in ("branches", "candidates") else "rollout.group")
        + " to at least 2",
    )
    yield (
        r.kind in STOCHASTIC and r.noise_level == 0,
        f"rollout.kind={r.kind!r} needs noise, and {r.transition!r} draws none: raise its level, or choose kind='ode'",
    )
    yield (
        (r.window is None) == (r.kind == "window"),
        "rollout.window belongs to rollout.kind='window', which needs it; "
        f"got kind={r.kind!r} and window={None if r.window is None else list(r.window)}",
    )
    yield (
        r.kind != "window" and (r.advance is not None or r.random_window),
        f"rollout.advance and random_window move a window; rollout.kind={r.kind!r} has none",
    )
    yield (
        r.advance is not None and r.random_window,
        "rollout.advance moves the window on and random_window draws its place; choose one",
    )
    yield (
        r.kind in ("branches", "tree", "candidates") and not any(k > 1 for k in r.children),
        f"rollout.kind={r.kind!r} needs rollout.children, numbers by level of which some are above 1",
    )
    yield (
        r.kind not in ("branches", "tree", "candidates") and bool(r.children),
        f"rollout.children belong to branches, tree and candidates; rollout.kind is {r.kind!r}",
    )
    yield (
        len(r.children) == r.steps and r.children[-1] > 0,
        f"the last of {r.steps} steps draws no noise, so no children can part there: give at most {r.steps - 1} rollout.children",
    )
    yield (
        r.window is not None and r.window[0] == r.steps - 1,
        f"the last of {r.steps} steps draws no noise, so rollout.window must begin before it; got {list(r.window or ())}",
    )
    yield (
        (r.data is None) == (r.kind == "data"),
        "rollout.data, a file of groups or pairs, belongs to rollout.kind='data', which needs it; got "
        f"kind={r.kind!r} and data={None if r.data is None else str(r.data)}",
    )
    yield (
        r.noise_slope is not None and r.kind != "tree",
        f"rollout.noise_slope raises the noise with the depth of a tree; rollout.kind is {r.kind!r}",
    )
    yield (
        r.calibrate > 0
        and (r.kind not in STOCHASTIC or c.estimator.name not in ("completion-difference", "tweedie-difference")),
        "rollout.calibrate balances the signs of gains, so it needs a rollout with noise and the estimator "
        f"'completion-difference' or 'tweedie-difference'; got {r.kind!r} and {c.estimator.name!r}",
    )


def _estimator(c: Point) -> Rules:
    name, kind, by = c.estimator.name, c.rollout.kind, c.advantage.by
    needs = {
        "branch-group": ("branches", "tree"),
        "immediate": ("candidates",),
        "completion-difference": ("sde", "window"),
        "turning-point": ("sde", "window"),
        "tweedie-difference": ("sde", "window"),
        "process-value": ("sde", "window"),
    }
    yield (
        name == "reward-gradient",
        "estimator.name='reward-gradient' is first order and has no form here: these forms take scores; choose another one, "
        "which serves rewards that are not differentiable, too",
    )
    yield (
        name in needs and kind not in needs[name],
        f"the estimator {name!r} compares what rollout.kind={' or '.join(needs.get(name, ()))} makes; got {kind!r}",
    )
    yield (
        name == "terminal" and kind in ("branches", "candidates"),
        f"with rollout.kind={kind!r} samples share all steps but one: choose the estimator "
        f"{'branch-group' if kind == 'branches' else 'immediate'!r}",
    )
    yield (
        name in ("branch-group", "immediate")
        and kind in ("branches", "candidates")
        and not {"seed", "step"} <= set(by),
        f"the estimator {name!r} compares children of one state: advantage.by must be [seed, step]; got {list(by)}",
    )
    yield (
        "step" in by and name == "terminal",
        "with the estimator 'terminal' all steps of a path have one credit: advantage.by must not hold 'step'",
    )
    yield (
        name in ("completion-difference", "tweedie-difference", "process-value", "turning-point") and "step" not in by,
        f"the estimator {name!r} has a credit for every step, and gains of different noise levels are not comparable: add 'step' "
        f"to advantage.by; got {list(by)}",
    )
    yield (
        "depth" in by and kind != "tree",
        f"advantage.by=depth compares nodes of a tree; rollout.kind is {kind!r}",
    )
    yield (
        c.estimator.softmax and kind != "tree",
        f"estimator.softmax weights the leaves of a tree; rollout.kind is {kind!r}",
    )
    yield (
        name == "process-value" and c.estimator.discount is None,
        "the estimator 'process-value' needs estimator.discount, which is published nowhere",
    )
    yield (
        name != "process-value" and (c.estimator.discount is not None or c.estimator.ratio),
        f"estimator.discount and estimator.ratio belong to 'process-value'; got the estimator {name!r}",
    )
    yield (
        c.estimator.ratio and c.reward_sign is None,
        "estimator.ratio divides by a mean of rewards, which has no meaning if they are of mixed sign: state reward_sign if all "
        "values of the rewards have one, or set estimator.ratio=false",
    )


def _form(c: Point) -> Rules:
    form, kind = c.form, c.rollout.kind
    missing = [f"form.{name}" for name in form.needs if getattr(form, name) is None]
    yield bool(missing), f"the form {form.name!r} needs {' and '.join(missing)}"
    yield (
        form.family == "reverse" and kind not in STOCHASTIC,
        f"the form 'reverse' takes log-ratios of steps that drew noise, and rollout.kind={kind!r} draws none: choose "
        f"{', '.join(STOCHASTIC)}, or a form of forward matching such as 'nft' or 'awm'",
    )
    yield (
        form.name in ("prdp", "lpo") and kind not in STOCHASTIC,
        f"the form {form.name!r} takes log-ratios of steps that drew noise, and rollout.kind={kind!r} draws none",
    )
    yield (
        form.name == "lpo" and kind != "candidates",
        f"the form 'lpo' pairs the best and the worst child of one state: it needs rollout.kind='candidates'; got {kind!r}",
    )
    yield (
        form.family == "forward" and c.estimator.name != "terminal",
        f"forward matching noises finished samples again, so the estimator {c.estimator.name!r}, which credits single steps, "
        "means nothing to it: choose 'terminal'",
    )
    yield (
        form.family == "forward" and kind in ("branches", "tree", "candidates"),
        f"forward matching trains on finished samples and cannot use what rollout.kind={kind!r} shares: choose 'ode'",
    )
    yield (
        kind == "data" and form.name not in ("dpo", "gdro", "rwr", "raft"),
        f"the form {form.name!r} is on policy and cannot learn from given groups (rollout.kind='data'); dpo, gdro, rwr and raft can",
    )
    yield (
        form.name == "raft" and form.keep is not None and form.keep >= c.rollout.group,
        f"form.keep={form.keep} keeps every one of the group of {c.rollout.group}, which selects nothing",
    )
    yield (
        form.family != "reverse" and c.advantage.by != ("prompt",) and form.name != "lpo",
        f"the form {form.name!r} compares samples of a prompt: advantage.by must be [prompt]; got {list(c.advantage.by)}",
    )
    yield (
        form.name in ("nft", "crd") and c.advantage.clip is None,
        f"the form {form.name!r} turns advantages into probabilities by their largest value: set advantage.clip",
    )


def _weight(c: Point) -> Rules:
    weight, family, noise = c.weight, c.form.family, c.rollout.noise
    reverse = weight in REVERSE_WEIGHTS
    yield (
        reverse != (family == "reverse") and c.form.name not in ("prdp", "lpo"),
        f"time.weight={weight!r} weighs {'log-ratios of steps' if reverse else 'errors of finished samples'}, and the form "
        f"{c.form.name!r} has none",
    )
    yield (
        c.form.name in ("prdp", "lpo") and c.time.weight is not None,
        f"the form {c.form.name!r} has no time weight of its own; leave time.weight out",
    )
    yield (
        weight in ("guard", "guard-unscaled", "pcpo", "fair-clip-2") and noise != "flow_sde",
        f"time.weight={weight!r} is defined by the step and diffusion of the flow SDE; rollout.transition is {c.rollout.transition!r}",
    )
    yield (
        weight in ("guard", "guard-unscaled") and c.trust.region not in ("ratio", "hinge"),
        f"time.weight={weight!r} makes ratios alike so that one clip fits all levels: it needs trust.region='ratio' or 'hinge'",
    )
    yield (
        weight in ("fair-clip", "fair-clip-2") and c.trust.region != "hinge",
        f"time.weight={weight!r} rescales the hinge of RSM: it needs trust.region='hinge'",
    )
    yield (
        weight == "adaptive" and family != "forward",
        f"time.weight='adaptive' divides by the model's own error, which makes implicit rewards of the form {c.form.name!r} differ "
        "from what it compares them with",
    )
    yield (
        c.form.name == "nft" and c.time.weight not in (None, "adaptive", "uniform"),
        f"the form 'nft' weighs both branches alike: time.weight is 'adaptive' (its own) or 'uniform'; got {weight!r}",
    )
    yield (
        c.time.balanced and c.rollout.kind not in ("branches", "tree"),
        f"time.balanced makes up for unequal numbers of branches; rollout.kind={c.rollout.kind!r} has none",
    )


def _trust(c: Point) -> Rules:
    t, family = c.trust, c.form.family
    yield (
        t.region in ("hinge", "kl-mask") and family != "reverse",
        f"trust.region={t.region!r} is about log-ratios of steps, which the form {c.form.name!r} has not",
    )
    yield (
        t.region == "ratio" and family != "reverse" and c.form.name not in ("awm", "prdp", "lpo"),
        f"trust.region='ratio' clips a ratio, which the form {c.form.name!r} has not; hold it by trust.proximal",
    )
    yield (
        c.form.name in ("prdp", "lpo") and t.region != "ratio",
        f"the form {c.form.name!r} clips its ratios: set trust.region='ratio' and trust.clip",
    )
    yield (
        t.reference == "mean" and c.rollout.kind not in STOCHASTIC,
        "trust.reference='mean' compares means of steps that drew noise; with "
        f"rollout.kind={c.rollout.kind!r} there are none: choose 'velocity'",
    )
    yield (
        t.reference == "mean" and family == "forward",
        f"the form {c.form.name!r} evaluates no steps, so it has no means to hold: choose trust.reference='velocity'",
    )
    yield (
        t.denominator == "diffusion" and c.rollout.noise != "flow_sde",
        f"trust.denominator='diffusion' is sigma^2 of the flow SDE; {c.rollout.transition!r} has only 'variance' or 'one'",
    )
    yield (
        c.form.name in ("ram", "orw") and t.reference != "velocity",
        f"the form {c.form.name!r} is held to the reference, else it collapses onto the best sample: set trust.reference='velocity'"
        + (" and reference_weight (1 in the paper)" if c.form.name == "ram" else " and reference_weight, at least 1"),
    )
    yield (
        c.form.name == "nft" and t.proximal != "none",
        "the form 'nft' holds to the old policy by form.nft_strength; leave trust.proximal out",
    )
    yield (
        c.form.name == "awm" and t.region == "none" and t.proximal == "none",
        "the form 'awm' without trust.region='ratio' or trust.proximal collapses; set one of them",
    )
    yield (
        t.reference_least < 1 and (family != "forward" or t.reference == "none"),
        "trust.reference_least weakens the hold of forward forms on bad samples; it needs one and trust.reference='velocity'",
    )
    yield (
        t.anchors and (c.rollout.kind != "branches" or t.reference == "none"),
        "trust.anchors holds steps without branches to the reference: it needs rollout.kind='branches' and trust.reference",
    )
    yield (
        family == "implicit" and (t.reference != "none" or t.proximal != "none" or t.norm_weight > 0),
        f"the form {c.form.name!r} is held to the reference by form.implicit_strength; leave trust.reference, proximal and "
        "norm_weight out",
    )
    gardo = t.gate is not None or bool(t.gate_rewards) or t.reset_every is not None or t.reset_at is not None
    yield (
        gardo and t.reference == "none",
        "trust.gate and trust.reset_* are about the hold to the reference: set trust.reference and reference_weight",
    )
    yield (
        (t.gate is None) != (not t.gate_rewards),
        "trust.gate finds overrated samples by other rewards: it goes together with trust.gate_rewards",
    )

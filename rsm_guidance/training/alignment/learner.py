"""The module that is trained: a policy and the losses of its rows (`rows.lesson`), as `training.loop` calls it."""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import GaussianTransition
from rsm_guidance.engine.memory import under_gradient
from rsm_guidance.engine.replay import Replay
from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.experience import steps_of
from rsm_guidance.training.alignment.forms.reverse import step_log_ratio
from rsm_guidance.training.alignment.levels import geometry
from rsm_guidance.training.alignment.objective import (
    Holds,
    Matched,
    Terms,
    forward_loss,
    implicit_loss,
    path_loss,
    reverse_loss,
    step_pair_loss,
)
from rsm_guidance.training.alignment.policy import Policy, Role
from rsm_guidance.training.alignment.time_weights import forward_cost

Batch = Mapping[str, Any]


class Learner(nn.Module):
    """Losses of a policy on rows of its samples.

    Args:
        policy: whose denoiser the replays call.
        config: of the training.
        schedule: the levels.
        transition: that recorded the steps.

    A batch holds rows by name and, as "replay", the recording that their "row" is of.
    """

    def __init__(
        self, policy: Policy, config: AlignConfig, schedule: NoiseSchedule, transition: GaussianTransition
    ) -> None:
        super().__init__()
        self.policy, self.config = policy, config
        self.schedule, self.transition = schedule, transition
        self.register_buffer("gap", torch.zeros(()))
        self.gap: Tensor
        """Last penalty of the reference, by which it is reset; part of a saved state."""

    def train(self, mode: bool = True) -> "Learner":
        """Always as in evaluation; see `Policy.train`."""
        return super().train(False)

    def weight(self, batch: Batch) -> float:
        """Number of rows, so that a mean over micro-batches is one over the rows of the update."""
        return float(len(batch["row"]))

    def forward(self, batch: Batch, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """ "loss", the mean over rows, and its parts.

        Raises:
            FloatingPointError: if the policy is further from the one that sampled than `trust.limit`.
        """
        if not len(batch["row"]):
            nothing = torch.stack([p.sum() for p in self.policy.trained.values()]).sum() * 0
            return {"loss": nothing}
        with self._checkpointing():
            terms = self._terms(batch, batch["replay"])
        share = batch["share"].to(terms.loss) if "share" in batch else 1.0
        means = {name: t.float().mean() for name, t in terms.log.items()}
        self._require_near(means)
        if "reference" in means:
            self.gap.copy_(means["reference"])
        loss = (terms.loss * share).mean()
        if "data" in batch:
            means["data"] = self._anchored(batch["data"], batch["data_replay"])
            loss = loss + (self.config.trust.data_weight or 0.0) * means["data"]
        return {"loss": loss, **means}

    def _anchored(self, rows: Batch, replay: Replay) -> Tensor:
        """Mean flow-matching loss of given images, so that the policy keeps to them."""
        velocity = self.direction(self._said("policy", rows, replay))
        return (velocity - self._target(rows)).square().mean()

    def _require_near(self, means: Mapping[str, Tensor]) -> None:
        moved = means.get("divergence", means.get("distance"))
        limit = self.config.trust.limit
        if moved is not None and not float(moved) <= limit:
            raise FloatingPointError(
                f"the policy has gone {float(moved):.3g} from the one that sampled, beyond trust.limit={limit:g}: lower "
                "optimizer.lr or updates_per_epoch, or tighten trust.clip, and resume from the saved state"
            )

    def _checkpointing(self) -> AbstractContextManager[None]:
        return under_gradient([self.policy.denoiser], self.config.gradient_checkpointing)

    def _terms(self, batch: Batch, replay: Replay) -> Terms:
        name = self.config.form.name
        if name == "reverse":
            return self._reverse(batch, replay)
        if name in ("prdp", "lpo"):
            return self._pairs_of_steps(batch, replay)
        if self.config.form.family == "implicit":
            return self._implicit(batch, replay)
        return self._forward(batch, replay)

    # --- forms ---

    def _reverse(self, batch: Batch, replay: Replay) -> Terms:
        trust = self.config.trust
        base = self._said("reference", batch, replay) if self._holds_reference else None
        proximal = None
        if trust.proximal != "none":
            proximal = self.direction(self._said("old" if trust.proximal == "old" else "average", batch, replay))
        new = self._said("policy", batch, replay)
        velocity = self.direction(new)
        count = len(batch["row"])
        loss, logs = torch.zeros(count, device=velocity.device), dict[str, Tensor]()
        for index, law, old, level, target in steps_of(batch, self.transition, self.schedule, new):
            reference = None
            if base is not None and trust.reference == "mean":
                reference = self.transition(base.pick(index), self.schedule, level, target)
            holds = Holds(
                None if base is None else self.direction(base)[index],
                None if proximal is None else proximal[index],
                batch["held"][index].to(velocity.device),
            )
            terms = reverse_loss(
                self.config,
                geometry(self.transition, self.schedule, level, target),
                law,
                old,
                batch["next"][index],
                batch["advantage"][index].to(law.mean),
                reference,
                velocity[index],
                holds,
            )
            loss = loss.index_copy(0, index.to(loss.device), terms.loss.float())
            for name, part in terms.log.items():
                logs.setdefault(name, torch.zeros_like(loss))[index] = part.float()
        return Terms(loss, logs)

    def _forward(self, batch: Batch, replay: Replay) -> Terms:
        grouped = self.config.form.whole_groups
        rows = _flat(batch) if grouped else batch
        old = self.direction(self._said("old", rows, replay)) if self._compares_old else None
        holds = self._holds(rows, replay, batch.get("guided", replay))
        found = forward_loss(
            self.config,
            Matched(
                self.direction(self._said("policy", rows, replay)),
                self._target(rows),
                rows["alpha"].float(),
                rows["sigma"].float(),
                rows["coefficient"].to(rows["x"].device),
                rows["group"].unique(return_inverse=True)[1] if not grouped else _group_numbers(batch),
                old,
                holds,
            ),
        )
        return _by_group(found, batch) if grouped else found

    def _implicit(self, batch: Batch, replay: Replay) -> Terms:
        rows, (groups, size) = _flat(batch), batch["row"].shape
        base = self._cost(self._said("reference", rows, replay), rows)
        new = self._cost(self._said("policy", rows, replay), rows)
        return implicit_loss(
            self.config, new.view(groups, size), base.view(groups, size), batch["reward"].to(new).view(groups, size)
        )

    def _pairs_of_steps(self, batch: Batch, replay: Replay) -> Terms:
        """prdp, on paths [G, K, S, ...], and lpo, on children [G, K, ...] of states."""
        shape = batch["level"].shape
        rows = {
            n: t.flatten(0, len(shape) - 1) for n, t in batch.items() if isinstance(t, Tensor) and t.ndim >= len(shape)
        }
        base, new = self._said("reference", rows, replay), self._said("policy", rows, replay)
        count = len(rows["level"])
        ratio, before = (torch.zeros(count, device=new.x0.device) for _ in range(2))
        for index, law, old, level, target in steps_of(rows, self.transition, self.schedule, new):
            reference = self.transition(base.pick(index), self.schedule, level, target)
            reached, place = rows["next"][index], index.to(ratio.device)
            ratio = ratio.index_copy(0, place, step_log_ratio(law, reference, reached).float())
            before = before.index_copy(0, place, step_log_ratio(old, reference, reached).float())
        if self.config.form.name == "prdp":
            return path_loss(self.config, ratio.view(shape), before.view(shape), batch["reward"].to(ratio))
        return self._step_pairs(batch, ratio.view(shape))

    def _step_pairs(self, batch: Batch, ratio: Tensor) -> Terms:
        """The gate of lpo depends on the level, which the children of a state share."""
        loss, logs = torch.zeros(len(ratio), device=ratio.device), dict[str, Tensor]()
        levels: Tensor = batch["level"][:, 0]
        for level in levels.unique().tolist():
            index = (levels == level).nonzero().flatten()
            sigma = self.schedule.coefficients(int(level))[1]
            terms = step_pair_loss(self.config, ratio[index], batch["reward"][index].to(ratio), sigma)
            loss = loss.index_copy(0, index.to(loss.device), terms.loss.float())
            for name, part in terms.log.items():
                logs.setdefault(name, torch.zeros_like(loss))[index] = part.float()
        return Terms(loss, logs)

    # --- what models say ---

    @property
    def _holds_reference(self) -> bool:
        trust = self.config.trust
        return trust.reference != "none" or trust.norm_weight > 0 or self.config.form.name == "dgpo"

    @property
    def _compares_old(self) -> bool:
        """Whether the loss compares with the policy that sampled; where that is the policy itself, nothing is evaluated twice."""
        config = self.config
        moved = config.updates_per_epoch > 1 or config.rollout.policy == "old"
        return config.form.name in ("awm", "nft", "crd") and moved

    def _holds(self, rows: Batch, replay: Replay, guided: Replay) -> Holds:
        trust = self.config.trust
        reference = proximal = None
        if self._holds_reference:
            reference = self.direction(self._said("reference", rows, guided))
        if trust.proximal != "none":
            proximal = self.direction(self._said("old" if trust.proximal == "old" else "average", rows, replay))
        return Holds(reference, proximal, rows["held"].to(rows["x"].device) if trust.gate is not None else None)

    def _said(self, role: Role, rows: Batch, replay: Replay) -> Prediction:
        with self.policy.acting(role):
            return replay.denoise(rows["x"], rows["level"], rows["row"])

    def direction(self, prediction: Prediction) -> Tensor:
        """What forms compare: the velocity of flow models, the noise of all others."""
        if self.schedule.is_flow:
            v = prediction.velocity
            return (prediction.eps - prediction.x0 if v is None else v).float()
        return prediction.eps.float()

    def _target(self, rows: Batch) -> Tensor:
        eps: Tensor = rows["eps"].float()
        return eps - rows["x0"].float() if self.schedule.is_flow else eps

    def _cost(self, prediction: Prediction, rows: Batch) -> Tensor:
        c = self.config
        numbers = rows["alpha"].float(), rows["sigma"].float()
        weight: Any = c.weight
        constants = c.time.p or 0.25, c.time.cap or 5.0
        return forward_cost(weight, self.direction(prediction), self._target(rows), *numbers, *constants)


def _flat(batch: Batch) -> dict[str, Tensor]:
    """Rows [G * K, ...] of groups [G, K, ...]."""
    return {name: t.flatten(0, 1) for name, t in batch.items() if isinstance(t, Tensor)}


def _group_numbers(batch: Batch) -> Tensor:
    groups, size = batch["row"].shape
    return torch.arange(groups).repeat_interleave(size)


def _by_group(terms: Terms, batch: Batch) -> Terms:
    """Means [G] over groups of terms [G * K]."""
    shape = batch["row"].shape
    return Terms(terms.loss.view(shape).mean(1), {name: t.view(shape).mean(1) for name, t in terms.log.items()})

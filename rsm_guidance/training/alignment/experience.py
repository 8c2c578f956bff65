"""What a policy's samples teach: recorded steps as rows, and what rows need to be compared with each other.

A row of reverse matching is one step of one trajectory: where it was, the mean of its law under the policy that sampled, where
it led.  A log-ratio needs no more: the noise is read off the latents that were reached.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import Gaussian, GaussianTransition
from rsm_guidance.rollouts import Rollout, Step


@dataclass(frozen=True)
class Experience:
    """Samples with their credits, before they are compared.

    Attributes:
        fields: by name, [R, S, ...] for the S steps of R trajectories, nodes or children, or [R, ...] for finished samples.
        credits: [R, S, M] of M rewards; S is 1 for finished samples.
        prompts: numbers [R] of the prompts.
        seeds: numbers [R] of initial noises or of the state that siblings share, within their prompt.
        levels: [R, S], where the steps start; 0 for finished samples.
        rewards: of the sample, or the mean over what comes of it, [R, M].
        gate: scores [R, G] by the rewards of `trust.gate_rewards`.
        features: what samples are told apart by [R, D]; D is 0 where nothing asks for it.
        anchors: rows [A, ...] without credits, which are only held to the reference.
    """

    fields: dict[str, Tensor]
    credits: Tensor
    prompts: Tensor
    seeds: Tensor
    levels: Tensor
    rewards: Tensor
    gate: Tensor
    features: Tensor
    anchors: dict[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def joined(parts: Sequence["Experience"]) -> "Experience":
        """The samples of several, in order."""
        credits, prompts, seeds, levels, rewards, gate, features = (
            torch.cat(column) for column in zip(*(p.compared for p in parts), strict=True)
        )
        anchors = concatenated([p.anchors for p in parts if p.anchors])
        fields = concatenated([p.fields for p in parts])
        return Experience(fields, credits, prompts, seeds, levels, rewards, gate, features, anchors)

    @property
    def compared(self) -> tuple[Tensor, ...]:
        """What samples of all processes are compared by."""
        return self.credits, self.prompts, self.seeds, self.levels, self.rewards, self.gate, self.features


def concatenated(parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Rows of several, by the names of the first; nothing of none."""
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]} if parts else {}


def noisy_steps(rollout: Rollout, schedule: NoiseSchedule) -> list[Step]:
    """The steps that drew noise; the last one of a chain draws none: it ends at its mean.

    Raises:
        ValueError: if there is none.
    """
    found = [s for s in rollout.stochastic if s.gaussian(schedule).std > 0]
    if not found:
        raise ValueError("no step of this rollout drew noise; roll out by ddim, cps or flow_sde")
    return found


def row_of(step: Step, schedule: NoiseSchedule) -> dict[str, Tensor]:
    """A step's rows: "x", "mean" and "next" [R, ...]; "level", "target" and "row" (of the prompts), int [R]."""
    count = len(step.next)
    return {
        "x": step.x, "mean": step.gaussian(schedule).mean, "next": step.next, "level": torch.full((count,), step.level),
        "target": torch.full((count,), step.target), "row": step.rows,
    }  # fmt: skip


def paths(steps: Sequence[Step], schedule: NoiseSchedule) -> dict[str, Tensor]:
    """The rows [R, S, ...] of R trajectories that did not part."""
    rows = [row_of(step, schedule) for step in steps]
    return {name: torch.stack([r[name] for r in rows], 1) for name in rows[0]}


def steps_of(
    rows: Mapping[str, Tensor], transition: GaussianTransition, schedule: NoiseSchedule, prediction: Prediction
) -> Iterator[tuple[Tensor, Gaussian, Gaussian, int, int]]:
    """For every level among rows [M]: their places, the new and the old law of the next latents, and the levels of the step.

    Args:
        rows: as `row_of` makes them.
        transition: that recorded them.
        schedule: the levels.
        prediction: a new one, of the rows' latents.
    """
    for level in rows["level"].unique().tolist():
        index = (rows["level"] == level).nonzero().flatten()
        target = int(rows["target"][index[0]])
        new = transition(prediction.pick(index), schedule, int(level), target)
        yield index, new, Gaussian(rows["mean"][index], new.std, new.dtype), int(level), target


def finals_of(rollout: Rollout, per_trajectory: Tensor) -> list[Tensor]:
    """What belongs to finished trajectories [R, ...], for the rows of each step: the mean over those that come from it."""
    found = []
    for step, place in zip(rollout.steps, rollout.lineage(), strict=True):
        shape = (len(step.next), *per_trajectory.shape[1:])
        total = torch.zeros(shape, dtype=per_trajectory.dtype).index_add(0, place, per_trajectory)
        count = torch.zeros(shape, dtype=per_trajectory.dtype).index_add(0, place, torch.ones_like(per_trajectory))
        found.append(total / count)
    return found

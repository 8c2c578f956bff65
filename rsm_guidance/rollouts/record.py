"""What a run leaves behind: every step with its latents, prediction, noise and next latents.

Samplers show these steps, search methods branch from them, and trainers take log-probabilities of them.  The means of
transitions are computed in float32 from the recorded prediction, so that the log-ratio of a step under the policy that made
it is exactly 0.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from rsm_guidance.core.random import Name
from rsm_guidance.core.schedule import NoiseSchedule, Prediction
from rsm_guidance.core.transitions import Gaussian, GaussianTransition, Transition, exact

Label = tuple[Name, ...]
"""Names the random numbers of a latent beside its row: its candidate, and where it branched off."""


@dataclass(frozen=True)
class Step:
    """One step of R trajectories.

    Attributes:
        level: where it starts.
        target: where it ends.
        x: latents [R, ...] at `level`, as the denoiser saw them.
        prediction: the denoiser's, or None where the pipeline's own solver does not tell.
        noise: standard normal [R, ...], or None where none was drawn.
        next: latents [R, ...] at `target`, as the denoiser will see them.
        rows: prompt of each trajectory [R].
        transition: how it stepped.
        parents: place of each trajectory [R] among those of the step before.
    """

    level: int
    target: int
    x: Tensor
    prediction: Prediction | None
    noise: Tensor | None
    next: Tensor
    rows: Tensor
    transition: Transition
    parents: Tensor

    @property
    def estimate(self) -> Tensor:
        """Estimate of the clean latents [R, ...]."""
        return self.next if self.prediction is None else self.prediction.x0

    def gaussian(self, schedule: NoiseSchedule, prediction: Prediction | None = None) -> Gaussian:
        """The law of the next latents, under the recorded prediction or another one of the same latents.

        Raises:
            ValueError: if the step was not drawn from a Gaussian.
        """
        prediction = prediction or self.prediction
        if not isinstance(self.transition, GaussianTransition) or prediction is None:
            raise ValueError(f"a step by {self.transition.name!r} has no Gaussian; record ddim, cps or flow_sde")
        return self.transition(prediction, schedule, self.level, self.target)

    def log_prob(self, schedule: NoiseSchedule, prediction: Prediction | None = None) -> Tensor:
        """Log-density [R] of the next latents; see `gaussian`."""
        return self.gaussian(schedule, prediction).log_prob(exact(self.next))

    def log_ratio(self, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
        """log p_new - log p_old [R] of the next latents, for a new prediction of the same latents.

        It is taken from the difference of the means, so that it is exactly 0 where the predictions are equal, and keeps its
        digits where they nearly are.
        """
        old, new = self.gaussian(schedule), self.gaussian(schedule, prediction)
        if old.std == 0:
            raise ValueError(f"the step at level {self.level} is deterministic; only stochastic steps have a ratio")
        shift = (new.mean - old.mean) / old.std
        z = (exact(self.next) - old.mean) / old.std
        return (shift * (z - shift / 2)).flatten(1).sum(1)


@dataclass
class Rollout:
    """Finished trajectories.

    Attributes:
        steps: in order; trajectories of a later step may branch off those of an earlier one (`Step.parents`).
        latents: clean latents [R, ...].
        rows: prompt of each [R].
        labels: names of their random numbers, by which a step can be drawn again.
    """

    steps: list[Step] = field(default_factory=list)
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    rows: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    labels: list[Label] = field(default_factory=list)

    def lineage(self) -> list[Tensor]:
        """For every step, the place [R] of each finished trajectory among those of the step."""
        place = torch.arange(len(self.rows))
        places = []
        for step in reversed(self.steps):
            places.append(place)
            place = step.parents[place]
        return places[::-1]

    @property
    def stochastic(self) -> list[Step]:
        """The steps whose next latents were drawn, to which log-probabilities belong."""
        return [step for step in self.steps if step.noise is not None]

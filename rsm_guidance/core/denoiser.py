"""The contract between samplers and models: a denoiser over the levels of a schedule, and judges of its states."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rsm_guidance.core.schedule import NoiseSchedule, Prediction


@runtime_checkable
class Denoiser(Protocol):
    """A diffusion or flow model, conditioned on one prompt per row.

    `rows` [R] names, for each latent of a batch, the row (image asked for, 0..len(prompts)-1) it belongs to; None means
    one latent for each row, in order.
    """

    prompts: list[str]
    checkpointing: bool
    """Recompute activations on the way back instead of keeping them, where the model can."""

    @property
    def schedule(self) -> NoiseSchedule:
        """The levels of this run."""
        ...

    @property
    def evaluations_per_row(self) -> float:
        """Denoiser evaluations that one `predict` costs per latent (2 with classifier-free guidance)."""
        ...

    @property
    def steps(self) -> int:
        """Number of levels N that a run visits."""
        ...

    def initial(self, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """The latents [B, ...] at level 0 with which an unguided run starts, or others drawn with generators [B]."""
        ...

    def follow(
        self,
        rows: Tensor | None = None,
        generators: Sequence[torch.Generator] | None = None,
        start: Tensor | None = None,
    ) -> Iterator[tuple[Prediction | None, Tensor]]:
        """An unguided run with the model's own solver, from its own start or, with generators [R], from others.

        With latents `start` [R, ...] at level 0 the run starts there; what the solver draws on its way is then that of
        its own run, or comes from the generators.

        Yields N times the prediction (None where the solver does not tell) and the next latents [R, ...].
        """
        ...

    def predict(self, x: Tensor, level: int, rows: Tensor | None = None) -> Prediction:
        """Denoise x [R, ...] at a level in 0..N-1.  Keeps the caller's gradient mode."""
        ...

    def decode(self, x0: Tensor, rows: Tensor | None = None) -> Tensor:
        """Clean latents [R, ...] to images [R, 3, H, W] in [0, 1], differentiable."""
        ...


class Value(Protocol):
    """V(x_t, t, prompt): the promise of noisy latents, comparable within one level and prompt."""

    @property
    def evaluations_per_row(self) -> float:
        """Cost of judging one latent, as a share of one denoiser evaluation."""
        ...

    @property
    def reads_prediction(self) -> bool:
        """Whether the value is a function of the denoiser's prediction, and not of the noisy latents alone."""
        ...

    @property
    def reward_calls_per_row(self) -> int:
        """Images that judging one latent decodes and shows to a reward (0 for a model of the latents themselves)."""
        ...

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        """Scores [R], higher is better, for latents x [R, ...] at a level in 0..N (N is clean)."""
        ...


Reward = Callable[[Tensor, list[str]], Tensor]
"""r(image, prompt): images [B, 3, H, W] in [0, 1] and B prompts to scores [B], higher is better."""

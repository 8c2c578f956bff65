"""The contracts between samplers and models: denoisers, values of noisy latents, rewards of finished images."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rsm_guidance.core.errors import StopRequested, UsageError
from rsm_guidance.core.random import RandomStreams
from rsm_guidance.core.schedule import NoiseSchedule, Prediction

__all__ = ["Denoiser", "Reward", "StopRequested", "UsageError", "Value", "ValueSource"]


class Denoiser(Protocol):
    """A diffusion or flow model, conditioned on one prompt per row.

    `rows` [R] names, for each latent of a batch, the row (image asked for, 0..len(prompts)-1) it belongs to; None means
    one latent for each row, in order.
    """

    prompts: list[str]
    checkpointing: bool
    """Recompute activations on the way back instead of keeping them, where the model can."""

    @property
    def evaluations(self) -> float:
        """Forward passes of the denoiser so far, by latents (NFE)."""
        ...

    @property
    def schedule(self) -> NoiseSchedule:
        """The levels of this run."""
        ...

    @property
    def evaluations_per_row(self) -> float:
        """Denoiser evaluations that one `predict` takes per latent (2 with classifier-free guidance)."""
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


class Reward(Protocol):
    """r(image, prompt).  A plain function (images, prompts) -> scores is one, too; see `rewards.as_reward`.

    Attributes:
        name: in messages and reports.
        differentiable: whether scores carry a gradient to the images; None where only a call can tell.
        requires: names of the columns it needs besides the prompt, such as the text that an image should show.
        share: cost of scoring an image in denoiser evaluations; 0 for all but diffusion reward models.

    One that cannot do without the prompt's text says so by `reads_prompt = True`.
    """

    @property
    def name(self) -> str: ...

    @property
    def differentiable(self) -> bool | None: ...

    @property
    def requires(self) -> tuple[str, ...]: ...

    @property
    def share(self) -> float: ...

    def __call__(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        """Scores [B], higher is better, of images [B, 3, H, W] in [0, 1] under B prompts; columns have B entries each."""
        ...


class Value(Protocol):
    """V(x_t, t, prompt): the expected reward of noisy latents, comparable within one level and prompt."""

    @property
    def share(self) -> float:
        """Cost of its own model per latent, in denoiser evaluations; 0 for a value made of the denoiser and a reward."""
        ...

    @property
    def evaluations_per_row(self) -> float:
        """Denoiser evaluations of scoring one latent, of the denoiser's prediction and its own model together."""
        ...

    @property
    def reads_prediction(self) -> bool:
        """Whether the value is a function of the denoiser's prediction, and not of the noisy latents alone."""
        ...

    @property
    def reward_calls_per_row(self) -> int:
        """Images that scoring one latent decodes and shows to a reward (0 for a model of the latents themselves)."""
        ...

    def __call__(self, x: Tensor, level: int, rows: Tensor, prediction: Prediction | None = None) -> Tensor:
        """Scores [R], higher is better, for latents x [R, ...] at a level in 0..N (N is clean)."""
        ...


class ValueSource(Protocol):
    """What makes a value for a run: an estimator (`values.Tweedie`) or a diffusion reward model."""

    def value(self, denoiser: Any, reward: Any, streams: RandomStreams) -> Value:
        """The value of latents of `denoiser`; estimators score what they estimate by `reward`, a `rewards.RowReward`."""
        ...

"""What the built-in rewards have in common: checked arguments, videos, micro-batches, device and precision."""

import functools
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from rsm_guidance.core.errors import UsageError

Dtype = Literal["float32", "float16", "bfloat16"]


@dataclass(frozen=True)
class BuiltInReward:
    """A `core.contracts.Reward` whose options are its fields; subclasses define `scores`.

    Videos [B, F, 3, H, W] have the mean score of their frames.  An image that holds NaN has the score NaN.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    """One line for the list of rewards."""
    needs: ClassVar[str] = "nothing"
    """What must be there besides this package: a download, an extra, a server."""
    range: ClassVar[tuple[float, float]]
    """Bounds of its scores; infinite where there are none."""
    differentiable: ClassVar[bool] = False
    share: ClassVar[float] = 0.0
    reads_prompt: ClassVar[bool] = False

    @property
    def identity(self) -> str:
        """Name and options, by which an interrupted comparison knows that it goes on with the same reward."""
        return f"{self.name} {self!r}"

    @property
    def requires(self) -> tuple[str, ...]:
        """Names of the columns it needs."""
        return ()

    def load(self) -> Self:
        """Load what it needs, now instead of at the first call."""
        return self

    def check(self, prompts: list[str], columns: dict[str, list[Any]]) -> None:
        """Raise a UsageError for prompts or columns that cannot be scored; loads nothing."""

    def __call__(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        """Scores [B], higher is better, of images [B, 3, H, W] or videos [B, F, 3, H, W] in [0, 1].

        They carry a graph only where the images require a gradient and the reward is differentiable.

        Raises:
            TypeError: if images are no tensor or prompts no list of texts.
            UsageError: if their numbers differ, or the images have another form.
        """
        check_arguments(self.name, images, prompts, columns)
        own = {name: columns[name] for name in self.requires}
        self.check(prompts, own)
        if not len(images):
            return images.new_zeros(0, dtype=torch.float32)
        count = images.shape[1] if images.ndim == 5 else 1
        frames = images.float().reshape(-1, *images.shape[-3:])
        whole = frames.isfinite().flatten(1).all(1)
        frames = torch.where(whole[:, None, None, None], frames, 0.0)
        scores = self.scores(frames, _repeated(prompts, count), **{k: _repeated(v, count) for k, v in own.items()})
        scores = torch.where(whole, scores.to(images.device), torch.nan)
        return scores.reshape(-1, count).mean(1)

    def scores(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        """Scores [B] of float32 images [B, 3, H, W] in [0, 1]; arguments are checked."""
        raise NotImplementedError


@dataclass(frozen=True)
class ModelReward(BuiltInReward):
    """A built-in reward with a model in torch; subclasses define `network` and `batch`.

    Attributes:
        device: where the model lives; None for the device of the images, which it then shares with the generator.
        dtype: precision of the model; images are prepared, and scores returned, in float32.
        micro_batch: images scored at once.
        offload: keep the model in main memory between calls; for a device that a large generator fills.
    """

    device: str | None = None
    dtype: Dtype = "float32"
    micro_batch: int = 16
    offload: bool = False

    def __post_init__(self) -> None:
        if self.micro_batch < 1:
            raise UsageError(f"{self.name}: micro_batch must be at least 1; got {self.micro_batch}")
        try:
            torch.device(self.device or "cpu")
        except RuntimeError as error:
            raise UsageError(f"{self.name}: {self.device!r} is no device of torch, such as cpu or cuda:1") from error

    @functools.cached_property
    def network(self) -> nn.Module:
        """The model, frozen."""
        raise NotImplementedError

    def batch(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Scores [B] of a micro-batch on the device of the model."""
        raise NotImplementedError

    @property
    def precision(self) -> torch.dtype:
        """`dtype` as torch has it."""
        found: torch.dtype = getattr(torch, self.dtype)
        return found

    def load(self) -> Self:
        """Load the model; to its device, if that is given."""
        network = self.network
        if self.device is not None and not self.offload:
            network.to(self.device)
        return self

    def scores(self, images: Tensor, prompts: list[str], **columns: list[Any]) -> Tensor:
        device = torch.device(self.device) if self.device else images.device
        self.network.to(device)
        pieces = [slice(i, i + self.micro_batch) for i in range(0, len(images), self.micro_batch)]
        scores = torch.cat([self.batch(images[piece].to(device), prompts[piece]).float() for piece in pieces])
        if self.offload and not scores.requires_grad:  # a gradient still needs the weights where they are
            self.network.to("cpu")
        return scores


def check_arguments(name: str, images: Any, prompts: Any, columns: dict[str, list[Any]]) -> None:
    """Raise for arguments that are no images [B, 3, H, W] or [B, F, 3, H, W], B prompts and columns with B entries.

    Raises:
        TypeError: if images are no tensor or prompts no list of texts.
        UsageError: otherwise.
    """
    if (
        not isinstance(images, Tensor)
        or isinstance(prompts, str | Tensor)
        or not all(isinstance(p, str) for p in prompts)
    ):
        raise TypeError(
            f"{name} takes (images, prompts): a tensor [B, 3, H, W] and a list of B texts; "
            f"got {type(images).__name__} and {type(prompts).__name__}"
        )
    if images.ndim not in (4, 5) or images.shape[-3] != 3 or not images.is_floating_point() or 0 in images.shape[1:]:
        raise UsageError(
            f"{name} scores images [B, 3, H, W] or videos [B, F, 3, H, W], float in [0, 1]; "
            f"got {images.dtype} {list(images.shape)}"
        )
    if len(images) != len(prompts):
        raise UsageError(f"{name} got {len(images)} images and {len(prompts)} prompts; give one prompt for each image")
    for column, values in columns.items():
        if len(values) != len(images):
            raise UsageError(f"the column {column!r} has {len(values)} entries for {len(images)} images; give one each")
    with torch.no_grad():
        low, high = (
            (torch.nan_to_num(v, posinf=0.5, neginf=0.5, nan=0.5) for v in images.aminmax()) if len(images) else (0, 1)
        )
    if not (low >= -0.01 and high <= 1.01):
        raise UsageError(f"{name} scores images in [0, 1]; these have values from {float(low):g} to {float(high):g}")


def warn_cut(name: str, limit: int) -> None:
    """Say once that a prompt is longer than a text encoder reads."""
    warnings.warn(
        f"{name} reads the first {limit} tokens of a prompt; at least one prompt is longer, and its rest does not count",
        stacklevel=2,
    )


def _repeated(values: list[Any], count: int) -> list[Any]:
    return [value for value in values for _ in range(count)]

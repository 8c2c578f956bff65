"""What a pipeline's decoded output is, found by decoding one latent as tensors and as arrays.

diffusers promises tensors in [0, 1] for output_type="pt", and arrays in [0, 1] with the channels last for "np".  The arrays are as
promised everywhere; some pipelines give raw tensors in [-1, 1], other axes, or none at all.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rsm_guidance.core.contracts import UsageError

Output = Callable[[str], Any]
"""The stock output for an output type."""

_FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "tensors": lambda t: t,
    "raw": lambda t: (t / 2 + 0.5).clamp(0, 1),
    "channels before frames": lambda t: t.transpose(1, 2),
    "raw, channels before frames": lambda t: (t / 2 + 0.5).clamp(0, 1).transpose(1, 2),
}
_ARRAYS = "arrays"


def decoding_of(output: Output) -> str:
    """How the output for one latent is made to images: the name of a form, or what it is instead of images.

    Args:
        output: the stock output, a sequence whose first entry holds the images, for "pt" and "np".
    """
    errors: list[Exception] = []
    arrays, tensors = _arrays(_try(output, "np", errors)), _tensors(_try(output, "pt", errors))
    if len(errors) == 2:
        raise errors[0]
    if arrays is None:
        return _ARRAYS if tensors is None else "tensors"
    if tensors is not None:
        for name, form in _FORMS.items():
            made = form(tensors) if tensors.ndim > 4 or "frames" not in name else None
            if (
                made is not None
                and made.shape == arrays.shape
                and torch.allclose(made.float().cpu(), arrays, atol=2e-2)
            ):
                return name
    return _ARRAYS


def images_of(
    outputs: Callable[[str], tuple[Sequence[Any], list[int] | None]], decoding: str | None, graph: bool, pipe: Any
) -> Tensor:
    """Images [R, 3, H, W] in [0, 1], or videos [R, F, 3, H, W], or sounds [R, C, T], from stock outputs.

    Args:
        outputs: for an output type, the outputs of some calls, and where in them the wanted rows are.
        decoding: what `decoding_of` found.
        graph: whether a gradient is wanted.
        pipe: named where this fails.

    Raises:
        UsageError: if there are none.
    """
    form = _FORMS.get(decoding or "tensors")
    if form is None and graph:
        raise UsageError(f"{type(pipe).__name__} decodes to arrays and not to tensors, so that no gradient can pass; use a sampler "
                         "without one")  # fmt: skip
    found, order = outputs("np" if form is None else "pt")
    read = [_arrays(f) if form is None else _tensors(f) for f in found]
    parts = [r for r in read if r is not None]
    if len(parts) < len(read) or any(p.ndim < 3 for p in parts):
        given = f"a tensor of shape {list(parts[0].shape)}" if parts else type(found[0][0]).__name__
        raise UsageError(
            f"the output of {type(pipe).__name__} is no image, video or sound that a reward could see, but {given}"
        )
    images = torch.cat([form(p) if form is not None else p for p in parts])
    return images if order is None else images[order]


def _try(output: Output, kind: str, errors: list[Exception]) -> Any:
    try:
        return output(kind)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a pipeline says to an output type that it does not know
        errors.append(error)
        return None


def _tensors(output: Any) -> Tensor | None:
    """The first entry of a stock output as one tensor; None if it is none."""
    first = None if output is None else output[0]
    if isinstance(first, list) and first and all(isinstance(f, Tensor) for f in first):
        first = torch.stack(first)
    return first if isinstance(first, Tensor) else None


def _arrays(output: Any) -> Tensor | None:
    """The first entry of a stock output, arrays with the channels last, as tensors with the channels before the axes of space."""
    first = None if output is None else output[0]
    if isinstance(first, list) and first and all(isinstance(f, np.ndarray) for f in first):
        first = np.stack(first)
    if not isinstance(first, np.ndarray):
        return None
    array = torch.from_numpy(np.ascontiguousarray(first)).float()
    return array.movedim(-1, -3) if array.ndim > 3 else array

"""The head of the LAION aesthetic predictor and of ImageReward: linear layers with dropout between, so one affine map."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rsm_guidance.core.errors import UsageError
from rsm_guidance.rewards.checkpoints import load_strictly

_PLACES = (0, 2, 4, 6, 7)  # of the linear layers; dropouts stand between


class LinearHead(nn.Module):
    """Features [B, D] to scores [B], by `layers.{0,2,4,6,7}` as both checkpoints name them."""

    def __init__(self, widths: list[int]) -> None:
        super().__init__()
        linear = [nn.Linear(a, b) for a, b in zip(widths, widths[1:], strict=False)]
        self.layers = nn.ModuleDict({str(p): layer for p, layer in zip(_PLACES, linear, strict=True)})

    def forward(self, features: Tensor) -> Tensor:
        for layer in self.layers.values():
            features = layer(features)
        return features.squeeze(-1)


def linear_head(tensors: Mapping[str, Tensor], source: object) -> LinearHead:
    """The head with these weights, whose widths (published: 768, 1024, 128, 64, 16, 1) are read off the shapes.

    Raises:
        UsageError: naming tensors that are missing, unknown or of the wrong shape.
    """
    try:
        weights = [tensors[f"layers.{place}.weight"] for place in _PLACES]
    except KeyError as error:
        raise UsageError(f"the checkpoint {source} is no head of linear layers: it lacks {error}") from error
    with torch.device("meta"):
        head = LinearHead([weights[0].shape[1], *(w.shape[0] for w in weights)])
    head = head.to_empty(device="cpu")
    load_strictly(head, tensors, source)
    return head

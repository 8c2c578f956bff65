"""Auxiliary supervision of token grids: each token says which object it belongs to.

The renderer knows it for training scenes, the verifier's parser for generated images.  Base and reward model both learn
it beside their own objective, at every noise level, where it stands for what the finished image will hold; the head is
thrown away.  This auxiliary objective is ours.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rsm_guidance.shapes.render import IMAGE_SIZE, Placed
from rsm_guidance.shapes.scenes import COLORS, SHAPES
from rsm_guidance.shapes.verify import Seen

GRID = 8
_PARTS = (1 + len(COLORS), 1 + len(SHAPES), 2)  # colour, shape, offset


def token_labels(objects: Sequence[Placed | Seen]) -> np.ndarray:
    """Labels [64, 4] of an 8x8 token grid: colour index, shape index, offset (x, y) in pixels to the centre / 32.

    All are 0 on the background; the shape is 0 too where an object's shape cannot be told.
    """
    if not objects:
        return np.zeros((GRID * GRID, 4), np.float32)
    places = np.array([(o.x, o.y, o.radius) for o in objects])
    kinds = np.array([(1 + list(COLORS).index(o.color), 1 + SHAPES.index(o.shape) if o.shape else 0) for o in objects])
    ticks = (np.arange(GRID) + 0.5) * (IMAGE_SIZE / GRID)
    centres = np.stack(np.meshgrid(ticks, ticks), -1).reshape(-1, 1, 2)
    distance = np.linalg.norm(places[:, :2] - centres, axis=-1) - places[:, 2]  # [64, objects], to the rim
    nearest = distance.argmin(-1)
    labels = np.concatenate([kinds[nearest], (places[nearest, :2] - centres[:, 0]) / 32], -1)
    return np.where(distance.min(-1, keepdims=True) < 5, labels, 0).astype(np.float32)


class ObjectHead(nn.Linear):
    """Tokens [..., 64, dim] to colour logits, shape logits and offsets."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, sum(_PARTS))

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Mean over tokens of both cross-entropies and, inside objects, 4 times the squared error of the offset."""
        color, shape, offset = self(tokens).flatten(0, -2).split(_PARTS, -1)
        labels = labels.flatten(0, -2).float()
        kinds = labels[:, :2].long()
        inside = (kinds[:, 0] > 0).float()
        classes = F.cross_entropy(color, kinds[:, 0]) + F.cross_entropy(shape, kinds[:, 1])
        squared: Tensor = inside * (offset - labels[:, 2:]).square().sum(-1)
        return classes + 4 * torch.mean(squared)

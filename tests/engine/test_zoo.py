"""The pipelines that measurements at real sizes are made on have these sizes."""

import pytest
import torch
from torch import nn

from tests.zoo import grown


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (grown.sd35_transformer, 2_243_171_520),
        (grown.sdxl_unet, 2_567_463_684),
        (grown.flux_transformer, 11_901_408_320),
    ],
)
def test_grown_denoisers_have_the_published_number_of_parameters(make: type[nn.Module], parameters: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in make().parameters()) == parameters

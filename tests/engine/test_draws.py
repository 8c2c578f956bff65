"""What a restarted call draws: for every row what its own generator drew in the first call."""

from contextlib import closing

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler

from rsm_guidance.engine import PipelineDenoiser
from tests.zoo import ZOO


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd15", "sd15_inpaint"])
def test_each_row_draws_again_from_its_own_generator(name: str) -> None:
    """A stochastic scheduler's noise (and the masked picture's), of rows in any order and number, though generators have gone on."""
    generators = [torch.Generator().manual_seed(s) for s in (3, 8, 5)]
    pipe = ZOO[name].build()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    call = ZOO[name].call() | {"prompt": ["a cat"] * 3, "generator": generators}
    with closing(PipelineDenoiser(pipe, call)) as denoiser:
        start = denoiser.initial().clone()
        *_, (_, end) = denoiser.follow()
        generators[1].manual_seed(77)
        for rows in ([0, 1, 2], [1], [2, 0], [2, 1, 0]):
            *_, (_, again) = denoiser.follow(torch.tensor(rows), start=start[rows])
            assert torch.allclose(again, end[rows], atol=1e-3), rows
        *_, (_, alike) = denoiser.follow(torch.tensor([0, 1, 2]), start=start[:1].repeat(3, 1, 1, 1))
        assert all(not torch.allclose(alike[i], alike[j], atol=0.1) for i, j in ((0, 1), (0, 2), (1, 2)))

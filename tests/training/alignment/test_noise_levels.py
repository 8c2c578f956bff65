"""Noise levels by level and depth, and windows that move."""

import pytest
import torch

from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.core.transitions import FlowSDE
from rsm_guidance.training.alignment.levels import geometry
from rsm_guidance.training.alignment.noise_levels import calibrated, depth_level, flow_sde_level
from rsm_guidance.training.alignment.read import read_align


def test_calibration_follows_the_balance_of_signs() -> None:
    assert calibrated(0.5, torch.tensor([1.0, -1.0, 2.0])) == pytest.approx(0.51)  # counts differ by 1
    assert calibrated(0.5, torch.tensor([1.0, 1.0, 2.0, 0.0])) == pytest.approx(0.49)
    assert calibrated(0.01, torch.tensor([1.0, 1.0])) == 0.01


@pytest.mark.parametrize("level", [0, 3, 8])
def test_a_level_of_the_flow_sde_has_the_diffusion_it_was_asked_for(level: int) -> None:
    schedule = NoiseSchedule.flow(10)
    step = geometry(FlowSDE(flow_sde_level(0.4, schedule, level)), schedule, level, level + 1)
    assert step.diffusion == pytest.approx(0.4)


def test_noise_grows_with_depth() -> None:
    assert [depth_level(0.5, 0.6, d, 4) for d in range(4)] == pytest.approx([0.5, 0.6, 0.7, 0.8])


def test_windows_move_on_and_wrap_round() -> None:
    rollout = read_align(name="mix-grpo").rollout  # 25 steps, 4 levels, on every 25 updates
    assert [rollout.window_at(u) for u in (0, 24, 25, 21 * 25, 22 * 25)] == [(0, 4), (0, 4), (1, 5), (21, 25), (0, 4)]
    assert read_align(name="tp-grpo").rollout.window_at(99) == (0, 9)
    assert read_align(name="flow-grpo").rollout.window_at(99) is None

"""DenseGRPO's noise levels (2601.20218): before training, the noise of each level is moved until gains of both signs balance."""

import torch

from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.training.alignment.collector import Collector
from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.noise_levels import calibrated, flow_sde_diffusion, flow_sde_level
from rsm_guidance.training.alignment.rows import Gather, alone


def calibrated_levels(
    config: AlignConfig, collector: Collector, schedule: NoiseSchedule, gather: Gather = alone
) -> dict[int, float]:
    """The noise level a of the flow SDE for every level, from `rollout.calibrate` rounds of samples before the first epoch."""
    levels = dict.fromkeys(range(schedule.steps - 1), config.rollout.noise_level)
    for turn in range(config.rollout.calibrate):
        own, _ = collector.at(levels)(-1 - turn)
        told = gather((own.credits.sum(2), own.levels))
        gains, where = (torch.cat(column) for column in zip(*told, strict=True))
        for level in levels:
            diffusion = calibrated(flow_sde_diffusion(levels[level], schedule, level), gains[where == level])
            levels[level] = flow_sde_level(diffusion, schedule, level)
    return levels

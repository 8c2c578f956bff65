"""Stock diffusers pipelines, paused at `scheduler.step` and offered as denoisers."""

from rsm_guidance.engine.denoiser import PipelineDenoiser
from rsm_guidance.engine.encode import encode_images
from rsm_guidance.engine.families import require_drivable

__all__ = ["PipelineDenoiser", "encode_images", "require_drivable"]

"""Stock diffusers pipelines, paused at `scheduler.step` and offered as denoisers."""

from rsm_guidance.engine.denoiser import PipelineDenoiser, encode_images, require_drivable

__all__ = ["PipelineDenoiser", "encode_images", "require_drivable"]

# A shim for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`; the class lives in the installed package.
from rsm_guidance.pipelines import RewardGuidedZImagePipeline as RewardGuidedPipeline  # noqa: F401

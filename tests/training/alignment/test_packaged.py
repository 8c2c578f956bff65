"""The LoRA of the embedded model: an ordinary file that draws more captions right."""

import numpy as np
from diffusers import DiffusionPipeline

from rsm_guidance import shapes
from rsm_guidance.core.random import generator_of


def test_the_packaged_lora_draws_more_captions_right_in_the_stock_pipeline() -> None:
    captions = [caption.text for caption in shapes.caption_set(48, seed=5)]
    pipe = DiffusionPipeline.from_pretrained(shapes.model_path())
    pipe.set_progress_bar_config(disable=True)

    def right() -> int:
        drawn = [generator_of("test", caption) for caption in captions]
        images = pipe(prompt=captions, num_inference_steps=10, guidance_scale=1.0, generator=drawn).images
        return sum(
            shapes.verify(np.asarray(i.convert("RGB")), c).correct for i, c in zip(images, captions, strict=True)
        )

    before = right()
    pipe.load_lora_weights(shapes.lora_path())
    after = right()
    assert after >= before + 4, (before, after)

"""The documented pipeline families: class, an example checkpoint, and the model card of each shim.

`python -m rsm_guidance.pipelines.catalog` in a checkout writes the shims and cards under pipelines/ and the table in
docs/families.md; a test compares them with what lies there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Family:
    """One documented family.

    Attributes:
        title: what people call it.
        pipeline: name of the stock diffusers class.
        checkpoint: a model of it on the hub.
        inputs: example arguments besides the prompt, as code.
        parts: further arguments of `from_pretrained`, as code.
    """

    title: str
    pipeline: str
    checkpoint: str
    inputs: str = ""
    parts: str = ""

    @property
    def cls(self) -> type[DiffusionPipeline]:
        """The stock class."""
        import diffusers  # takes its time, which the list of families need not

        found: type[DiffusionPipeline] = getattr(diffusers, self.pipeline)
        return found


_IMAGE = "image=image, strength=0.8"
_MASKED = "image=image, mask_image=mask"

FAMILIES: dict[str, Family] = {
    "stable_diffusion": Family(
        "Stable Diffusion 1.5 and 2.x", "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5"
    ),
    "stable_diffusion_img2img": Family(
        "Stable Diffusion image to image",
        "StableDiffusionImg2ImgPipeline",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        _IMAGE,
    ),
    "stable_diffusion_inpaint": Family(
        "Stable Diffusion inpainting",
        "StableDiffusionInpaintPipeline",
        "stable-diffusion-v1-5/stable-diffusion-inpainting",
        _MASKED,
    ),
    "stable_diffusion_controlnet": Family(
        "Stable Diffusion with ControlNet",
        "StableDiffusionControlNetPipeline",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "image=edges",
        "controlnet=controlnet",
    ),
    "stable_diffusion_xl": Family(
        "Stable Diffusion XL", "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0"
    ),
    "stable_diffusion_xl_img2img": Family(
        "Stable Diffusion XL image to image and refiner",
        "StableDiffusionXLImg2ImgPipeline",
        "stabilityai/stable-diffusion-xl-refiner-1.0",
        _IMAGE,
    ),
    "stable_diffusion_xl_inpaint": Family(
        "Stable Diffusion XL inpainting",
        "StableDiffusionXLInpaintPipeline",
        "diffusers/stable-diffusion-xl-1.0-inpainting-0.1",
        _MASKED,
    ),
    "stable_diffusion_3": Family(
        "Stable Diffusion 3 and 3.5", "StableDiffusion3Pipeline", "stabilityai/stable-diffusion-3.5-medium"
    ),
    "stable_diffusion_3_img2img": Family(
        "Stable Diffusion 3 image to image",
        "StableDiffusion3Img2ImgPipeline",
        "stabilityai/stable-diffusion-3.5-medium",
        _IMAGE,
    ),
    "stable_diffusion_3_inpaint": Family(
        "Stable Diffusion 3 inpainting",
        "StableDiffusion3InpaintPipeline",
        "stabilityai/stable-diffusion-3.5-medium",
        _MASKED,
    ),
    "flux": Family("FLUX.1 dev and schnell", "FluxPipeline", "black-forest-labs/FLUX.1-dev"),
    "flux_kontext": Family(
        "FLUX.1 Kontext", "FluxKontextPipeline", "black-forest-labs/FLUX.1-Kontext-dev", "image=image"
    ),
    "flux_fill": Family("FLUX.1 Fill", "FluxFillPipeline", "black-forest-labs/FLUX.1-Fill-dev", _MASKED),
    "flux2_klein": Family("FLUX.2 klein", "Flux2KleinPipeline", "black-forest-labs/FLUX.2-klein-4B"),
    "pixart_alpha": Family("PixArt-α", "PixArtAlphaPipeline", "PixArt-alpha/PixArt-XL-2-1024-MS"),
    "pixart_sigma": Family("PixArt-Σ", "PixArtSigmaPipeline", "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS"),
    "sana": Family("Sana", "SanaPipeline", "Efficient-Large-Model/Sana_1600M_1024px_diffusers"),
    "qwen_image": Family("Qwen-Image", "QwenImagePipeline", "Qwen/Qwen-Image"),
    "qwen_image_edit": Family("Qwen-Image-Edit", "QwenImageEditPipeline", "Qwen/Qwen-Image-Edit", "image=image"),
    "z_image": Family("Z-Image", "ZImagePipeline", "Tongyi-MAI/Z-Image-Turbo"),
    "lumina2": Family("Lumina 2", "Lumina2Pipeline", "Alpha-VLLM/Lumina-Image-2.0"),
    "chroma": Family("Chroma", "ChromaPipeline", "lodestones/Chroma1-HD"),
    "hidream": Family("HiDream", "HiDreamImagePipeline", "HiDream-ai/HiDream-I1-Full"),
    "wan": Family("Wan 2.x text to video", "WanPipeline", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
}

_SHIM = """\
# A shim for `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)`; the class lives in the installed package.
from rsm_guidance.pipelines import RewardGuided{pipeline} as RewardGuidedPipeline  # noqa: F401
"""

_CARD = """\
---
library_name: diffusers
license: apache-2.0
tags:
  - diffusers
  - custom-pipeline
  - reward-guidance
---

# Reward-guided {title}

A custom pipeline that samples under a reward, judged at every denoising step. It is the stock `{pipeline}` as long as
no `sampler` is given, and takes all of its arguments.

    pip install -c constraints.txt -e .

```python
from diffusers import DiffusionPipeline
from rsm_guidance import StepwiseSampling, custom_pipeline

pipe = DiffusionPipeline.from_pretrained(
    "{checkpoint}",
    custom_pipeline=custom_pipeline("{name}"),
    trust_remote_code=True,
{parts})
out = pipe(
{arguments}    seed=0,
    sampler=StepwiseSampling(candidates=4),
    reward=my_reward,
)
```

`my_reward` is a diffusion reward model trained on this family, or a function `({data}, prompts) ->
scores [B]`, which is then applied to the decoded estimate of the clean sample at every step.
"""


def shim(name: str) -> str:
    """Source of a family's pipeline.py."""
    return _SHIM.format(pipeline=FAMILIES[name].pipeline)


def card(name: str) -> str:
    """A family's model card."""
    f = FAMILIES[name]
    arguments = "".join(f"    {a},\n" for a in ('prompt="a photo of a cat"', *f.inputs.split(", ")) if a)
    data = "videos [B, F, 3, H, W] in [0, 1]" if name == "wan" else "images [B, 3, H, W] in [0, 1]"
    return _CARD.format(
        parts=f"    {f.parts},\n" if f.parts else "",
        name=name,
        title=f.title,
        pipeline=f.pipeline,
        checkpoint=f.checkpoint,
        arguments=arguments,
        data=data,
    )


def table() -> str:
    """The families as a Markdown table."""
    lines = ["| `custom_pipeline(...)` | family | class |", "|---|---|---|"]
    lines += [f"| `{name}` | {f.title} | `RewardGuided{f.pipeline}` |" for name, f in FAMILIES.items()]
    return "\n".join(lines)


BEGIN, END = "<!-- families -->\n", "\n<!-- /families -->"


def write(root: Path) -> None:
    """Write shims, cards and the table of docs/families.md into a checkout."""
    for name in FAMILIES:
        folder = root / "pipelines" / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pipeline.py").write_text(shim(name))
        (folder / "README.md").write_text(card(name))
    page = root / "docs" / "families.md"
    head, rest = page.read_text().split(BEGIN)
    page.write_text(head + BEGIN + table() + END + rest.split(END)[1])


if __name__ == "__main__":
    write(Path.cwd())

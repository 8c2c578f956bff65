"""What the restated tests share: names of the zoo, the three calls that must agree, comparisons."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import rsm_guidance as rg
from rsm_guidance.core.transitions import Transition
from rsm_guidance.engine.schedulers import refusal
from tests.zoo import ZOO

NAMES = list(ZOO)
CLASSES = [n for n in NAMES if n not in ("sd15_inpaint9", "sd15_ip_adapter", "sd15_lcm", "sdxl_turbo", "flux_schnell")]
SAVED = [n for n in NAMES if n != "qwenimage_edit"]  # whose stand-in for a processor cannot be saved
CALLED_BACK = [n for n in NAMES if not n.startswith("pixart")]  # which knows the older `callback` only
IMAGES = [n for n in SAVED if n in CLASSES and "image" in ZOO[n].call()]
KINDS = [
    "sd15",
    "sd15_inpaint",
    "sdxl",
    "sd3",
    "sd3_img2img",
    "flux",
    "flux2_klein",
    "sana",
    "qwenimage",
    "zimage",
    "wan",
]
FEW = ["sd15", "sdxl", "sd3", "flux", "sana", "qwenimage", "wan"]

ODE = rg.Unguided(Transition("ode"))
JUMPING = rg.StepwiseSampling(candidates=2, transition=Transition("ddim", 1.0))  # restarts the call at every level


def redness(images: Tensor, prompts: list[str]) -> Tensor:
    """A toy reward: mean red minus mean blue."""
    return (images[..., 0, :, :] - images[..., 2, :, :]).flatten(1).mean(1)


def guided_of(stock: DiffusionPipeline) -> DiffusionPipeline:
    """Our class around the modules of a stock pipeline."""
    pipe = rg.RewardGuidedPipeline.from_pipe(stock)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def build(name: str) -> DiffusionPipeline:
    return guided_of(ZOO[name].build())


def run(pipe: DiffusionPipeline, name: str, seed: int = 0, **extra: Any) -> Any:
    """The samples of one small call, as an array unless another output type is asked for."""
    call = ZOO[name].call() | {"generator": torch.Generator().manual_seed(seed), "output_type": "np"} | extra
    call = {k: [*v] if isinstance(v, list) else v for k, v in call.items()}  # some stock calls change their lists
    if isinstance(call["generator"], list):
        call["generator"] = [g.clone_state() for g in call["generator"]]
    with torch.no_grad():
        return pipe(**call)[0]


def unguided(pipe: DiffusionPipeline, name: str, **extra: Any) -> Any:
    """What the call gives without a sampler, and with the sampler `none`, to the same bit."""
    plain, none = run(pipe, name, **extra), run(pipe, name, **extra, sampler="none")
    assert type(plain) is type(none)
    assert np.array_equal(np.asarray(plain), np.asarray(none)), "sampler='none' must be the stock call"
    assert np.isfinite(np.asarray(plain)).all()
    return plain


def thrice(name: str, change: Callable[[DiffusionPipeline], object] = lambda pipe: None, **extra: Any) -> Any:
    """What a pipeline gives after a change: the stock class, ours without a sampler, and ours with `none`, to the same bit."""
    stock, ours = ZOO[name].build(), build(name)
    change(stock)
    change(ours)
    reference = run(stock, name, **extra)
    assert np.array_equal(np.asarray(unguided(ours, name, **extra)), np.asarray(reference)), "our class must be stock"
    return reference


def under_guidance(pipe: DiffusionPipeline, name: str, **extra: Any) -> np.ndarray:
    """Finite samples of a sampler that jumps, where the scheduler lets it, else of best-of-n."""
    sampler = JUMPING if refusal(pipe.scheduler) is None else rg.BestOfN(2)
    samples = np.asarray(run(pipe, name, sampler=sampler, reward=redness, **extra))
    assert np.isfinite(samples).all()
    return samples


def batch(name: str, prompts: list[str]) -> dict[str, Any]:
    """Arguments for several prompts, with a generator and input images for each."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    base = ZOO[name].call()
    per_prompt = {k: [base[k]] * len(prompts) for k in ("negative_prompt", "image", "mask_image") if k in base}
    return {"prompt": prompts, "generator": generators, **per_prompt}


def modules_of(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def denoiser_of(pipe: DiffusionPipeline) -> Any:
    return pipe.unet if getattr(pipe, "unet", None) is not None else pipe.transformer


def close(a: Any, b: Any, atol: float) -> bool:
    return bool(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).max() < atol)

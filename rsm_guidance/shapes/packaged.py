"""Where the packaged weights of the shapes world lie, and the settings with which they were measured."""

from pathlib import Path

from rsm_guidance.io.names import PackagedModel
from rsm_guidance.shapes.scenes import caption_set

STEPS = 20
GUIDANCE_SCALE = 3.0
_TRAINING = 4096
_WEIGHTS = Path(__file__).parent / "weights"


def prompts(count: int) -> list[str]:
    """Held-out captions."""
    return [caption.text for caption in caption_set(count, 0)]


def training_prompts() -> list[str]:
    """Captions of the training split."""
    return [caption.text for caption in caption_set(_TRAINING, 1, held_out=False)]


MODEL = PackagedModel(
    str(_WEIGHTS / "model"),
    {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE},
    prompts,
    training_prompts,
    "rsm_guidance.shapes.model",
)
DRM = _WEIGHTS / "drm"
LORA = _WEIGHTS / "lora"


def model_path() -> str:
    """Folder of the packaged shapes model, in stock diffusers layout (for `from_pretrained`)."""
    return MODEL.location()


def drm_path() -> str:
    """Folder of the packaged diffusion reward model of the shapes world."""
    return str(DRM)


def lora_path() -> str:
    """Folder of a LoRA of the packaged model, fine-tuned by its verifier (`pipe.load_lora_weights`), at guidance scales of 1 to 2."""
    return str(LORA)

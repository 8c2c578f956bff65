"""What `remote` rewards and `rsm-guidance serve-reward` send each other, version 1.

GET  /v1/reward   -> {"protocol": 1, "name", "requires", "reads_prompt", "latents", "share",
                     "latent_share", "image_size"}
POST /v1/score    application/json: {"prompts": [...], "images": [base64 of PNG files], "columns": {...}}
POST /v1/score    application/octet-stream: safetensors with `latents`, and {"prompts", "timestep", "grid"} as JSON in the
                  entry `request` of its metadata
                  -> {"scores": [...]}, or a status from 400 with {"error": "a sentence"}
"""

import base64
import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from rsm_guidance.core.errors import UsageError
from rsm_guidance.rewards.images import to_uint8

PROTOCOL = 1
JSON, SAFETENSORS = "application/json", "application/octet-stream"


def png_texts(images: Tensor) -> list[str]:
    """PNG files of images [B, 3, H, W] in [0, 1], as base64."""
    texts = []
    for image in to_uint8(images).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        texts.append(base64.b64encode(file.getvalue()).decode())
    return texts


def pack_images(images: Tensor, prompts: Sequence[str], columns: dict[str, list[Any]]) -> bytes:
    """The body of a request for scores of images.

    Raises:
        UsageError: for columns that JSON does not have.
    """
    try:
        told = {"prompts": list(prompts), "images": png_texts(images), "columns": columns}
        return json.dumps(told, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise UsageError(f"columns are sent as JSON, which cannot hold these: {error}") from error


def unpack_images(body: bytes) -> tuple[Tensor, list[str], dict[str, list[Any]]]:
    """Images, prompts and columns of a request.

    Raises:
        UsageError: if it is no such request.
    """
    try:
        told = json.loads(body)
        prompts, files, columns = told["prompts"], told["images"], told.get("columns", {})
        images = [_image(base64.b64decode(text, validate=True)) for text in files]
    except (ValueError, KeyError, TypeError, AttributeError, OSError, Image.DecompressionBombError) as error:
        raise UsageError(f"this is no request for scores of PNG images: {error!r}") from error
    if not isinstance(columns, dict) or not isinstance(prompts, list) or len(prompts) != len(images):
        raise UsageError("a request needs as many prompts as images, in lists, and columns by name")
    if len({image.shape for image in images}) > 1:
        raise UsageError("the images of a request must have one size")
    return torch.stack(images) if images else torch.zeros(0, 3, 1, 1), prompts, columns


def _image(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data), formats=["PNG"]) as file:
        return torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1).float() / 255


def pack_latents(latents: Tensor, timestep: float, prompts: Sequence[str], grid: tuple[int, int] | None) -> bytes:
    """The body of a request for scores of latents [B, ...]."""
    from safetensors.torch import save

    request = json.dumps({"prompts": list(prompts), "timestep": timestep, "grid": grid})
    found: bytes = save({"latents": latents.detach().cpu().contiguous()}, {"request": request})
    return found


def unpack_latents(body: bytes) -> tuple[Tensor, float, list[str], tuple[int, int] | None]:
    """Latents, timestep, prompts and grid of a request.

    Raises:
        UsageError: if it is no such request.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        latents = load(body)["latents"]
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])
        told = json.loads(header["__metadata__"]["request"])
        prompts, timestep = [str(prompt) for prompt in told["prompts"]], float(told["timestep"])
        grid = None if told.get("grid") is None else (int(told["grid"][0]), int(told["grid"][1]))
    except (SafetensorError, ValueError, KeyError, TypeError, IndexError) as error:
        raise UsageError(f"this is no request for scores of latents: {error!r}") from error
    return latents, timestep, prompts, grid

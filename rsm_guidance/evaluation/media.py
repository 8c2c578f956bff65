"""Writing images with what made them, and videos."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from rsm_guidance.io.files import require_writable, write_atomically

VIDEOS = (".mp4", ".gif", ".webp")
_PER_SECOND = 8  # frames of animated pictures


def require_video_name(path: Path) -> Path:
    """The path itself, if a video can be written there.

    Raises:
        ValueError: for another ending, and for .mp4 without a library that encodes it.
    """
    if path.suffix.lower() not in VIDEOS:
        raise ValueError(f"cannot write a video into {path}: name a file that ends in {', '.join(VIDEOS)}")
    if path.suffix.lower() == ".mp4":
        encoders = {name for name in ("imageio", "imageio_ffmpeg", "cv2") if find_spec(name) is not None}
        if "cv2" not in encoders and len(encoders) < 2:
            raise ValueError(f"cannot write {path}: .mp4 takes `pip install imageio imageio-ffmpeg`; or name a .gif")
    return require_writable(path)


def frames_of(video: Any) -> list[Image.Image]:
    """The frames of a video: images, or an array [F, H, W, 3] in [0, 1]."""
    if isinstance(video, Sequence):
        return list(video)
    return [Image.fromarray((np.asarray(frame) * 255).round().clip(0, 255).astype(np.uint8)) for frame in video]


def write_video(path: Path, video: Any, per_second: int = _PER_SECOND) -> None:
    """Write a video atomically, in the format its suffix names; animated pictures repeat for ever."""
    frames = frames_of(video)
    if path.suffix.lower() == ".mp4":
        from diffusers.utils import export_to_video

        write_atomically(path, lambda partial: export_to_video(frames, str(partial), fps=per_second))
        return
    rest: dict[str, Any] = {"save_all": True, "append_images": frames[1:], "duration": 1000 // per_second, "loop": 0}
    write_atomically(path, lambda partial: frames[0].save(partial, **rest))


def parameters_text(settings: dict[str, Any]) -> str:
    """Settings as the text that A1111 writes into its PNG files and ComfyUI, too, reads.

    The prompt stands first, then the negative prompt on a line of its own, then all others as "Name: value", separated by
    commas; a value that holds one of these marks is quoted.
    """
    rest = {n: v for n, v in settings.items() if v is not None and n not in ("Prompt", "Negative prompt")}
    lines = [str(settings["Prompt"])]
    if settings.get("Negative prompt"):
        lines.append(f"Negative prompt: {settings['Negative prompt']}")
    return "\n".join([*lines, ", ".join(f"{name}: {_quoted(value)}" for name, value in rest.items())])


def _quoted(value: Any) -> str:
    text = str(value)
    return json.dumps(text) if any(mark in text for mark in ",:\n") else text


def png_text(settings: dict[str, Any], ours: dict[str, Any]) -> PngInfo:
    """The text chunks of a PNG file: `parameters` (see `parameters_text`), and all of ours as JSON in `rsm-guidance`."""
    text = PngInfo()
    text.add_itxt("parameters", parameters_text(settings))
    text.add_itxt("rsm-guidance", json.dumps(ours, allow_nan=False))
    return text

"""Every reward by name against a calculation of its own: `python -m benchmarks.rewards`.

No hub is needed: published models are small ones with random weights, saved in the layouts of the real ones and read by the
code that reads those.  What is measured is the code, not what the published weights think of an image.
"""

import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from benchmarks import script
from rsm_guidance.evaluation.report.tables import table
from rsm_guidance.io.files import write_json
from rsm_guidance.rewards import resolve_reward
from rsm_guidance.rewards.images import eight_bit, longest_side, shortest_side, standardized
from rsm_guidance.rewards.serve import reward_server
from rsm_guidance.rewards.unified import Unified
from tests.rewards.cases import PUBLISHED, made, processor
from tests.rewards.layouts import PROMPTS, pictures, tensor_of
from tests.rewards.test_judges import completion, write_llava

SIZES = ((64, 64), (40, 75), (97, 41))
WORDS = "OPEN SALE Taxi hotel Coffee 2026 STOP Museum exit Bakery NORTH Hello".split()


@dataclass(frozen=True)
class Rewards:
    """Check all rewards."""

    out: Path = Path("benchmarks/results/rewards.json")


def run(config: Rewards) -> dict[str, Any]:
    """Checks by reward, written as JSON."""
    torch.manual_seed(0)
    checks: dict[str, Callable[[Path], dict[str, Any]]] = {name: _published(name) for name in PUBLISHED}
    checks |= {"vqa": _vqa, "unified": _unified, "remote": _remote, "ocr": _ocr}
    checks |= {"compressibility": _compressibility, "color": _color, "color-histogram": _histogram}
    report: dict[str, Any] = {}
    for name, check in checks.items():
        with tempfile.TemporaryDirectory() as folder:
            report[name] = check(Path(folder))
    write_json(config.out, report)
    return report


def _published(name: str) -> Callable[[Path], dict[str, Any]]:
    def check(folder: Path) -> dict[str, Any]:
        reward, expected = made(name, folder)
        half = replace(reward, dtype="bfloat16").load()
        truth, found, rough = [], [], []
        with torch.no_grad():
            for size in SIZES:
                images = pictures(*size)
                truth.append(expected(images).double())
                found.append(reward(tensor_of(images), PROMPTS))
                rough.append(half(tensor_of(images), PROMPTS))
        return {
            **_compared(torch.cat(found), torch.cat(truth)),
            "bfloat16": float((torch.cat(rough) - torch.cat(truth)).abs().max()),
            "preparation": _preparation(name),
        }

    return check


def _compared(found: Tensor, truth: Tensor) -> dict[str, Any]:
    """The largest difference, and the standard deviation of what should be."""
    return {
        "difference": float((found.double() - truth.double()).abs().max()),
        "spread": float(truth.double().std()),
        "images": len(truth),
    }


def _preparation(name: str) -> float:
    """Largest difference of prepared pixels at 224 from those of the original steps in Pillow."""
    worst = 0.0
    for size in ((512, 512), (300, 517), (1024, 768), (150, 100)):
        images = pictures(*size, 1)
        if name == "hpsv2":
            found, wanted = standardized(longest_side(tensor_of(images), 224)), _padded(images[0])
        elif name == "image-reward":
            found, wanted = standardized(shortest_side(tensor_of(images), 224, rounded_crop=True)), _cropped(images[0])
        else:
            found = standardized(shortest_side(tensor_of(images), 224))
            wanted = processor(224)(images, return_tensors="pt")["pixel_values"]
        worst = max(worst, float((found - wanted).abs().max()))
    return worst


def _padded(image: Image.Image) -> Tensor:
    scale = 224 / max(image.size)
    width, height = (round(s * scale) for s in image.size)
    bands = [Image.fromarray(np.asarray(b, dtype=np.float32) / 255) for b in image.split()]
    small = np.stack([np.array(b.resize((width, height), Image.Resampling.BICUBIC)) for b in bands])
    canvas = torch.zeros(1, 3, 224, 224)
    top, left = (224 - height) // 2, (224 - width) // 2
    canvas[0, :, top : top + height, left : left + width] = torch.from_numpy(small)
    return standardized(canvas)


def _cropped(image: Image.Image) -> Tensor:
    width, height = (int(224 * s / min(image.size)) for s in image.size)
    left, top = round((width - 224) / 2.0), round((height - 224) / 2.0)
    resized = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    return standardized(tensor_of([resized]))


def _vqa(folder: Path) -> dict[str, Any]:
    model, processor_ = write_llava(folder)
    images, truth = pictures(24, 24), []
    yes = processor_.tokenizer.convert_tokens_to_ids(["yes", "Yes"])
    for image, prompt in zip(images, PROMPTS, strict=True):
        text = f'USER : <image> Does this image show "{prompt}"? Please answer yes or no. ASSISTANT :'
        with torch.no_grad():
            logits = model(**processor_(images=image, text=text, return_tensors="pt")).logits[0, -1]
        truth.append(logits.softmax(-1)[yes].sum())
    return _compared(resolve_reward(f"vqa:model={folder}")(tensor_of(images), PROMPTS), torch.stack(truth))


def _unified(_: Path) -> dict[str, Any]:
    judge, rng = Unified("http://nowhere/v1", "judge"), np.random.default_rng(0)
    shares = rng.dirichlet([1.0] * 6, 20)
    shares[:, 5] *= 0.5  # on another word
    found = [judge.expected(completion(dict(zip("12345x", map(float, p), strict=True)))) for p in shares]
    truth = (shares[:, :5] * np.arange(1, 6)).sum(1) / shares[:, :5].sum(1)
    return _compared(torch.tensor(found), torch.from_numpy(truth))


def _remote(_: Path) -> dict[str, Any]:
    drm: Any = resolve_reward("shapes-drm")
    images, prompts = torch.rand(4, 3, 64, 64), ["a red star", "a circle", "two squares", "a blue star"]
    with reward_server(drm) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        remote: Any = resolve_reward(f"remote:url=http://127.0.0.1:{server.server_port}")
        with torch.no_grad():
            truth, found = drm.score_images(eight_bit(images), prompts), remote(images, prompts)
        server.shutdown()
    return _compared(found, truth)


def _ocr(_: Path) -> dict[str, Any]:
    reward, font = resolve_reward("ocr:threads=1"), ImageFont.load_default(28)
    images = []
    for word in WORDS:
        sign = Image.new("RGB", (160, 160), "white")
        ImageDraw.Draw(sign).text((10, 60), word, fill="black", font=font)
        images.append(sign)
    right = reward(tensor_of(images), [f'a sign that says "{word}"' for word in WORDS])
    wrong = reward(tensor_of(images), [f'a sign that says "{word}"' for word in WORDS[1:] + WORDS[:1]])
    return {"rendered": float(right.mean()), "another": float(wrong.mean()), "images": len(WORDS)}


def _compressibility(folder: Path) -> dict[str, Any]:
    sizes = []
    for image in (images := pictures(64, 48)):
        image.save(folder / "image.jpg", quality=95)
        sizes.append(-(folder / "image.jpg").stat().st_size / 1000)
    return _compared(resolve_reward("compressibility")(tensor_of(images), PROMPTS), torch.tensor(sizes))


def _color(_: Path) -> dict[str, Any]:
    images = pictures(64, 48)
    truth = [-float(np.square(np.asarray(i) / 255 - [1, 0, 0]).mean()) for i in images]
    return _compared(resolve_reward("color:color=red")(tensor_of(images), PROMPTS), torch.tensor(truth))


def _histogram(folder: Path) -> dict[str, Any]:
    (reference := pictures(32, 32, 1, seed=9)[0]).save(folder / "reference.png")
    wanted, truth = _by_hand(reference), []
    for image in (images := [*pictures(64, 48, 2), Image.new("RGB", (8, 8), "red")]):
        truth.append(float(np.minimum(_by_hand(image), wanted).sum(1).mean()))
    reward = resolve_reward(f"color-histogram:image={folder / 'reference.png'}")
    return _compared(torch.stack([reward(tensor_of([i]), ["-"])[0] for i in images]), torch.tensor(truth))


def _by_hand(image: Image.Image) -> np.ndarray:
    counts = np.zeros((3, 16))
    for pixel in np.asarray(image).reshape(-1, 3):
        for channel, value in enumerate(pixel / 255 * 15):
            low = min(int(value), 14)
            counts[channel, low] += low + 1 - value
            counts[channel, low + 1] += value - low
    return counts / counts.sum(1, keepdims=True)


def shown(report: dict[str, Any]) -> str:
    """The report as a Markdown table."""
    rows = []
    for name, r in report.items():
        if name == "ocr":
            rows.append(
                [name, str(r["images"]), f"the word {r['rendered']:.3f}, another {r['another']:.3f}", "", "", ""]
            )
            continue
        more = [f"{r[key]:.1g}" if key in r else "" for key in ("preparation", "bfloat16")]
        rows.append([name, str(r["images"]), f"{r['difference']:.1g}", f"{r['spread']:.2g}", *more])
    return table(["reward", "images", "difference", "spread", "preparation", "bfloat16"], rows)


if __name__ == "__main__":
    script(Rewards, run, shown)

"""The page of a trained LoRA: what it is, how it was made, what it does."""

import json
from typing import Any

from rsm_guidance.training.alignment.config import AlignConfig
from rsm_guidance.training.alignment.lora_file import FILE

_CARD = """---
library_name: diffusers
license: other
tags:
- lora
- diffusers
- rsm-guidance
base_model: {base_model}
---

# A LoRA for {base}, trained by rewards

{method}It was trained to raise {rewards}{gold}. The base model is named, not copied, and its licence holds.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{base}")
pipe.load_lora_weights("path or hub id of this folder", weight_name="{file}")
image = pipe("a prompt"{call}).images[0]
```

Its scale is folded into the weights: strength 1 is what was evaluated, in diffusers and in ComfyUI alike{kohya}.

## Before and after

{prompts} prompts, {images} images each, by the stock pipeline.

| | base model | with this LoRA |
|---|---|---|
{rows}

Diversity is the mean distance of images of one prompt; drift that of velocities from the base model's, relative to their size.

![what was evaluated, by updates](curves.png)

{updates} updates in {seconds:.0f} seconds; {parameters} parameters. Training ended: {stopped}.{open}

![realised strength of guidance by noise level](strengths.png)

## Configuration

```json
{config}
```
"""


def card_of(config: AlignConfig, report: dict[str, Any]) -> str:
    """The page, in the hub's Markdown."""
    base, best, method = report["base"], report["best"], config.method
    names = [name for name in best if name in base]
    told = f"By {method.paper} ({method.source}). Ours: {method.ours}. " if method.paper else ""
    return _CARD.format(
        base_model=json.dumps(config.pipeline if config.pipeline.count("/") == 1 else ""),
        base=config.pipeline,
        method=told,
        rewards=" and ".join(config.rewards),
        gold="" if config.gold is None else f"; {config.gold} was watched and not trained on",
        file=FILE,
        call="".join(f", {name}={value!r}" for name, value in report["call"].items()),
        kohya="" if "unet" not in report["part"] else "; the file of kohya's layout is for programs that read no other",
        prompts=config.evaluation.count,
        images=config.evaluation.images,
        rows="\n".join(f"| {name} | {base[name]:.4g} | {best[name]:.4g} |" for name in names),
        updates=int(report["history"][-1]["step"]),
        seconds=report["cost"]["training_seconds"],
        parameters=report["trained"]["parameters"],
        stopped=report["stopped"],
        open="" if not config.required else f" The paper leaves open: {', '.join(config.required)}.",
        config=json.dumps(report["config"], indent=1),
    )

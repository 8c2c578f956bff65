"""The page of a trained reward model: what it is, what it was trained on, how good it is."""

import json
from typing import Any

from rsm_guidance.training.reward_model.config import RewardConfig

_CARD = """---
library_name: rsm-guidance
license: other
tags:
- reward-model
- diffusion
- preference
base_model: {base_model}
---

# A diffusion reward model on {backbone}

Scores images, and noisy latents, under a prompt: {blocks} blocks of the denoiser ({adaptation}) with a reward head
(arXiv 2605.25661). The weights here are the head and what was tuned; the backbone is named, not copied, and its licence holds.

```python
from rsm_guidance import DiffusionRewardModel

drm = DiffusionRewardModel.from_pretrained("path or hub id of this folder")
scores = drm.score(latents, timestep, prompts)
```

    rsm-guidance sample "a prompt" --model {backbone} --reward path-or-hub-id-of-this-folder

A score is in standard deviations over {measured}; of two images of a prompt the one of the higher score is preferred.

## Training

{pairs} pairs, {ties} of them ties ({skipped}), {steps} updates of {batch} pairs; held out: {held_out} pairs of other prompts.

## Accuracy on {measured}

| noise level sigma | pairs | accuracy | standard error |
|---|---|---|---|
{rows}

![accuracy by noise level](accuracy.png)

## Configuration

```json
{config}
```
"""


def card_of(config: RewardConfig, report: dict[str, Any]) -> str:
    """The page, in the hub's Markdown."""
    data = report["data"]
    rows = [
        f"| {entry['sigma']:g} | {entry['pairs']} | {_shown(entry['accuracy'])} | {_shown(entry['standard_error'])} |"
        for entry in report["levels"]
    ]
    backbone = report["model"]["backbone"]
    return _CARD.format(
        base_model=json.dumps(backbone if backbone.count("/") == 1 else ""),
        backbone=backbone,
        blocks=report["model"]["blocks"],
        adaptation=report["model"]["adaptation"],
        measured=report["measured_on"],
        pairs=data["pairs"],
        ties=data["ties"],
        skipped=", ".join(f"{count} {reason}" for reason, count in data["skipped"].items()) or "none left out",
        steps=report["steps"],
        batch=config.batch_size,
        held_out=data["held_out_pairs"],
        rows="\n".join(rows),
        config=json.dumps(report["config"], indent=1),
    )


def _shown(number: float | None) -> str:
    return "-" if number is None else f"{number:.3f}"

"""Trains a diffusion reward model on preference pairs: `rsm-guidance train reward`.

Loss: Bradley-Terry, -log sigmoid(s_win - s_lose), both images of a pair noised to the same random level (arXiv
2605.25661, section 3).  Beside these re-noised pairs the trainer uses sibling pairs and rendered near misses
(`training.preferences`) and predicts per token what the finished image holds (`training.objects`); those are ours, as is
the choice of independent noise for the two images of a pair.
"""

import json
import os
import random
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm

from rsm_guidance.core.rows import per_row
from rsm_guidance.shapes.scenes import Caption, caption_set, random_caption
from rsm_guidance.training.checkpoint import Ema, load_state, save_state, warmup_cosine
from rsm_guidance.shapes.training.objects import ObjectHead
from rsm_guidance.shapes.training.groups import GroupConfig, Groups, Renders, batches, generate_groups, render_near_misses
from rsm_guidance.shapes.training.report import report_accuracy, validation_accuracy
from rsm_guidance.reward_models import DiffusionRewardModel, load_backbone
from rsm_guidance.reward_models.model import Adaptation

_GAP = 0.05  # smaller differences of the verifier's score are no preference


@dataclass(frozen=True)
class RewardTrainConfig:
    """Training of a diffusion reward model on the shapes world.

    Attributes:
        out: folder for data, training state, the model and its report.
        pipeline: folder of the generator, "shapes" for the embedded one; it is the backbone too. Another model of the
            shapes world: the verifier orders its samples.
        prompts: training captions, all of the training split.
        validation_prompts: held-out captions that decide when to stop.
        groups: how samples are generated.
        data: folder of generated groups; default `out`/data.
        blocks: blocks of the denoiser kept.
        adaptation: "frozen", "lora" or "full".
        lora_rank: rank of the LoRA.
        head_width: width of the reward head.
        steps: optimiser updates.
        batch_groups: groups per update.
        lr: peak learning rate of the head and of a LoRA; a tuned trunk learns at a third of it.
        weight_decay: AdamW weight decay.
        sibling_weight: weight of the sibling pairs' loss against that of the re-noised pairs.
        object_weight: weight of the auxiliary per-token prediction of what the finished image holds; none with a frozen
            backbone, which it could not teach.
        evaluate_every: updates between validations; the best checkpoint by mean accuracy is kept.
        seed: of data and training.
    """

    out: Path = Path("drm")
    pipeline: str = "shapes"
    prompts: int = 7200
    validation_prompts: int = 480
    groups: GroupConfig = field(default_factory=GroupConfig)
    data: Path | None = None
    blocks: int = 4
    adaptation: Adaptation = "full"
    lora_rank: int = 16
    head_width: int = 64
    steps: int = 2200
    batch_groups: int = 12
    lr: float = 1.5e-3
    weight_decay: float = 0.05
    sibling_weight: float = 1.0
    object_weight: float = 1.0
    evaluate_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("prompts", "validation_prompts", "steps", "batch_groups", "evaluate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        if self.groups.siblings < 2:
            raise ValueError(f"a preference needs at least 2 siblings; got {self.groups.siblings}")


def pair_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """Bradley-Terry loss over all pairs of each group whose targets differ; scores and targets [G, K], scalar."""
    difference = scores[:, :, None] - scores[:, None, :]
    wins = (targets[:, :, None] - targets[:, None, :]) > _GAP
    if not bool(wins.any()):
        return scores.sum() * 0
    return F.softplus(-difference[wins]).mean()


def renoise(x0: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """(1 - sigma) x0 + sigma eps for groups x0 [G, K, ...] at one level per group, sigma [G]; fresh noise for each."""
    s = per_row(sigma, x0)
    return (1 - s) * x0 + s * torch.randn(x0.shape, generator=generator)


def batch_loss(
    drm: DiffusionRewardModel,
    objects: ObjectHead,
    groups: Groups,
    renders: Renders,
    rows: Tensor,
    config: RewardTrainConfig,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, float]]:
    """Loss of one batch: re-noised finals, siblings at their own level, and rendered pairs, in one forward pass."""
    g, k, device = len(rows), groups.finals.shape[1], next(drm.head.parameters()).device
    level = torch.rand(g, generator=generator) ** 0.75 * 0.98 + 0.01  # noisier than even, as sampling schedules are
    render_level = torch.rand(g, generator=generator) * 0.85
    latents = torch.cat(
        [
            renoise(groups.finals[rows].float(), level, generator),
            groups.children[rows].float(),
            renoise(renders.latents[rows].float(), render_level, generator),
        ],
        1,
    )
    n = latents.shape[1]
    sigma = torch.cat(
        [
            level[:, None].expand(g, k),
            groups.sigma[rows, None].expand(g, k),
            render_level[:, None].expand(g, n - 2 * k),
        ],
        1,
    )
    prompts = [groups.prompts[r] for r in rows.tolist() for _ in range(n)]
    x = latents.flatten(0, 1).to(device)
    visual, grid = drm.features(x, 1000 * sigma.flatten().to(device), prompts, drm.grid(x))
    scores = drm.head(visual, grid).view(g, n)
    targets = groups.scores[rows].to(device)
    parts = {
        "renoised": pair_loss(scores[:, :k], targets),
        "siblings": pair_loss(scores[:, k : 2 * k], targets),
        "rendered": F.softplus(scores[:, 2 * k + 1 :] - scores[:, 2 * k, None]).mean(),
    }
    loss = parts["renoised"] + config.sibling_weight * parts["siblings"] + 0.5 * parts["rendered"]
    if config.object_weight and config.adaptation != "frozen":
        seen = groups.labels[rows].repeat(1, 2, 1, 1)  # siblings are to foresee it
        labels = torch.cat([seen, renders.labels[rows]], 1).to(device)
        parts["objects"] = objects.loss(visual.view(g, n, *visual.shape[1:]), labels)
        loss = loss + config.object_weight * parts["objects"]
    return loss, {name: part.item() for name, part in parts.items()}


def train_reward(config: RewardTrainConfig) -> dict[str, object]:
    """Generate data, train, keep the best checkpoint by held-out accuracy, and write model, report and plot.

    Resumes where it was interrupted.  Returns the report.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    pipe = load_backbone(config.pipeline)
    pipe.set_progress_bar_config(disable=True)
    captions = caption_set(config.prompts, config.seed, held_out=False)
    held_out = validation_captions(config.validation_prompts)
    data = Path(config.data or out / "data")
    train = generate_groups(pipe, captions, config.groups, data / "train", config.seed, "training samples")
    # small batches, so that siblings lie at many levels
    small = replace(config.groups, batch_size=min(12, config.groups.batch_size))
    samples = generate_groups(pipe, held_out, small, data / "validation", config.seed, "validation samples")
    valid, reported = samples.every_other(0), samples.every_other(1)
    renders = render_near_misses(pipe, captions, config.seed)

    torch.manual_seed(config.seed)
    drm = DiffusionRewardModel.from_pipeline(
        pipe,
        blocks=config.blocks,
        adaptation=config.adaptation,
        lora_rank=config.lora_rank,
        head_width=config.head_width,
        backbone=config.pipeline,
    )
    trunk = [p for p in drm.trunk.parameters() if p.requires_grad] if config.adaptation != "frozen" else []
    objects = ObjectHead(drm.trunk.dim).to(pipe.device)
    head = [*drm.head.parameters(), *objects.parameters()]
    factors = [1.0, 0.33] if config.adaptation == "full" else [1.0, 1.0]
    optimizer = torch.optim.AdamW(
        [{"params": head}, {"params": trunk}] if trunk else [{"params": head}], weight_decay=config.weight_decay
    )
    ema = Ema([drm.head, *([drm.trunk] if trunk else [])], 0.995)
    modules = {"drm": drm, "objects": objects, "ema": ema.shadow}
    state = load_state(out / "state", modules, optimizer) or {"step": 0, "best": -1.0, "history": []}
    first, best = int(state["step"]), float(state["best"])  # type: ignore[call-overload, arg-type]
    history: list[dict[str, float]] = list(state["history"])  # type: ignore[call-overload]
    bar = tqdm(range(first, config.steps), desc="reward model", initial=first, total=config.steps, mininterval=5)
    for step, rows in zip(bar, batches(len(train), config.batch_groups, config.steps, first, config.seed), strict=True):
        for group, factor in zip(optimizer.param_groups, factors, strict=False):
            group["lr"] = config.lr * factor * warmup_cosine(step, config.steps)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        loss, parts = batch_loss(drm, objects, train, renders, rows, config, generator)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_([*head, *trunk], 1.0)
        optimizer.step()
        ema.update(step)
        bar.set_postfix({k: f"{v:.3f}" for k, v in parts.items()})
        if (step + 1) % config.evaluate_every == 0 or step + 1 == config.steps:
            ema.swap()
            accuracy = validation_accuracy(drm, valid)  # on one half; the report uses the other
            history.append({"step": step + 1, **accuracy, **parts})
            if accuracy["mean"] > best:
                best = accuracy["mean"]
                drm.save_pretrained(out / "model")
            ema.swap()
            save_state(out / "state", step + 1, modules, optimizer, {"best": best, "history": history})
    chosen = DiffusionRewardModel.from_pretrained(str(out / "model"), pipe=pipe)
    report = {"config": json.loads(json.dumps(asdict(config), default=str)), "history": history}
    report |= report_accuracy(chosen, reported, out / "accuracy.png")
    partial = out / "report.json.partial"
    partial.write_text(json.dumps(report, indent=1))
    os.replace(partial, out / "report.json")
    return report


def validation_captions(count: int) -> list[Caption]:
    """Held-out captions for early stopping and the report; none shares its composition with the benchmark's set.

    They are of the three categories that have enough held-out compositions for that.
    """
    categories = ("counting", "position", "attribute_binding")
    evaluation = {c.spec.canonical() for c in caption_set(512, 0)}
    rng = random.Random("validation")
    chosen: dict[str, Caption] = {}
    while len(chosen) < count:
        caption = random_caption(rng.choice(categories), rng, held_out=True)
        if caption.spec.canonical() not in evaluation:
            chosen.setdefault(caption.text, caption)
    return list(chosen.values())

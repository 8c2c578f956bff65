"""Reads the folders of DiNa-LRM (arXiv 2602.11146), reward models on SD3.5-Medium with public weights.

Layout: `config.json` is the configuration of the training run; `checkpoint/` holds `backbone_lora/` (a PEFT adapter) and
`rm_head.pt`, or `rm_head.pt` alone (frozen backbone), or `full_model.pt` (tuned backbone).  The pickles are read with
`weights_only=True`, so they run no code.  Saved again, a model is in our own layout.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.io.files import read_json
from rsm_guidance.reward_models.config import LORA_TARGETS, DRMConfig
from rsm_guidance.rewards.checkpoints import read_tensors

FILES = "checkpoint/*"

_MODEL_KEYS = {
    "backbone_model_id", "ema_decay", "freeze_backbone", "lora_config", "model_type", "num_transformer_layers",
    "reward_head", "text_head_idx", "use_ema", "use_logistic", "use_lora", "use_t_embed", "use_text_features",
    "visual_head_idx",
}  # fmt: skip
_HEAD_KEYS = {"dropout", "num_attn_heads", "num_queries", "out_dim", "use_proj_in", "width"}
_PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "no": torch.float32}
_BLOCK = "transformer_blocks.{}"
_IMAGE_LEVEL = 0.1
_SCORE_SCALE = 10.0  # the authors show (raw + 10) / 10


def is_dina(config: Path) -> bool:
    """Whether a config.json is of a DiNa-LRM folder."""
    try:
        settings = read_json(config)
    except ValueError:
        return False
    model = settings.get("model") if isinstance(settings, dict) else None
    return isinstance(model, dict) and "visual_head_idx" in model


def backbone_of(folder: Path) -> str:
    """Hub id of the pipeline whose denoiser is the backbone."""
    return str(_settings(folder)["model"]["backbone_model_id"])


def read_dina(folder: Path) -> tuple[DRMConfig, dict[str, Tensor]]:
    """A folder's reward model in our terms: configuration, and weights by our names.

    Raises:
        UsageError: if files are missing or damaged, or ask for what this package does not have.
    """
    settings = _settings(folder)
    model, head = settings["model"], settings["model"].get("reward_head", {})
    adapter: dict[str, Any] = {}
    if model.get("freeze_backbone"):
        adaptation, tensors = "frozen", _pickle(folder, "rm_head.pt", "head.")
    elif model.get("use_lora"):
        adaptation, tensors = "lora", _pickle(folder, "rm_head.pt", "head.")
        adapter, lora = _adapter(folder / "checkpoint" / "backbone_lora")
        tensors |= lora
    else:
        adaptation, tensors = "full", _whole(_pickle(folder, "full_model.pt", ""))
    if "head.query_tokens" not in tensors:
        raise UsageError(f"{folder} is no DiNa-LRM model: its head has no query_tokens")
    precision = _PRECISIONS[settings.get("training", {}).get("mixed_precision", "bf16")]
    config = {
        "backbone": model["backbone_model_id"],
        "denoiser": "SD3Transformer2DModel",
        "blocks": model["num_transformer_layers"],
        "adaptation": adaptation,
        "taps": [_BLOCK.format(i - 1) for i in model["visual_head_idx"]],
        "text_taps": [_BLOCK.format(i - 1) for i in model.get("text_head_idx", [])],
        "head": "query",
        "head_width": tensors["head.query_tokens"].shape[-1],
        "queries": head.get("num_queries", 4),
        "attention_heads": head.get("num_attn_heads", 8),
        "dropout": head.get("dropout", 0.0),
        "norm_eps": torch.finfo(precision).eps,
        "image_levels": (_IMAGE_LEVEL,),
        "score_mean": -_SCORE_SCALE,
        "score_std": _SCORE_SCALE,
    }
    return DRMConfig(**config, **adapter), tensors


def _settings(folder: Path) -> dict[str, Any]:
    settings: dict[str, Any] = read_json(folder / "config.json")
    model = settings["model"]
    parts = {"model.reward_head": model.get("reward_head", {}), "training": settings.get("training", {})}
    lists = {f"model.{name}": model.get(name, []) for name in ("visual_head_idx", "text_head_idx")}
    wrong = [k for k, v in parts.items() if not isinstance(v, dict)]
    wrong += [k for k, v in lists.items() if not (isinstance(v, list) and all(type(i) is int for i in v))]
    if wrong:
        raise UsageError(f"the DiNa-LRM model in {folder} has a {wrong[0]} of another kind than its authors write")
    _check(folder, settings, model, parts["model.reward_head"])
    return settings


def _check(folder: Path, settings: dict[str, Any], model: dict[str, Any], head: dict[str, Any]) -> None:
    where = f"the DiNa-LRM model in {folder}"
    for name, given, known in (("model", model, _MODEL_KEYS), ("model.reward_head", head, _HEAD_KEYS)):
        if unknown := sorted(given.keys() - known):
            raise UsageError(f"{where} has an unknown setting {name}.{unknown[0]}, so it is not known how it scores")
    if missing := [k for k in ("backbone_model_id", "num_transformer_layers") if k not in model]:
        raise UsageError(f"{where} does not say its model.{missing[0]}")
    training = settings.get("training", {})
    refused = {
        "model.use_logistic": bool(model.get("use_logistic")),
        "model.reward_head.out_dim other than 1": head.get("out_dim", 1) != 1,
        "model.reward_head.use_proj_in": bool(head.get("use_proj_in")) and head.get("width", -1) == -1,
        "training.add_noise: false (clean latents under the timestep of noisy ones)": training.get("add_noise")
        is False,
        "a tap before the first block": 0 in (*model["visual_head_idx"], *model.get("text_head_idx", [])),
        "training.mixed_precision of another kind": training.get("mixed_precision", "bf16") not in _PRECISIONS,
    }
    if asked := [name for name, wrong in refused.items() if wrong]:
        raise UsageError(f"{where} was made with {asked[0]}, which is not supported")


def _pickle(folder: Path, name: str, prefix: str) -> dict[str, Tensor]:
    return {prefix + key: tensor for key, tensor in read_tensors(folder / "checkpoint" / name).items()}


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tuned model's tensors by our names; the table of positions is a constant of the backbone."""
    places = {"backbone.": "trunk.denoiser.", "reward_head.": "head."}
    named = {}
    for name, tensor in tensors.items():
        place = next((old for old in places if name.startswith(old)), "")
        if name != "backbone.pos_embed.pos_embed":
            named[places.get(place, "") + name.removeprefix(place)] = tensor
    return named


def _adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Settings of a PEFT adapter, and its tensors by our names."""
    try:
        config, found = read_json(folder / "adapter_config.json"), read_tensors(folder / "adapter_model.safetensors")
    except ValueError as error:
        raise UsageError(f"the adapter in {folder} is missing or damaged: {error}") from error
    uneven = [
        k for k in ("rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "modules_to_save") if config.get(k)
    ]
    if uneven or config.get("bias", "none") != "none":
        raise UsageError(f"the adapter in {folder} uses {(uneven or ['bias'])[0]}, which a reward model's LoRA has not")
    tensors, layers, rank = {}, set(), int(config["r"])
    for name, tensor in found.items():
        layer, _, end = name.removeprefix("base_model.model.").rpartition(".lora_")
        if end not in ("A.weight", "B.weight"):
            raise UsageError(f"the adapter in {folder} has an unknown tensor {name}")
        if tensor.shape[0 if end[0] == "A" else 1] != rank:
            raise UsageError(
                f"the adapter in {folder} has rank {tensor.shape[0 if end[0] == 'A' else 1]} at {layer}, its "
                f"adapter_config.json says {rank}"
            )
        layers.add(layer)
        tensors[f"trunk.denoiser.{layer}.lora_{end[0]}.default.weight"] = tensor
    return {"lora_rank": rank, "lora_alpha": float(config["lora_alpha"]), "lora_targets": _targets(layers)}, tensors


def _targets(layers: set[str]) -> tuple[str, ...]:
    """What names the layers: the usual ends of names where every block has all of them, else each layer."""
    blocks: dict[str, set[str]] = {}
    for layer in layers:
        start, _, _ = layer.partition(".attn")
        blocks.setdefault(start, set()).add(layer)
    usual = all({layer for layer in own if layer.endswith(end)} for own in blocks.values() for end in LORA_TARGETS)
    return LORA_TARGETS if usual else tuple(sorted(layers))

"""Folders of DiNa-LRM, as its own tools write them: read, scored against an independent calculation, saved again, refused."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.core.schedule import NoiseSchedule
from rsm_guidance.reward_models import DiffusionRewardModel, load_reward_model
from rsm_guidance.reward_models.config import LORA_TARGETS, DRMConfig
from rsm_guidance.reward_models.heads import QueryHead, Widths
from tests.reward_models.test_heads import reference_query_head
from tests.zoo import ZOO, _build, families

PROMPTS = ["a cat", "a red dog on a tree"]
EPS = 2.0**-7  # of RMSNorm in bfloat16, in which these models are trained


class Backbone(nn.Module):
    """What DiNa-LRM keeps of SD3: the parts by their names, the first blocks, and outputs of some of them."""

    def __init__(self, transformer: Any, blocks: int) -> None:
        super().__init__()
        self.pos_embed, self.time_text_embed = transformer.pos_embed, transformer.time_text_embed
        self.context_embedder = transformer.context_embedder
        self.transformer_blocks = nn.ModuleList(transformer.transformer_blocks[:blocks])

    def forward(
        self, x: Tensor, text: Tensor, pooled: Tensor, timestep: Tensor, read: list[int]
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        hidden, temb, text = self.pos_embed(x), self.time_text_embed(timestep, pooled), self.context_embedder(text)
        image, words = [], []
        for number, block in enumerate(self.transformer_blocks, 1):
            text, hidden = block(hidden_states=hidden, encoder_hidden_states=text, temb=temb)
            if number in read:
                image.append(hidden)
                words.append(text)
        return image, words, temb


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    def make() -> StableDiffusion3Pipeline:
        made = families.sd3()
        made["transformer"] = SD3Transformer2DModel.from_config(
            {**made["transformer"].config, "num_layers": 4, "dual_attention_layers": (0, 1)}
        )
        return StableDiffusion3Pipeline(**made)

    return _build(make)


def write_folder(folder: Path, pipe: Any, kind: str, text: bool = True) -> tuple[nn.Module, dict[str, Tensor]]:
    """A folder of a model on three blocks, read after the second and third; returns backbone and head weights."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    taps, words = [2, 3], ([2, 3] if text else [])
    model: dict[str, Any] = {
        "model_type": "thurstone",
        "backbone_model_id": "somebody/some-sd3",
        "num_transformer_layers": 3,
        "freeze_backbone": kind == "frozen",
        "use_ema": True,
        "ema_decay": 0.995,
        "use_lora": kind == "lora",
        "use_text_features": text,
        "use_logistic": False,
        "use_t_embed": True,
        "lora_config": {"r": 3, "lora_alpha": 6, "init_lora_weights": "gaussian"},
        "visual_head_idx": taps,
        "text_head_idx": words,
        "reward_head": {
            "use_proj_in": False,
            "width": -1,
            "out_dim": 1,
            "num_queries": 4,
            "num_attn_heads": 2,
            "dropout": 0.0,
        },
    }
    training = {"learning_rate": "5e-5", "mixed_precision": "bf16", "add_noise": True}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model": model, "training": training, "system": {"seed": 42}}))
    (folder / "checkpoint").mkdir()
    shape = DRMConfig(head="query", head_width=32, attention_heads=2, norm_eps=EPS)
    head = QueryHead(Widths((32, 32), (32,) * len(words), 32), shape)
    backbone: nn.Module = Backbone(copy.deepcopy(pipe.transformer), 3)
    if kind == "lora":
        last = [] if text else [f"transformer_blocks.2.attn.{n}" for n in LORA_TARGETS if "add" in n]
        backbone = get_peft_model(
            backbone, LoraConfig(r=3, lora_alpha=6, target_modules=list(LORA_TARGETS), exclude_modules=last or None)
        )  # type: ignore[assignment, arg-type]
    with torch.no_grad():
        tuned = {"lora": "lora_", "frozen": "nothing", "full": ""}[kind]
        for part, word in ((backbone, tuned), (head, "")):
            for name, p in part.named_parameters():
                if word in name:
                    p.add_(0.1 * torch.randn(p.shape))
    state = head.state_dict()
    if kind == "full":
        whole = {f"backbone.{k}": v for k, v in backbone.state_dict().items()}
        torch.save(whole | {f"reward_head.{k}": v for k, v in state.items()}, folder / "checkpoint" / "full_model.pt")
    else:
        torch.save(state, folder / "checkpoint" / "rm_head.pt")
    if kind == "lora":
        backbone.save_pretrained(str(folder / "checkpoint" / "backbone_lora"))  # type: ignore[operator]
    return backbone, dict(head.named_parameters())


def expected_score(
    pipe: Any, backbone: nn.Module, head: dict[str, Tensor], x: Tensor, sigma: float, text: bool
) -> Tensor:
    prompt, _, pooled, _ = pipe.encode_prompt(
        PROMPTS, None, None, do_classifier_free_guidance=False, max_sequence_length=256
    )
    image, words, temb = backbone(x, prompt, pooled, torch.full((2,), 1000 * sigma), [2, 3])
    return reference_query_head(head, image, words if text else [], temb, EPS).squeeze(-1)


def latents() -> Tensor:
    return torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize(("kind", "text"), [("lora", True), ("lora", False), ("frozen", True), ("full", True)])
def test_a_folder_is_read_scored_and_saved_again(pipe: Any, tmp_path: Path, kind: str, text: bool) -> None:
    backbone, head = write_folder(tmp_path / "dina", pipe, kind, text)
    drm = DiffusionRewardModel.from_pretrained(tmp_path / "dina", pipe=pipe)
    config = drm.drm_config
    assert (config.backbone, config.blocks, config.adaptation, config.head) == ("somebody/some-sd3", 3, kind, "query")
    assert config.taps == ("transformer_blocks.1", "transformer_blocks.2") and config.norm_eps == EPS
    assert (config.text_taps == config.taps) == text
    raw = expected_score(pipe, backbone, head, latents(), 0.4, text)
    assert torch.allclose(drm.score(latents(), 400.0, PROMPTS), (raw + 10) / 10, atol=1e-5)
    drm.save_pretrained(tmp_path / "ours")
    assert {p.name for p in (tmp_path / "ours").iterdir()} == {"README.md", "config.json", "model.safetensors"}
    again = DiffusionRewardModel.from_pretrained(tmp_path / "ours", pipe=pipe)
    assert again.drm_config == config
    assert torch.equal(again.score(latents(), 400.0, PROMPTS), drm.score(latents(), 400.0, PROMPTS))


@torch.no_grad()
def test_clean_latents_are_noised_as_its_authors_do(pipe: Any, tmp_path: Path) -> None:
    """To the scheduler's level nearest to .1, scored there; a sampler's clean level alike."""
    write_folder(tmp_path / "dina", pipe, "lora")
    drm = DiffusionRewardModel.from_pretrained(tmp_path / "dina", pipe=pipe)
    sigma = float(min(pipe.scheduler.sigmas, key=lambda s: abs(float(s) - 0.1)))
    noise = torch.randn(16, 16, 16, generator=torch.Generator().manual_seed(0))
    direct = drm.score((1 - sigma) * latents() + sigma * noise, 1000 * sigma, PROMPTS)
    schedule = NoiseSchedule.flow(4, 3.0)
    assert torch.allclose(drm.score_at_level(latents(), 4, PROMPTS, schedule), direct, atol=1e-5)
    assert torch.equal(
        drm.score_at_level(latents(), 2, PROMPTS, schedule), drm.score(latents(), float(schedule.timesteps[2]), PROMPTS)
    )


def test_it_is_loaded_by_name(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "dina", pipe, "frozen")
    asked: list[str] = []
    monkeypatch.setattr("rsm_guidance.reward_models.hub.load_backbone", lambda name, device: asked.append(name) or pipe)
    assert load_reward_model(str(tmp_path / "dina"), pipe).drm_config.head == "query"
    assert asked == ["somebody/some-sd3"]


# --- what is refused ---


def test_another_denoiser_is_refused(pipe: Any, tmp_path: Path) -> None:
    write_folder(tmp_path / "dina", pipe, "frozen")
    with pytest.raises(
        UsageError, match="was made for the SD3Transformer2DModel of 'somebody/some-sd3'.*a FluxTransformer2DModel"
    ):
        DiffusionRewardModel.from_pretrained(tmp_path / "dina", pipe=ZOO["flux"].build())


def edited(folder: Path, **changes: Any) -> None:
    settings = json.loads((folder / "config.json").read_text())
    for path, value in changes.items():
        part = settings
        *sections, key = path.split("__")
        for section in sections:
            part = part[section]
        part[key] = value
    (folder / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model__use_logistic": True}, "use_logistic, which is not supported"),
        ({"model__num_experts": 3}, "unknown setting model.num_experts"),
        ({"model__reward_head__pooling": "max"}, "unknown setting model.reward_head.pooling"),
        ({"model__reward_head__out_dim": 2}, "out_dim other than 1"),
        ({"model__visual_head_idx": [0, 3]}, "a tap before the first block"),
        ({"model__visual_head_idx": [2, 9]}, "cannot read 'transformer_blocks.8'"),
        ({"training__add_noise": False}, "add_noise: false"),
        ({"training__mixed_precision": "fp8"}, "mixed_precision"),
        ({"model__reward_head__num_queries": 7}, r"head.query_tokens \(1x4x32 for 1x7x32\)"),
        ({"model__reward_head": None}, "model.reward_head of another kind"),
        ({"model__visual_head_idx": "4"}, "model.visual_head_idx of another kind"),
        ({"model__visual_head_idx": []}, "unknown: head.layer_adapters_visual.1"),
        ({"model__num_transformer_layers": "3"}, "blocks must be of type int; got '3'"),
        ({"model__backbone_model_id": None}, "backbone must be of type str; got None"),
        ({"model__text_head_idx": [3]}, "unknown: head.layer_adapters_text.1"),
    ],
)
def test_settings_that_change_scores_are_never_ignored(pipe: Any, tmp_path: Path, change: Any, words: str) -> None:
    write_folder(tmp_path / "dina", pipe, "lora")
    edited(tmp_path / "dina", **change)
    with pytest.raises(UsageError, match=words):
        DiffusionRewardModel.from_pretrained(tmp_path / "dina", pipe=pipe)


def test_an_adapter_of_other_ranks_or_layers_is_refused(pipe: Any, tmp_path: Path) -> None:
    write_folder(tmp_path / "dina", pipe, "lora")
    folder = tmp_path / "dina" / "checkpoint" / "backbone_lora"
    settings, tensors = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    some = "base_model.model.transformer_blocks.1.attn.to_q.lora_A.weight"

    def load(changed: dict[str, Tensor] | None = None, **fields: Any) -> str:
        (folder / "adapter_config.json").write_text(json.dumps(settings | fields))
        save_file(tensors if changed is None else changed, folder / "adapter_model.safetensors")
        with pytest.raises(UsageError) as refused:
            DiffusionRewardModel.from_pretrained(tmp_path / "dina", pipe=pipe)
        return str(refused.value)

    assert "has rank 3 at" in load(r=4) and "says 4" in load(r=4)
    assert "rank 5 at transformer_blocks.1.attn.to_q" in load(tensors | {some: torch.zeros(5, 32)})
    assert "rank_pattern" in load(rank_pattern={"to_q": 8}) and "use_dora" in load(use_dora=True)
    assert "bias" in load(bias="all")
    assert "unknown tensor base_model.model.pos_embed.proj.weight" in load(
        tensors | {"base_model.model.pos_embed.proj.weight": torch.zeros(1)}
    )
    without = {k: v for k, v in tensors.items() if k != some}
    assert "missing: trunk.denoiser.transformer_blocks.1.attn.to_q.lora_A" in load(without)
    beyond = {k.replace("blocks.1.", "blocks.3."): v.clone() for k, v in tensors.items() if "blocks.1." in k}
    assert "unknown: trunk.denoiser.transformer_blocks.3" in load(tensors | beyond)
    (folder / "adapter_model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UsageError, match="missing or damaged"):
        DiffusionRewardModel.from_pretrained(tmp_path / "dina", pipe=pipe)


class Code:
    """Something whose unpickling would run code."""

    def __reduce__(self) -> Any:
        return (pytest.fail, ("a pickle ran code",))


def test_pickles_that_hold_more_than_tensors_do_not_run(pipe: Any, tmp_path: Path) -> None:
    write_folder(tmp_path / "dina", pipe, "frozen")
    path = tmp_path / "dina" / "checkpoint" / "rm_head.pt"
    torch.save({"query_tokens": Code()}, path)
    with pytest.raises(UsageError, match="more than tensors"):
        DiffusionRewardModel.from_pretrained(tmp_path / "dina", pipe=pipe)
    path.write_bytes(pickle.dumps(Code()))
    with pytest.raises(UsageError, match="more than tensors"):
        DiffusionRewardModel.from_pretrained(tmp_path / "dina", pipe=pipe)
    torch.save({"head.weight": 3}, path)
    with pytest.raises(UsageError, match="no mapping from names to tensors"):
        DiffusionRewardModel.from_pretrained(tmp_path / "dina", pipe=pipe)
    torch.save({"head.weight": torch.zeros(1, 32)}, path)
    with pytest.raises(UsageError, match="no query_tokens"):
        DiffusionRewardModel.from_pretrained(tmp_path / "dina", pipe=pipe)
    path.unlink()
    with pytest.raises(UsageError, match="cannot read the checkpoint .*rm_head.pt"):
        DiffusionRewardModel.from_pretrained(tmp_path / "dina", pipe=pipe)

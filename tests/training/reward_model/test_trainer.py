"""The trainer of reward models: resume, processes, settings, and what goes wrong."""

import math
import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import tracking
from accelerate.utils import LoggerType
from safetensors.torch import load_file

from rsm_guidance.core.errors import UsageError
from rsm_guidance.reward_models import DiffusionRewardModel, RewardOutput
from rsm_guidance.training.reward_model import trainer as training
from rsm_guidance.training.reward_model.collate import collate
from rsm_guidance.training.reward_model.config import (
    DataConfig,
    LossConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    RewardConfig,
)
from rsm_guidance.training.reward_model.evaluate import score_pairs
from rsm_guidance.training.reward_model.losses import PairLabel, soft
from rsm_guidance.training.reward_model.objective import PairObjective
from rsm_guidance.training.reward_model.run import require_run
from rsm_guidance.training.reward_model.trainer import train_reward
from tests.training.reward_model.worlds import log, objective_of, tiny, write_choices


def test_init_from_starts_where_a_finished_model_ended(sd3: Path, choices: Path, tmp_path: Path) -> None:
    first = tiny(sd3, choices, tmp_path / "first", steps=20, evaluate_every=20, save_every=20, ema_decay=None)
    report = train_reward(first)
    second = replace(first, out=tmp_path / "second", init_from=str(first.out), evaluation_levels=(0.0, 0.05))
    entry = train_reward(second)["history"][0]
    clean = {level["sigma"]: level for level in report["levels"]}
    assert entry["step"] == 0
    for level in (0.0, 0.05):
        assert entry[f"accuracy@{level:g}"] == clean[level]["accuracy"]
        assert entry[f"held_out_loss@{level:g}"] == pytest.approx(clean[level]["loss"], rel=1e-6)
    with pytest.raises(UsageError, match=r"made with lora_rank=2, and here it is 4"):
        train_reward(replace(second, out=tmp_path / "x", model=replace(first.model, lora_rank=4)))
    with pytest.raises(ValueError, match="no whole training state; to start from finished weights use init_from"):
        train_reward(replace(second, out=tmp_path / "x", init_from=None, resume=str(first.out)))


def test_embeddings_from_the_disk_are_those_of_the_text_encoders(
    sd3: Path, sd15: Path, choices: Path, tmp_path: Path
) -> None:
    for pipeline, blocks in ((sd3, 2), (sd15, 3)):
        config = tiny(pipeline, choices, tmp_path / pipeline.name, model=ModelConfig(blocks=blocks, head_width=8))
        kept, data = objective_of(config)
        plain, other = objective_of(replace(config, data=replace(config.data, embeddings=False)))
        assert data.embeddings is not None and other.embeddings is None
        a, b = (
            score_pairs(objective, part.train, (0.05, 0.7), 4) for objective, part in ((kept, data), (plain, other))
        )
        for level in a:
            assert torch.allclose(*(torch.tensor(s[level].scores) for s in (a, b)), rtol=0, atol=1e-6)
        batch = {**collate([data.train[0]], 0), "level": 100}
        swapped = {**batch, "prompt": ["other"], "embeddings": collate([data.train[-1]], 0)["embeddings"]}
        assert not torch.equal(kept(batch)["scores"], kept(swapped)["scores"]), "prompts matter"


def gradients(objective: PairObjective, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
    objective.zero_grad()
    objective(batch)["loss"].backward()
    return {n: p.grad.clone() for n, p in objective.named_parameters() if p.grad is not None}


def test_gradient_checkpointing_changes_no_gradient(sd3: Path, choices: Path, tmp_path: Path) -> None:
    config = tiny(sd3, choices, tmp_path / "a", model=ModelConfig(blocks=2, lora_rank=2, head_width=8))
    plain, data = objective_of(config)
    again, _ = objective_of(replace(config, gradient_checkpointing=True))
    assert again.drm.trunk.module.gradient_checkpointing or any(
        getattr(m, "gradient_checkpointing", False) for m in again.drm.trunk.modules()
    )
    for objective in (plain, again):
        for name, p in objective.named_parameters():
            if "lora_B" in name:  # as after some steps
                torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))
    batch = collate([data.train[i] for i in range(4)], 0)
    one, other = gradients(plain, batch), gradients(again.train(), batch)
    assert one.keys() == other.keys() and sum("lora" in name for name in one) > 4
    for name in one:
        assert torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-7), name
        # the last block's text queries, whose attention is thrown away, and what moves both scores alike
        idle = "blocks.1.attn.add_q_proj" in name or name.endswith("score_mlp.2.bias")
        assert bool(one[name].abs().max() > 0) != idle, name


def test_micro_batches_give_the_update_of_the_whole_batch(sd3: Path, choices: Path, tmp_path: Path) -> None:
    sizes: tuple[int | None, ...] = (None, 1, 3)
    runs = []
    for size in sizes:
        config = tiny(
            sd3, choices, tmp_path / str(size), steps=3, micro_batch=size, batch_size=5, loss=LossConfig(ties="skip"),
            ema_decay=None, optimizer=OptimizerConfig(lr=1e-3),
        )  # fmt: skip
        train_reward(config)
        runs.append(log(config.out))
    for other in runs[1:]:
        for a, b in zip(runs[0], other, strict=True):
            assert "loss" not in a or a["loss"] == pytest.approx(b["loss"], rel=1e-4, abs=1e-6)


def test_a_step_of_ties_alone_that_do_not_count_changes_nothing(sd3: Path, tmp_path: Path) -> None:
    ties = write_choices(tmp_path / "data", count=6, ties=6)
    config = tiny(
        sd3, ties, tmp_path / "run", loss=LossConfig(ties="skip"), steps=2, save_every=1, keep=3,
        data=DataConfig(str(ties), side=32, held_out_fraction=0.0),
    )  # fmt: skip
    report = train_reward(config)
    first, second = (load_file(config.out / f"checkpoint-00000{i}/objective.safetensors") for i in (1, 2))
    untouched, _ = objective_of(config)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(torch.equal(first[n], p) for n, p in untouched.named_parameters() if n in first), "nor does weight decay"
    assert report["levels"][0]["pairs"] == 0 and report["levels"][0]["ties"] == 6
    assert report["levels"][0]["accuracy"] is None and report["measured_on"] == "training pairs"


def test_a_soft_tie_pulls_scores_together_and_pairs_count_by_their_weight(
    sd3: Path, choices: Path, tmp_path: Path
) -> None:
    margin = torch.tensor([0.7, -0.3], requires_grad=True)
    label = PairLabel(torch.tensor([0.5, 0.5]), torch.tensor([True, True]), torch.zeros(2))
    losses = soft(RewardOutput(margin), RewardOutput(torch.zeros(2)), label)
    losses.sum().backward()
    assert bool((margin.grad.sign() == margin.sign()).all()) and bool((losses > 0).all())  # type: ignore[union-attr]
    equal = RewardOutput(torch.zeros(2))
    assert soft(equal, equal, label).tolist() == pytest.approx([0, 0], abs=1e-7)

    objective, data = objective_of(tiny(sd3, choices, tmp_path / "a"))
    batch = collate([data.train[i] for i in range(3)], 0)
    batch |= {"weight": torch.tensor([1.0, 0.5, 0.5]), "probability": torch.tensor([1.0, 0.0, 0.5])}
    with torch.no_grad():
        m = objective._raw(batch)[0].view(-1, 2) @ torch.tensor([1.0, -1.0])
        found = objective(batch)["loss"]
    tie = math.log(math.cosh(m[2].item() / 2))  # cross-entropy of a tie, less log 2
    by_hand = (math.log1p(math.exp(-m[0])) + 0.5 * math.log1p(math.exp(m[1])) + 0.5 * tie) / 2
    assert found.item() == pytest.approx(by_hand, rel=1e-5) and objective.weight(batch) == 2


def test_noise_belongs_to_the_pair_and_the_epoch(sd3: Path, choices: Path, tmp_path: Path) -> None:
    objective, data = objective_of(tiny(sd3, choices, tmp_path / "a"))
    items = [data.train[i] for i in range(4)]
    with torch.no_grad():
        together = objective._raw(collate(items, 3))[0]
        alone = torch.cat([objective._raw(collate([item], 3))[0] for item in items])
        later = objective._raw(collate(items, 4))[0]
    assert torch.allclose(together, alone, rtol=0, atol=1e-5) and not torch.allclose(together, later, atol=1e-3)


def test_a_pair_and_its_mirror_image_have_one_loss(sd3: Path, choices: Path, tmp_path: Path) -> None:
    objective, data = objective_of(tiny(sd3, choices, tmp_path / "a"))
    batch = {**collate([data.train[i] for i in range(4)], 0), "level": len(objective.table) - 1}  # next to no noise
    mirror = {**batch, "first": batch["second"], "second": batch["first"]}
    a, b = objective(batch)["scores"], objective(mirror)["scores"]
    assert torch.allclose(a[:, 0] - a[:, 1], b[:, 1] - b[:, 0], atol=0.05)


def test_scores_that_do_not_vary_are_noticed(
    sd3: Path, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = training.build_model

    def dead(pipe: Any, config: RewardConfig) -> Any:
        drm = real(pipe, config)
        torch.nn.init.zeros_(drm.head.score_mlp[0].weight)
        torch.nn.init.zeros_(drm.head.score_mlp[0].bias)
        drm.head.requires_grad_(False)
        return drm

    monkeypatch.setattr(training, "build_model", dead)
    with pytest.warns(UserWarning, match="scores of all held-out images are equal"):
        report = train_reward(tiny(sd3, choices, tmp_path / "a", steps=2, evaluate_every=1))
    assert report["warnings"] == ["the scores of all images are equal"]
    assert {level["accuracy"] for level in report["levels"]} == {0.5}, "equal scores are half right"


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_mixed_precision_trains_float32_weights(precision: Any, sd3: Path, choices: Path, tmp_path: Path) -> None:
    config = tiny(sd3, choices, tmp_path / precision, steps=2, precision=precision, dtype="bfloat16")
    report = train_reward(config)
    kept = load_file(config.out / "checkpoint-000002/objective.safetensors")
    assert {t.dtype for n, t in kept.items() if "buffer" not in n and "pos_embed.pos_embed" not in n} == {
        torch.float32
    }, kept.keys()
    assert all(math.isfinite(level["loss"]) for level in report["levels"])


def test_batches_that_processes_cannot_share_and_missing_trackers_are_refused_at_once(tmp_path: Path) -> None:
    config = RewardConfig(tmp_path, "/no/such/pipeline", data=DataConfig("x.csv"), batch_size=7)
    with pytest.raises(
        UsageError, match="batch_size=7 pairs cannot be shared by 2 processes; the nearest that can is 8"
    ):
        require_run(config, 2)
    with pytest.raises(UsageError, match="no tracker 'excel'; choose one of"):
        train_reward(replace(config, report_to=("excel",)))
    with pytest.raises(UsageError, match="the tracker 'wandb' is not installed"):
        train_reward(replace(config, report_to=("wandb",)))
    with pytest.raises(UsageError, match="nothing to train on"):
        train_reward(RewardConfig(tmp_path))


def test_seven_pairs_last_for_any_number_of_steps(sd3: Path, tmp_path: Path) -> None:
    data = write_choices(tmp_path / "data", count=7)
    config = tiny(
        sd3, data, tmp_path / "a", steps=20, batch_size=2, save_every=20, evaluate_every=20,
        data=DataConfig(str(data), side=32, held_out_fraction=0.0),
    )  # fmt: skip
    train_reward(config)
    assert len([e for e in log(config.out) if "loss" in e]) == 20
    epochs = replace(config, out=tmp_path / "b", steps=None, epochs=2.0)
    assert train_reward(epochs)["steps"] == 8, "two passes of four batches, the last of them of one pair"


def test_a_size_that_does_not_suit_the_pipeline_is_refused(sd3: Path, choices: Path, tmp_path: Path) -> None:
    config = tiny(sd3, choices, tmp_path / "a")
    with pytest.raises(UsageError, match="images of 34 x 34 pixels do not suit"):
        train_reward(replace(config, data=replace(config.data, side=34)))


def test_broken_pairs_are_counted_and_left_out(sd3: Path, tmp_path: Path) -> None:
    data = write_choices(tmp_path / "data", count=10)
    images = tmp_path / "data/images"
    (images / "0_0.png").unlink()
    (images / "1_1.png").write_bytes(b"no image")
    shutil.copy(images / "2_0.png", images / "2_1.png")
    config = tiny(sd3, data, tmp_path / "a", steps=1, data=DataConfig(str(data), side=32, held_out_fraction=0.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = train_reward(config)
    assert report["data"]["pairs"] == 7
    assert report["data"]["skipped"] == {"missing file": 1, "not an image": 1, "identical images": 1}
    assert "1 missing file" in (config.out / "README.md").read_text()


def test_trackers_are_told_by_name(sd3: Path, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, dict[str, float]]] = []

    class Tracker(tracking.GeneralTracker):
        name = "tensorboard"
        requires_logging_directory = True
        tracker = None

        def __init__(self, run_name: str, logging_dir: Any, **options: Any) -> None:
            super().__init__()
            assert run_name == "mine" and Path(logging_dir) == tmp_path / "a"

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            assert values["optimizer.lr"] == 3e-3

        def log(self, values: dict[str, float], step: int, **options: Any) -> None:
            told.append((step, values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Tracker)
    monkeypatch.setattr(tracking, "_available_trackers", [LoggerType.TENSORBOARD])
    config = tiny(sd3, choices, tmp_path / "a", steps=3, report_to=("tensorboard",), project="mine")
    train_reward(config)
    assert [{"step": step, **values} for step, values in told] == log(config.out)
    assert {"loss", "lr"} <= told[0][1].keys() and "evaluation/mean_accuracy" in told[-1][1]


def test_a_finished_model_is_uploaded_and_a_failed_upload_is_no_failed_run(
    sd3: Path, choices: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny(sd3, choices, tmp_path / "a", steps=1, push_to_hub="me/drm", private=True)
    with pytest.warns(UserWarning, match="could not be uploaded to me/drm"):
        monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
        train_reward(config)
    asked: dict[str, Any] = {}

    class Repo:
        repo_id = "me/drm"

    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, name, **options: asked.update(options) or Repo()
    )
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda self, **options: asked.update(options))
    train_reward(config)
    assert asked["private"] and asked["repo_id"] == "me/drm"
    assert set(asked["allow_patterns"]) == {
        "config.json",
        "model.safetensors",
        "README.md",
        "accuracy.png",
        "report.json",
    }


def refuse(*args: Any, **options: Any) -> None:
    raise OSError("no route to the hub")


@pytest.mark.parametrize(
    ("loss", "model"),
    [
        (LossConfig("bradley-terry"), ModelConfig(blocks=1, head="pool")),
        (LossConfig("margin", margin=0.5), ModelConfig(blocks=1, head="drm", head_width=32, dropout=0.1)),
        (LossConfig("win-tie"), ModelConfig(blocks=1, adaptation="last-blocks")),
        (LossConfig("thurstone", noise=0.0, floor=0.01), ModelConfig(blocks=1, output="gaussian")),
        (
            LossConfig("fidelity"),
            ModelConfig(blocks=1, head="query", head_width=32, text_taps=("transformer_blocks.0",)),
        ),
        (LossConfig("ordinal", ratings="rating"), ModelConfig(blocks=1)),
        (LossConfig("oprm"), ModelConfig(blocks=1, ratings=(0.0, 1.0, 2.0))),
    ],
    ids=lambda value: getattr(value, "name", getattr(value, "head", "")),
)
@pytest.mark.slow
def test_losses_heads_and_outputs_train_and_are_kept(
    loss: LossConfig, model: ModelConfig, sd3: Path, choices: Path, tmp_path: Path
) -> None:
    config = tiny(sd3, choices, tmp_path / "a", loss=loss, model=model, steps=3)
    report = train_reward(config)
    assert all(math.isfinite(entry["loss"]) for entry in log(config.out) if "loss" in entry)
    assert report["model"]["output"] == config.output and report["model"]["head"] == model.head
    drm = DiffusionRewardModel.from_pretrained(config.out)
    scores = drm.score_images(torch.rand(2, 3, 32, 32), ["a red thing", "a blue thing"])
    assert scores.isfinite().all()
    if loss.name == "ordinal":
        assert drm.drm_config.ratings == (1.0, 2.0, 3.0, 4.0, 5.0)
        with pytest.raises(UsageError, match="loss.ratings='beauty' is no score of these data; they have rating"):
            train_reward(replace(config, out=tmp_path / "b", loss=LossConfig("ordinal", ratings="beauty")))


def test_settings_of_other_losses_and_outputs_are_refused() -> None:
    with pytest.raises(UsageError, match="the loss 'soft' has no margin; margin and win-tie have"):
        LossConfig(margin=1.0)
    with pytest.raises(UsageError, match="reads loss.ratings"):
        LossConfig("ordinal")
    with pytest.raises(UsageError, match="'oprm' needs model.output=ordinal; got scalar"):
        RewardConfig(loss=LossConfig("oprm"), model=ModelConfig(output="scalar"))
    with pytest.raises(UsageError, match="noise.std positive"):
        NoiseConfig("logit-normal", std=0.0)


def test_prompts_over_the_limit_are_said_once(sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = write_choices(tmp_path / "data", count=10)
    text = (
        table.read_text().replace("a red thing, number 0", "word " * 60).replace("a blue thing, number 1", "so " * 90)
    )
    table.write_text(text)
    train_reward(tiny(sd3, table, tmp_path / "a", steps=2, data=DataConfig(str(table), side=32, held_out_fraction=0.0)))
    assert capsys.readouterr().err.count("2 prompts have more than 256 tokens, the first at choices.csv, line") == 1

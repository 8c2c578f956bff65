"""Heads, outputs and adaptations: what a head reads, what learns, what is saved, over transformers and UNets."""

import json
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from rsm_guidance.core.contracts import UsageError
from rsm_guidance.engine import PipelineDenoiser
from rsm_guidance.reward_models import DiffusionRewardModel, DRMConfig
from rsm_guidance.reward_models.backbone import denoiser_of
from rsm_guidance.reward_models.blocks import block_names
from rsm_guidance.reward_models.ensemble import NoiseEnsemble
from rsm_guidance.reward_models.heads import HEADS, QueryHead, Widths
from rsm_guidance.reward_models.levels import level_table
from rsm_guidance.reward_models.outputs import OUTPUTS
from tests.reward_models.test_drm_families import NAMES, PROMPTS, call
from tests.zoo import ZOO

ADAPTATIONS = ("frozen", "lora", "last-blocks", "full")
UNREAD = ("add_q_proj", "norm_added_q", "to_add_out", "txt_mlp", "ff_context")
"""Parts of the names of a last joint block's layers on which only its text tokens depend, which are not read."""


def built(name: str, head: str, **options: Any) -> tuple[Any, DiffusionRewardModel, Tensor, Any]:
    """A tiny pipeline, a reward model over it whose tensors are all at random, latents and their grid."""
    pipe = ZOO[name].build()
    torch.manual_seed(0)
    queries = {"query": {"attention_heads": 2}, "drm": {"head_width": 32}}.get(head, {})
    drm = DiffusionRewardModel.from_pipeline(
        pipe, backbone="nobody/nothing", head=head, lora_rank=2, **(queries | options)
    )  # type: ignore[arg-type]
    with torch.no_grad(), closing(PipelineDenoiser(pipe, call(name))) as engine:
        x, grid = engine.initial(), engine.token_grid
        for tensor in drm.own_tensors().values():
            tensor.add_(0.05 * torch.randn(tensor.shape))
    return pipe, drm, x, grid


# --- what is saved ---


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "sd15"])
@pytest.mark.parametrize("head", HEADS)
def test_every_output_and_adaptation_is_saved_and_loaded_to_the_bit(name: str, head: str, tmp_path: Path) -> None:
    for output, adaptation in product(OUTPUTS, ADAPTATIONS):
        pipe, drm, x, grid = built(name, head, output=output, adaptation=adaptation)
        folder = tmp_path / f"{output}-{adaptation}"
        drm.save_pretrained(folder)
        again = DiffusionRewardModel.from_pretrained(folder, pipe=pipe)
        assert again.drm_config == drm.drm_config
        one, two = (m.judge(x, 300.0, PROMPTS, grid) for m in (drm, again))
        for a, b in ((one.mean, two.mean), (one.variance, two.variance), (one.log_probs, two.log_probs)):
            assert (a is None) == (b is None)
            assert a is None or b is None or (torch.equal(a, b) and a.isfinite().all())
        assert one.mean.shape == (2,) and (one.variance is None) == (output == "scalar")
        assert (one.log_probs is None) == (output != "ordinal")


@torch.no_grad()
def test_rounding_is_asked_for(tmp_path: Path) -> None:
    pipe, exact, _, _ = built("sd3", "conv", adaptation="full")
    rounded = DiffusionRewardModel.from_pipeline(pipe, backbone="a/b", half_precision=True)
    for name, tensor in rounded.own_tensors().items():
        tensor.copy_(exact.own_tensors()[name])
    exact.save_pretrained(tmp_path / "exact")
    rounded.save_pretrained(tmp_path / "half")
    sizes = [(tmp_path / n / "model.safetensors").stat().st_size for n in ("exact", "half")]
    assert sizes[1] < 0.6 * sizes[0]
    kept = load_file(tmp_path / "half" / "model.safetensors")
    assert all(torch.equal(kept[n], t.half()) for n, t in exact.own_tensors().items())


# --- what learns ---


@pytest.mark.parametrize("name", ["sd3", "sd15", "qwenimage"])
@pytest.mark.parametrize("adaptation", ADAPTATIONS)
@pytest.mark.parametrize("head", HEADS)
def test_the_gradient_reaches_what_the_adaptation_says(name: str, head: str, adaptation: str) -> None:
    pipe, drm, x, grid = built(name, head, adaptation=adaptation)
    drm.scorer(*drm.inputs(x, torch.tensor([200.0, 700.0]), PROMPTS, grid)).square().sum().backward()
    learned = {n for n, p in drm.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    tuned = {f"scorer.{n}" for n in drm.own_tensors()}
    assert learned <= tuned
    assert all(any(part in n for part in UNREAD) for n in tuned - learned), sorted(tuned - learned)
    assert all(p.grad is None for p in denoiser_of(pipe).parameters()), "the generator learns nothing"
    kept = block_names(denoiser_of(pipe))[: drm.drm_config.blocks]
    blocks = {kept_name for kept_name in kept if any(f"denoiser.{kept_name}." in n for n in learned)}
    assert blocks == {"frozen": set(), "lora": blocks, "last-blocks": set(kept[-1:]), "full": set(kept)}[adaptation]
    assert all("lora_" in n or ".head." in n for n in learned) == (adaptation in ("frozen", "lora"))
    if head == "drm" and adaptation in ("last-blocks", "full"):
        assert any("proj_out" in n or "conv_out" in n for n in learned), "output layers come after the last block"


def test_a_frozen_trunk_keeps_no_activations() -> None:
    _, drm, x, grid = built("sd3", "pool", adaptation="frozen")
    tokens = drm.scorer.read(*drm.inputs(x, 300.0, PROMPTS, grid)).tokens
    assert not tokens.requires_grad
    tokens = drm.scorer.read(*drm.inputs(x.requires_grad_(), 300.0, PROMPTS, grid)).tokens
    assert tokens.requires_grad, "but guidance goes through it"


def test_more_last_blocks_than_there_are_and_a_lora_without_layers_are_refused() -> None:
    pipe = ZOO["sd3"].build()
    with pytest.raises(UsageError, match="tuned_blocks is 3, of 2 blocks kept"):
        DiffusionRewardModel.from_pipeline(pipe, adaptation="last-blocks", tuned_blocks=3)
    with pytest.raises(UsageError, match="none is named to_nowhere"):
        DiffusionRewardModel.from_pipeline(pipe, adaptation="lora", lora_targets=("to_nowhere",))


def test_alpha_scales_the_lora() -> None:
    pipe, drm, x, grid = built("sd3", "pool", adaptation="lora", lora_alpha=6)
    half = DiffusionRewardModel(pipe, DRMConfig(**{**vars(drm.drm_config), "lora_alpha": 0}))
    with torch.no_grad():
        for name, tensor in half.own_tensors().items():
            tensor.copy_(drm.own_tensors()[name] * (3 if "lora_B" in name else 1))  # 6 / 2 against 2 / 2
        assert torch.allclose(drm.score(x, 300.0, PROMPTS, grid), half.score(x, 300.0, PROMPTS, grid), atol=1e-5)


# --- what a head reads ---


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "sd15", "flux", "sana", "zimage", "wan", "qwenimage"])
def test_with_all_blocks_the_drms_head_reads_the_denoisers_own_output(name: str) -> None:
    pipe = ZOO[name].build()
    names = block_names(denoiser_of(pipe))
    drm = DiffusionRewardModel.from_pipeline(pipe, backbone="a/b", head="drm", blocks=len(names), adaptation="frozen")
    with closing(PipelineDenoiser(pipe, call(name))) as engine:
        x, grid = engine.initial(), engine.token_grid
    arguments, _ = drm.inputs(x, 500.0, PROMPTS, grid)
    output = denoiser_of(pipe)(**arguments)
    output = output[0] if isinstance(output, tuple) else output
    output = torch.stack(list(output)) if isinstance(output, list) else output
    tokens, (rows, columns) = drm.features(x, 500.0, PROMPTS, grid)
    expected = output if output.ndim == 3 else output.flatten(2).transpose(1, 2)
    assert torch.allclose(tokens, expected, atol=1e-5) and rows * columns == tokens.shape[1]


@torch.no_grad()
def test_a_cut_denoiser_ends_in_its_own_output_layers() -> None:
    """Hidden states of the last block kept, through norm_out and proj_out, unpatchified to the size of the latents."""
    pipe, drm, x, _ = built("sd3", "drm", adaptation="frozen", blocks=1)
    transformer, hidden, emb = pipe.transformer, [], []
    handles = [
        transformer.transformer_blocks[0].register_forward_hook(lambda m, a, out: hidden.append(out[1])),
        transformer.time_text_embed.register_forward_hook(lambda m, a, out: emb.append(out)),
    ]
    arguments, _ = drm.inputs(x, 500.0, PROMPTS)
    transformer(**arguments)
    for handle in handles:
        handle.remove()
    patches = transformer.proj_out(transformer.norm_out(hidden[0], emb[0]))
    patch, side, channels = transformer.config.patch_size, x.shape[-1], transformer.out_channels
    cells = patches.reshape(2, side // patch, side // patch, patch, patch, channels)
    plane = torch.einsum("nhwpqc->nchpwq", cells).reshape(2, channels, side, side)
    tokens, grid = drm.features(x, 500.0, PROMPTS)
    assert grid == (side, side) and torch.allclose(tokens, plane.flatten(2).transpose(1, 2), atol=1e-5)


@torch.no_grad()
def test_the_papers_head_has_the_papers_layers() -> None:
    """3.8 million parameters at 16 channels; a score by functional calls is the head's."""
    config = DRMConfig(head="drm", head_width=256, dropout=0.1)
    torch.manual_seed(0)
    head = HEADS["drm"](Widths((16,)), config).eval()
    assert 3.7e6 < sum(p.numel() for p in head.parameters()) < 3.9e6
    plane = torch.randn(2, 16, 64, 64)
    w = dict(head.named_parameters())
    x = plane
    for i in (0, 3, 6):
        x = F.conv2d(x, w[f"conv.{i}.weight"], w[f"conv.{i}.bias"], stride=2, padding=1)
        x = F.group_norm(x, 32, w[f"conv.{i + 1}.weight"], w[f"conv.{i + 1}.bias"]).relu()
    assert x.shape == (2, 512, 8, 8)
    x = F.linear(x.mean((2, 3)), w["score_mlp.0.weight"], w["score_mlp.0.bias"]).relu()
    expected = F.linear(x, w["score_mlp.3.weight"], w["score_mlp.3.bias"])
    assert torch.allclose(head(plane.flatten(2).transpose(1, 2), (64, 64)), expected, atol=1e-5)
    head.train()
    torch.manual_seed(0)
    assert not torch.equal(head(plane.flatten(2).transpose(1, 2), (64, 64)), expected), "dropout is for training"


@torch.no_grad()
def test_where_a_token_stands_matters_to_convolutions_alone() -> None:
    widths, order = Widths((8, 8), (), 8), torch.randperm(36, generator=torch.Generator().manual_seed(1))
    tokens, embedding = torch.randn(2, 36, 16), torch.randn(2, 8)
    for name, cls in HEADS.items():
        torch.manual_seed(0)
        head = cls(widths, DRMConfig(head=name, head_width=32, attention_heads=2)).eval()  # type: ignore[arg-type]
        one, two = (head(t, (6, 6), (), embedding) for t in (tokens, tokens[:, order]))
        assert torch.allclose(one, two, atol=1e-5) == (name in ("pool", "query")), name


def reference_query_head(
    w: dict[str, Tensor], image: list[Tensor], text: list[Tensor], emb: Tensor, eps: float
) -> Tensor:
    """The head of DiNa-LRM by the names of its weights, written from the description, one attention head at a time."""

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def rms(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.weight"]

    def silu(x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    def gathered(kind: str, streams: list[Tensor]) -> Tensor:
        out = []
        for i, x in enumerate(streams):
            at = f"layer_adapters_{kind}.{i}"
            gamma, beta = linear(silu(linear(emb, f"{at}.cond_mlp.0")), f"{at}.cond_mlp.2").chunk(2, -1)
            x = linear(x, f"{at}.proj_in") if f"{at}.proj_in.weight" in w else x
            out.append(linear(x * (1 + gamma[:, None]) + beta[:, None] + w[f"{at}.layer_embed"], f"{at}.proj"))
        return linear(torch.cat(out, -1), f"agg_{kind}")

    def attend(at: str, q: Tensor, tokens: Tensor, kind: str, heads: int) -> Tensor:
        tokens = rms(tokens, f"{at}.norm_{kind[0]}")
        k, v = linear(tokens, f"{at}.to_k_{kind}"), linear(tokens, f"{at}.to_v_{kind}")
        if f"{at}.gate_{kind}.0.weight" in w:
            gate = linear(silu(linear(tokens, f"{at}.gate_{kind}.0")), f"{at}.gate_{kind}.2")
            v = v / (1 + (-gate).exp())
        width = q.shape[-1] // heads
        parts = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            weights = (q[..., part] @ k[..., part].transpose(1, 2) / width**0.5).softmax(-1)
            parts.append(weights @ v[..., part])
        return torch.cat(parts, -1)

    seen = gathered("visual", image)
    read = gathered("text", text) if text else None
    queries = w["query_tokens"].expand(len(emb), -1, -1)
    for at in ("attn1", "attn2"):
        q = linear(rms(queries, f"{at}.norm_q"), f"{at}.to_q")
        answer = attend(at, q, seen, "vis", 2)
        if at == "attn1" and read is not None:
            answer = answer + attend(at, q, read, "text", 2)
        queries = queries + linear(answer, f"{at}.to_out.0")
    queries = queries + linear(F.gelu(linear(rms(queries, "norm_ff"), "ff.0")), "ff.2")
    return linear(queries, "head").mean(1)


@torch.no_grad()
@pytest.mark.parametrize("text", [(), (12, 16)])
def test_the_query_head_is_what_its_description_says(text: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    config = DRMConfig(head="query", head_width=16, attention_heads=2, norm_eps=0.01, queries=3)
    head = QueryHead(Widths((16, 8), text, 6), config).double()
    for p in head.parameters():
        p.add_(0.3 * torch.randn(p.shape))
    image = [torch.randn(2, 9, d).double() for d in (16, 8)]
    words, emb = [torch.randn(2, 5, d).double() for d in text], torch.randn(2, 6).double()
    raw = head(torch.cat(image, -1), (3, 3), tuple(words), emb)
    expected = reference_query_head(dict(head.named_parameters()), image, words, emb, 0.01)
    assert raw.shape == (2, 1) and torch.allclose(raw, expected, atol=1e-12)


@torch.no_grad()
def test_a_fresh_query_head_is_not_modulated_and_has_its_gates_half_open() -> None:
    torch.manual_seed(0)
    head = QueryHead(Widths((8,), (), 6), DRMConfig(head="query", head_width=8, attention_heads=2))
    tokens = torch.randn(2, 9, 8)
    one, two = (head(tokens, (3, 3), (), torch.randn(2, 6)) for _ in range(2))
    assert torch.equal(one, two)
    assert head.attn1.gate_vis is not None and torch.equal(head.attn1.gate_vis(tokens), torch.zeros(2, 9, 1))


@torch.no_grad()
def test_precision_changes_the_query_heads_scores_by_rounding_alone() -> None:
    torch.manual_seed(0)
    head = QueryHead(Widths((8,), (), 6), DRMConfig(head="query", head_width=8, attention_heads=2, norm_eps=2.0**-7))
    tokens, emb = 0.03 * torch.randn(2, 64, 8), torch.randn(2, 6)  # small, so that an epsilon counts
    wide = head(tokens, (8, 8), (), emb)
    narrow = head.bfloat16()(tokens.bfloat16(), (8, 8), (), emb.bfloat16())
    assert torch.allclose(wide, narrow.float(), atol=0.02)


@pytest.mark.parametrize(
    "name", [n for n in NAMES if n not in ("sd15_lcm", "sd15_img2img", "sdxl_turbo", "sdxl_img2img")]
)
def test_heads_score_every_family(name: str) -> None:
    """Scores are finite, differ by prompt, and lead gradients back to the latents; text tokens are read where there are any."""
    pipe = ZOO[name].build()
    names = [n for n in block_names(denoiser_of(pipe)) if not n.startswith("down")]
    assert len(level_table(pipe.scheduler)) == 1000
    with torch.no_grad(), closing(PipelineDenoiser(pipe, call(name))) as engine:
        x, grid = engine.initial(), engine.token_grid
    for head in ("drm", "query", "pool"):
        if head == "query" and name == "chroma":
            with pytest.raises(UsageError, match="embedding of the noise level"):
                DiffusionRewardModel.from_pipeline(pipe, head="query", attention_heads=2)
            continue
        taps = tuple(names[:2]) if head != "drm" else ()
        drm = DiffusionRewardModel.from_pipeline(
            pipe,
            backbone="a/b",
            head=head,
            taps=taps,
            adaptation="frozen",
            attention_heads=2,  # type: ignore[arg-type]
        )
        latents = x.clone().requires_grad_()
        scores = drm.score(latents, torch.tensor([200.0, 700.0]), PROMPTS, grid)
        (gradient,) = torch.autograd.grad(scores.sum(), latents)
        assert scores.isfinite().all() and gradient.isfinite().all() and gradient.abs().sum() > 0
        assert (scores != drm.score(latents, torch.tensor([200.0, 700.0]), PROMPTS[::-1], grid)).all()


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd3", "flux", "flux2_klein", "qwenimage"])
def test_text_tokens_are_those_of_the_joint_block(name: str) -> None:
    pipe = ZOO[name].build()
    tap = "transformer_blocks.0"
    drm = DiffusionRewardModel.from_pipeline(
        pipe, backbone="a/b", head="query", taps=(tap,), text_taps=(tap,), adaptation="frozen", attention_heads=2
    )
    with closing(PipelineDenoiser(pipe, call(name))) as engine:
        x, grid = engine.initial(), engine.token_grid
    seen: list[Any] = []
    denoiser_of(pipe).get_submodule(tap).register_forward_hook(lambda m, a, out: seen.append(out))
    inputs = drm.inputs(x, 500.0, PROMPTS, grid)
    seen.clear()
    features = drm.scorer.read(*inputs)
    text, image = seen[0]
    assert torch.equal(features.text[0], text) and torch.equal(features.tokens, image)
    assert features.embedding is not None and features.embedding.shape == (2, drm.trunk.widths.embedding)
    assert features.text[0].shape[1] != features.tokens.shape[1]


def test_what_cannot_be_read_is_refused() -> None:
    sd15, sd3 = ZOO["sd15"].build(), ZOO["sd3"].build()
    make = DiffusionRewardModel.from_pipeline
    with pytest.raises(UsageError, match=r"a UNet has after its last block only: keep all 5 blocks"):
        make(sd15, head="drm", blocks=3)
    with pytest.raises(UsageError, match="drop taps"):
        make(sd3, head="drm", taps=("transformer_blocks.0",))
    with pytest.raises(UsageError, match="puts out no text tokens"):
        make(sd15, head="query", text_taps=("mid_block",), taps=("mid_block",), attention_heads=2)
    with pytest.raises(UsageError, match=r"transformer_blocks.1 .* puts out no text tokens"):
        make(sd3, head="query", text_taps=("transformer_blocks.1",), attention_heads=2)
    with pytest.raises(UsageError, match="reads no text tokens"):
        make(sd3, head="pool", text_taps=("transformer_blocks.0",))
    with pytest.raises(UsageError, match="splits neither into 8"):
        make(sd3, head="query", head_width=12)
    with pytest.raises(UsageError, match="no setting 'querys'"):
        make(sd3, head="query", querys=4)
    for field, value in (("head", "cnn"), ("output", "class"), ("adaptation", "half")):
        with pytest.raises(UsageError, match=f"unknown {field} '{value}'; choose"):
            make(sd3, **{field: value})  # type: ignore[arg-type]
    for field, bad in (
        ("ratings", (1.0,)),
        ("ratings", (2.0, 1.0)),
        ("image_levels", (1.5,)),
        ("score_std", 0.0),
        ("queries", 0),
    ):
        with pytest.raises(UsageError, match=field.replace("score_std", "positive deviation")):
            make(sd3, **{field: bad})  # type: ignore[arg-type]


def test_settings_of_other_kinds_are_refused() -> None:
    wrong: dict[str, Any] = {
        "taps": "mid_block", "ratings": "12", "image_levels": 0.1, "blocks": 2.0, "lora_rank": True, "norm_eps": "1e-6",
        "half_precision": 1, "backbone": None, "lora_targets": [1],
    }  # fmt: skip
    for field, value in wrong.items():
        with pytest.raises(UsageError, match=f"{field} must be .*; got"):
            DRMConfig(**{field: value})
    assert DRMConfig(taps=["mid_block"], score_mean=1).taps == ("mid_block",)  # type: ignore[arg-type]


# --- checkpoints that do not fit ---


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    pipe, drm, _, _ = built("sd3", "pool", adaptation="lora")
    drm.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    tensors, settings = load_file(weights), json.loads(config.read_text())

    def load(changed: dict[str, Tensor] | None = None, **fields: Any) -> str:
        save_file(tensors if changed is None else changed, weights)
        config.write_text(json.dumps(settings | fields))
        with pytest.raises(UsageError) as refused:
            DiffusionRewardModel.from_pretrained(tmp_path, pipe=pipe)
        return str(refused.value)

    assert "unknown: head.extra" in load(tensors | {"head.extra": torch.zeros(1)})
    without = {k: v for k, v in tensors.items() if k != "head.mlp.0.bias"}
    assert "missing: head.mlp.0.bias" in load(without)
    said = load(lora_rank=4)
    assert "another rank" in said and "lora_A.default.weight (2x32 for 4x32)" in said and "more" in said
    said = load(head_width=8)
    assert "made for another backbone, other taps or another width" in said
    assert "'frobnicate'" in load(frobnicate=1) and "does not say the blocks" in load_without(settings, "blocks", load)


def load_without(settings: dict[str, Any], key: str, load: Any) -> str:
    value = settings.pop(key)
    said: str = load()
    settings[key] = value
    return said


@pytest.mark.parametrize("adaptation", ["frozen", "full"])
def test_a_head_for_another_backbone_is_refused(adaptation: str, tmp_path: Path) -> None:
    """By the denoiser's class, also where all shapes fit; and by shapes where the class is the same."""
    _, drm, _, _ = built("pixart_alpha", "pool", adaptation=adaptation)
    drm.save_pretrained(tmp_path)
    with pytest.raises(
        UsageError, match="made for the PixArtTransformer2DModel of 'nobody/nothing'.* a SanaTransformer2DModel"
    ):
        DiffusionRewardModel.from_pretrained(tmp_path, pipe=ZOO["sana"].build())
    wider = ZOO["pixart_alpha"].build()
    settings = {**wider.transformer.config, "num_attention_heads": 4}
    wider.register_modules(transformer=type(wider.transformer).from_config(settings))
    with pytest.raises(UsageError, match=r"of another shape: head.mlp.0.weight \(16 for 32\).*another backbone"):
        DiffusionRewardModel.from_pretrained(tmp_path, pipe=wider)


@torch.no_grad()
def test_nothing_is_copied_of_a_checkpoint_that_does_not_fit() -> None:
    from rsm_guidance.reward_models.checkpoint import copy_tensors

    own = {"a": torch.zeros(2), "b": torch.zeros(3)}
    with pytest.raises(UsageError, match="b \\(1 for 3\\)"):
        copy_tensors({"a": torch.ones(2), "b": torch.ones(1)}, own, "here")
    assert not own["a"].any()


# --- calls ---


def test_arguments_of_other_kinds_are_refused() -> None:
    _, drm, x, _ = built("sd3", "pool", adaptation="full")
    images = torch.rand(2, 3, 32, 32)
    for call_of in (drm, lambda samples, prompts: drm.score(samples, 0.0, prompts)):
        for samples, prompts in ((PROMPTS, images), (images.byte(), PROMPTS), (images, "ab"), (images, [1, 2])):
            with pytest.raises(TypeError, match="takes .* as a tensor of real numbers|list of one string"):
                call_of(samples, prompts)
    with pytest.raises(UsageError, match="1 prompts need 1 images"):
        drm(images, ["a"])


def test_scores_carry_a_graph_where_the_latents_ask_for_one() -> None:
    _, drm, x, _ = built("sd3", "pool", adaptation="full")
    assert not drm.score(x, 300.0, PROMPTS).requires_grad
    assert not drm.judge_clean(x, PROMPTS, noise=NoiseEnsemble((0.2,))).mean.requires_grad
    assert drm.score(x.requires_grad_(), 300.0, PROMPTS).requires_grad
    assert drm.scorer(*drm.inputs(x.detach(), 300.0, PROMPTS)).requires_grad, "the way to train"


@torch.no_grad()
@pytest.mark.parametrize("head", HEADS)
def test_half_precision_scores_by_rounding_alone(head: str) -> None:
    _, drm, x, _ = built("sd3", head, adaptation="full", head_width=32)
    wide = drm.score(x, 300.0, PROMPTS)
    narrow = drm.bfloat16().score(x, 300.0, PROMPTS)
    assert torch.allclose(wide, narrow.float(), atol=0.1 * float(wide.abs().max()) + 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_lora_over_a_half_precision_backbone_learns_in_full_precision(dtype: torch.dtype) -> None:
    for name, head in product(("sd3", "sd15"), ("drm", "query")):
        pipe = ZOO[name].build().to(dtype)
        queries = {"attention_heads": 2} if head == "query" else {"head_width": 32}
        drm = DiffusionRewardModel.from_pipeline(pipe, backbone="a/b", head=head, adaptation="lora", **queries)  # type: ignore[arg-type]
        with torch.no_grad(), closing(PipelineDenoiser(pipe, call(name))) as engine:
            x = engine.initial()
        drm.scorer(*drm.inputs(x, 300.0, PROMPTS)).sum().backward()
        tuned = [p for n, p in drm.trunk.named_parameters() if "lora_B" in n]
        assert drm.trunk_dtype == dtype and all(p.dtype == torch.float32 for p in tuned)
        assert all(p.grad is not None and p.grad.isfinite().all() for p in tuned)
        assert sum(float(p.grad.abs().sum()) for p in tuned if p.grad is not None) > 0

"""Configurations: presets read and come back, and what has no meaning is refused with its reason."""

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from rsm_guidance.core.errors import UsageError
from rsm_guidance.io.config import build_config
from rsm_guidance.training.alignment import settings
from rsm_guidance.training.alignment.config import AlignConfig, CallConfig
from rsm_guidance.training.alignment.read import merge, preset, presets, read_align
from tests.training.alignment.worlds import chosen, nested

NAMES = """step-grpo flow-grpo flow-grpo-fast mix-grpo dance-grpo tempflow-grpo grpo-guard branch-grpo dense-grpo tp-grpo vgpo
dynamic-tree-rpo ddpo rsm-zeroth diffusion-nft awm crd ram gdro dpo flow-dpo rwr raft p-graft prdp lpo gardo""".split()


def test_every_preset_of_the_list_is_there() -> None:
    assert sorted(NAMES) == sorted(presets())


@pytest.mark.parametrize("name", NAMES)
def test_presets_read_and_come_back(name: str, tmp_path: Path) -> None:
    text = presets()[name]
    assert len(text.splitlines()) <= 20
    config = read_align(name=name, options=chosen(name))
    assert config.method.paper and config.method.source and config.method.ours

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(inner) for key, inner in value.items()}
        return (
            [plain(v) for v in value] if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value
        )

    path = tmp_path / "resolved.yaml"
    path.write_text(yaml.safe_dump(plain(asdict(config))))
    assert read_align(path) == config


@pytest.mark.parametrize("name", [n for n in NAMES if preset(n).get("required")])
def test_presets_ask_for_what_is_published_nowhere(name: str) -> None:
    with pytest.raises(UsageError, match=preset(name)["required"][0]):
        read_align(name=name)


def test_a_file_over_a_preset(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("preset: ram\nform: {temperature: 0.5, levels: 3}\nepochs: 7\n")
    config = read_align(path, options={"epochs": 9})
    assert (config.form.temperature, config.epochs, config.trust.reference) == (0.5, 9, "velocity")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("preset: [ram]", "no preset"),
        ("form: ram", "form"),
        ("required: 5", "required"),
        ("- 1", "mapping"),
        ("a: [", "YAML"),
    ],
)
def test_files_that_make_no_sense_are_one_sentence(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        read_align(path)


SDE = {"rollout": {"kind": "sde", "group": 4}}
REFUSED = [
    ({"rollout": {"kind": "ode"}}, "rollout.kind='ode' draws none"),
    ({"rollout": {"kind": "sde", "transition": "flow_sde 0"}}, "draws none: raise its level"),
    ({"rollout": {"kind": "sde", "transition": "ode"}}, "rollout.transition is"),
    ({"rollout": {"kind": "sde", "group": 1}}, "group of 1"),
    (
        {
            "rollout": {"kind": "branches", "children": [4, 1, 4]},
            "estimator": {"name": "branch-group"},
            "advantage": {"by": ["seed", "step"]},
        },
        "group of 1",
    ),
    (SDE | {"estimator": {"name": "reward-gradient"}}, "first order"),
    (
        {"rollout": {"kind": "sde", "transition": "cps 0.8"}, "time": {"weight": "guard"}, "trust": {"region": "ratio", "clip": 1e-4}},
        "flow SDE",
    ),
    (
        {"rollout": {"kind": "sde", "transition": "ddim 1"}, "time": {"weight": "guard-unscaled"}, "trust": {"region": "ratio", "clip": 1e-4}},
        "flow SDE",
    ),
    (SDE | {"time": {"weight": "guard"}}, "needs trust.region"),
    (SDE | {"time": {"weight": "fair-clip-2"}, "trust": {"region": "ratio", "clip": 1e-4}}, "hinge"),
    (
        SDE | {"estimator": {"name": "process-value", "discount": 0.9, "ratio": True}, "advantage": {"by": ["prompt", "step"]}},
        "mixed sign",
    ),
    (SDE | {"beta": 0.04}, "different things"),
    (SDE | {"trust": {"kl": 0.04}}, "different things"),
    (SDE | {"form": {"name": "reverse", "kl_beta": 1}}, "different things"),
    (SDE | {"trust": {"reference_weight": 0.04}}, "go together"),
    (SDE | {"trust": {"reference": "mean", "reference_weight": 0.04}}, "denominator"),
    (SDE | {"trust": {"region": "ratio"}}, "go together"),
    (SDE | {"estimator": {"name": "immediate"}}, "candidates"),
    (SDE | {"estimator": {"name": "completion-difference"}}, "not comparable"),
    (SDE | {"advantage": {"by": ["step"]}}, "prompts are not comparable"),
    ({"form": {"name": "nft"}}, "form.nft_strength"),
    ({"form": {"name": "nft", "nft_strength": 1.0, "temperature": 1.0}}, "has no temperature"),
    ({"form": {"name": "nft", "nft_strength": 1.0}, "time": {"weight": "tempflow"}}, "log-ratios of steps"),
    ({"form": {"name": "nft", "nft_strength": 1.0}, "trust": {"region": "hinge", "clip": 1e-4}}, "log-ratios of steps"),
    ({"form": {"name": "awm"}}, "collapses"),
    ({"form": {"name": "orw", "reward_strength": 0.5}}, "held to the reference"),
    ({"form": {"name": "raft", "keep": 24}}, "selects nothing"),
    (
        {"form": {"name": "rvm"}, "trust": {"reference": "mean", "denominator": "one", "reference_weight": 1.0}},
        "trust.reference='velocity'",
    ),
    ({"rollout": {"kind": "data", "data": "groups.jsonl"}, "form": {"name": "awm"}, "trust": {"region": "ratio", "clip": 1.0}}, "on policy"),
    (SDE | {"rollout": {"kind": "window"}}, "needs it"),
    (SDE | {"colour": 1}, "no option 'colour'"),
    (SDE | {"rollout": {"kind": "sde", "childrn": [2]}}, "did you mean 'rollout.children'"),
    (SDE | {"trust": {"gate": 0.1}}, "hold to the reference"),
    ({"rollout": {"kind": "tree", "steps": 3, "children": [2, 2, 2]}}, "last of 3 steps"),
    ({"rollout": {"kind": "window", "steps": 5, "window": [4, 1]}}, "last of 5 steps"),
    (
        {"rollout": {"kind": "data", "data": "groups.jsonl"}, "form": {"name": "dpo", "implicit_strength": 1.0}, "trust": {"norm_weight": 1.0}},
        "by form.implicit_strength",
    ),
    (SDE | {"reward_weights": [1.0, 2.0]}, "2 weights for 1"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "says"), REFUSED, ids=[says for _, says in REFUSED])
def test_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as error:
        read_align(options=options)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_unknown_preset_lists_the_known() -> None:
    with pytest.raises(UsageError, match="flow-grpo"):
        read_align(name="grpo")


def test_a_denominator_is_not_the_exact_divergence_by_chance() -> None:
    """Equal settings but for the denominator are different configurations, both of which name it."""
    base = SDE | {"trust": {"reference": "mean", "reference_weight": 0.04}}
    both = [
        build_config(AlignConfig, merge(base, nested("trust.denominator", d)), "x") for d in ("variance", "diffusion")
    ]
    assert both[0] != both[1]


def test_reads_without_torch() -> None:
    code = "import sys; from rsm_guidance.training.alignment.read import read_align; read_align(name='flow-grpo'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_old_policies_follow_by_their_schedule() -> None:
    old = read_align(name="diffusion-nft").old
    assert [old.decay(s) for s in (0, 100, 500, 9000)] == [0, 0.1, 0.5, 0.5]


def test_every_setting_is_read_by_some_code() -> None:
    folder = Path(settings.__file__).parent
    text = "\n".join(p.read_text() for p in folder.rglob("*.py") if p.name not in ("rules.py",))
    parts = [AlignConfig, *(type(v) for v in vars(AlignConfig()).values() if is_dataclass(v))]
    unread = [
        f"{part.__name__}.{f.name}"
        for part in parts
        for f in fields(part)
        if part is not CallConfig and f.name != "reward_sign" and not re.search(rf"\.{f.name}\b", text)
    ]
    assert not unread, "CallConfig is handed on whole; the sign is a promise, that `value_ratio` checks"

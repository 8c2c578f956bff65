"""Imports go down only (the layers of the architecture, from the bottom up)."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "rsm_guidance"
LAYERS = ("core", "shapes", "engine", "rewards", "values", "samplers", "pipelines", "evaluation", "training", "cli")
SIDE_BY_SIDE = {("pipelines", "training"), ("evaluation", "training")}  # neither may import the other


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_imports_go_down_only() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).parts
        if len(parts) == 1 or parts[0] not in LAYERS:
            continue
        for module in imports_of(path):
            names = module.split(".")
            if names[0] != "rsm_guidance":
                continue
            target = names[1] if len(names) > 1 else None
            if target is None or LAYERS.index(target) > LAYERS.index(parts[0]) or (target, parts[0]) in SIDE_BY_SIDE:
                wrong.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert not wrong


def test_core_and_samplers_know_no_diffusers() -> None:
    for layer in ("core", "samplers"):
        for path in (PACKAGE / layer).rglob("*.py"):
            assert not [m for m in imports_of(path) if m.split(".")[0] in ("diffusers", "transformers")], path


def test_nothing_required_needs_torchvision() -> None:
    assert not [p for p in PACKAGE.rglob("*.py") if any(m.startswith("torchvision") for m in imports_of(p))]

"""What importing the package and asking for help load: neither torch nor diffusers until they are needed."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rsm_guidance
from rsm_guidance.cli.main import COMMANDS

PACKAGE = Path(rsm_guidance.__file__).parent
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "matplotlib", "gradio"}
HELP = """
import json, sys
from rsm_guidance.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def loaded(code: str, *arguments: str) -> set[str]:
    """Top-level packages that a fresh process has loaded; what it prints last is a list of them."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def after(statement: str) -> set[str]:
    return loaded(
        f"import json, sys\n{statement}\nprint(json.dumps(sorted({{n.partition('.')[0] for n in sys.modules}})))"
    )


@pytest.mark.parametrize("command", ["", "data", "train", "benchmark", *COMMANDS])
def test_help_loads_neither_torch_nor_diffusers(command: str) -> None:
    assert not loaded(HELP, *command.split(), "--help") & HEAVY


def test_the_list_of_families_loads_neither_torch_nor_diffusers() -> None:
    assert not loaded(HELP, "families") & HEAVY


def test_importing_the_package_loads_neither_torch_nor_diffusers() -> None:
    assert not after("import rsm_guidance") & HEAVY
    assert not after("import rsm_guidance.io.config, rsm_guidance.io.names, rsm_guidance.pipelines") & HEAVY


@pytest.mark.parametrize(
    "module",
    ["core", "core.contracts", "core.transitions", "core.meter", "oracles.cases", "rewards", "rollouts", "samplers"],
)
def test_what_works_on_tensors_needs_no_diffusers(module: str) -> None:
    assert not after(f"import rsm_guidance.{module}") & {"diffusers", "transformers"}


def test_public_names_are_found_and_typed() -> None:
    for name in rsm_guidance.__all__:
        assert getattr(rsm_guidance, name) is not None
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text())
    imported = [n for n in ast.walk(stub) if isinstance(n, ast.ImportFrom) and str(n.module).startswith("rsm_guidance")]
    typed = {alias.asname or alias.name for node in imported for alias in node.names}
    typed |= {n.target.id for n in stub.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    assert typed - {"__version__"} == set(rsm_guidance.__all__)
    with pytest.raises(AttributeError, match="no attribute 'load_judge'"):
        _ = rsm_guidance.load_judge

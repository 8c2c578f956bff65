"""Experiments of this repository, run as scripts: `python -m benchmarks.NAME --help`.  Results are in benchmarks/results."""

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import tyro

from rsm_guidance.core.errors import UsageError
from rsm_guidance.io.files import require_writable

T = TypeVar("T")


def script(config: type[T], run: Callable[[T], dict[str, Any]], table: Callable[[dict[str, Any]], str]) -> None:
    """Run an experiment by options that are the fields of its configuration, and print its table; exits with 2 on bad input."""
    options: Any = tyro.cli(config)
    try:
        require_writable(options.out)
        print(table(run(options)))
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

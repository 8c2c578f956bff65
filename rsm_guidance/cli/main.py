"""`rsm-guidance`: the command line.  Exit code 2 and one sentence on bad input, 130 on Ctrl-C."""

import os
import sys
from collections.abc import Sequence
from typing import Any

_PROGRAM = "rsm-guidance"
_GROUPS = ("train", "benchmark")


def _parse(arguments: list[str]) -> Any:
    import tyro

    from rsm_guidance.cli.commands import Compare, Evaluate, Sample, Score
    from rsm_guidance.cli.families import Families

    if arguments and arguments[0] in _GROUPS:
        from rsm_guidance.cli.training import BENCHMARK, TRAIN, with_config

        group = arguments[0]
        commands: dict[str, Any] = TRAIN if group == "train" else BENCHMARK
        return tyro.extras.subcommand_cli_from_dict(
            commands, prog=f"{_PROGRAM} {group}", args=[*arguments[1:2], *with_config(arguments[2:])]
        )
    commands = {"sample": Sample, "compare": Compare, "score": Score, "evaluate": Evaluate, "families": Families}
    description = (
        "Reward guidance for diffusion and flow pipelines. Besides the commands below: "
        "`train reward` and `train base`; `benchmark samplers`, `judges`, `engine`, `values`, `exactness` and `branching`; "
        "each with --help."
    )
    return tyro.extras.subcommand_cli_from_dict(commands, prog=_PROGRAM, description=description, args=arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, 2 (bad input) or 130 (interrupted)."""
    sys.path.insert(0, os.getcwd())  # so that --reward my_module:function finds a module in this folder
    try:
        from transformers.utils import logging as transformers_logging

        transformers_logging.set_verbosity_error()
        transformers_logging.disable_progress_bar()
        from diffusers.utils import logging as diffusers_logging

        diffusers_logging.disable_progress_bar()
        _parse(list(sys.argv[1:] if arguments is None else arguments)).run()
    except (ValueError, OSError) as error:
        print(f"{_PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        kept = str(interrupt) or "before there was anything to keep"
        print(f"{_PROGRAM}: interrupted {kept}", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()

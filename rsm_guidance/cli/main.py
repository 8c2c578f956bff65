"""`rsm-guidance`: the command line.  Exit code 2 and one sentence on bad input, 130 on Ctrl-C.

Parsing loads neither torch nor diffusers: commands are dataclasses of plain types, and their `run` imports what it needs.
"""

import contextlib
import io
import itertools
import os
import pkgutil
import sys
from collections.abc import Sequence
from typing import Annotated, Any, NoReturn, Union

PROGRAM = "rsm-guidance"
COMMANDS = {
    "sample": "rsm_guidance.cli.sample:Sample",
    "compare": "rsm_guidance.cli.compare:Compare",
    "score": "rsm_guidance.cli.score:Score",
    "evaluate": "rsm_guidance.cli.evaluate:Evaluate",
    "families": "rsm_guidance.cli.families:Families",
    "rewards": "rsm_guidance.cli.rewards:Rewards",
    "data check": "rsm_guidance.cli.data:DataCheck",
    "train reward": "rsm_guidance.cli.train:TrainReward",
    "train base": "rsm_guidance.cli.train:TrainBase",
    "benchmark engine": "rsm_guidance.cli.benchmark:BenchmarkEngine",
    "benchmark values": "rsm_guidance.cli.benchmark:BenchmarkValues",
    "benchmark samplers": "rsm_guidance.cli.benchmark:BenchmarkSamplers",
}
_SHOWN = 500  # characters of a refusal
_DESCRIPTION = f"""Reward guidance for diffusion and flow pipelines.

Every command has --help with examples. Where an error is more than bad input, {PROGRAM} --debug COMMAND shows its traceback
(so does RSM_GUIDANCE_DEBUG=1)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, 2 (bad input) or 130 (interrupted); `data check` also with 1.

    What a user's reward raises comes through with its traceback, and with --debug every error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("RSM_GUIDANCE_DEBUG", "") not in ("", "0")
    try:
        parse([word for word in words if word != "--debug"]).run()
    except (ValueError, OSError) as error:
        if debug or _crashed_in_reward(error):
            raise
        _fail(f"error: {error}", 2)
    except KeyboardInterrupt as interrupt:
        _fail(f"interrupted {str(interrupt) or 'before there was anything to keep'}", 130)


def parse(words: list[str]) -> Any:
    """The command that the words ask for, with its options; exits after --help and for options that do not exist."""
    import tyro

    for name, path in COMMANDS.items():
        own = name.split()
        if words[: len(own)] == own:
            command: Any = pkgutil.resolve_name(path)
            rest = words[len(own) :]
            configured = command.configured(rest) if hasattr(command, "configured") else None
            given = {} if configured is None else {"default": configured}
            return _parsed(command, f"{PROGRAM} {name}", rest, **given)
    group = next((f"{words[0]} " for name in COMMANDS if words and name.startswith(f"{words[0]} ")), "")
    listed = {
        name.removeprefix(group): pkgutil.resolve_name(path)
        for name, path in COMMANDS.items()
        if name.startswith(group)
    }
    shown = [
        Annotated[c, tyro.conf.subcommand(n, description=_summary(c), prefix_name=False)] for n, c in listed.items()
    ]
    choice: Any = Union[tuple(shown)]  # noqa: UP007 - made at run time
    return _parsed(choice, f"{PROGRAM} {group}".strip(), words[1:] if group else words, description=_DESCRIPTION)


def _parsed(command: Any, prog: str, words: list[str], **given: Any) -> Any:
    """What tyro makes of the words; its refusal, a framed page, as one sentence."""
    import tyro

    page = io.StringIO()
    try:
        with contextlib.redirect_stderr(page):
            return tyro.cli(command, prog=prog, args=words, config=(tyro.conf.DisallowNone,), **given)
    except SystemExit as end:
        if end.code in (0, None):
            raise
        framed = [line.strip("│╭╮╰╯ ") for line in page.getvalue().splitlines()[1:]]
        said = " ".join(itertools.takewhile(lambda line: not line.startswith("─"), framed))
        _fail(f"error: {said.partition(' Got errors:')[0]} (see {prog} --help)", 2)


def _summary(command: type[Any]) -> str:
    """The first paragraph of a command's docstring."""
    return (command.__doc__ or "").partition("\n\n")[0]


def _crashed_in_reward(error: Exception) -> bool:
    rewards = sys.modules.get("rsm_guidance.rewards")  # nothing was scored where it has not been loaded
    return rewards is not None and rewards.crashed_in_reward(error)


def _fail(message: str, code: int) -> NoReturn:
    """Say one sentence, no longer than a screen however long the words were that it quotes, and exit."""
    said = "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split()))
    if len(said) > _SHOWN:
        said = f"{said[: _SHOWN * 2 // 3]} ... {said[-_SHOWN // 3 :]}"
    bars = sys.modules.get("tqdm")
    say = print if bars is None else bars.tqdm.write  # on a line of its own, below a bar that was cut short
    say(f"{PROGRAM}: {said}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

"""`rsm-guidance`: the command line.  Exit code 2 and one sentence on bad input, 130 on Ctrl-C, 143 on SIGTERM.

Parsing loads neither torch nor diffusers: commands are dataclasses of plain types, and their `run` imports what it needs.
"""

import contextlib
import os
import pkgutil
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, NoReturn, Union

PROGRAM = "rsm-guidance"
COMMANDS = {
    "sample": "rsm_guidance.cli.sample:Sample",
    "compare": "rsm_guidance.cli.compare:Compare",
    "score": "rsm_guidance.cli.score:Score",
    "evaluate preference": "rsm_guidance.cli.preference:EvaluatePreference",
    "evaluate": "rsm_guidance.cli.evaluate:Evaluate",
    "families": "rsm_guidance.cli.families:Families",
    "rewards": "rsm_guidance.cli.rewards:Rewards",
    "serve-reward": "rsm_guidance.cli.serve_reward:ServeReward",
    "data check": "rsm_guidance.cli.data:DataCheck",
    "train reward": "rsm_guidance.cli.train:TrainReward",
    "train align": "rsm_guidance.cli.align:TrainAlign",
    "train shapes-reward": "rsm_guidance.cli.train:TrainShapesReward",
    "train base": "rsm_guidance.cli.train:TrainBase",
    "benchmark engine": "rsm_guidance.cli.benchmark:BenchmarkEngine",
    "benchmark values": "rsm_guidance.cli.benchmark:BenchmarkValues",
    "benchmark samplers": "rsm_guidance.cli.benchmark:BenchmarkSamplers",
}
_LIBRARIES = ("diffusers", "transformers")
_LONGEST = 900
_DESCRIPTION = f"""Reward guidance for diffusion and flow pipelines.

Every command has --help with examples. Where an error is more than bad input, {PROGRAM} --debug COMMAND shows its traceback
(so does RSM_GUIDANCE_DEBUG=1)."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command; exits with 0, 2 (bad input), 130 or 143 (interrupted), 1 where a training diverged; `data check` also with 1.

    What a user's reward raises comes through with its traceback, and with --debug every error.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words or os.environ.get("RSM_GUIDANCE_DEBUG", "") not in ("", "0")
    try:
        with terminated_as_interrupted() as stopped_by:
            parse([word for word in words if word != "--debug"]).run()
    except (ValueError, OSError) as error:
        if debug or _crashed_in_reward(error):
            raise
        _fail(f"error: {error}", 2)
    except FloatingPointError as error:
        if debug:
            raise
        _fail(f"error: {error}", 1)
    except KeyboardInterrupt as interrupt:
        _fail(
            f"interrupted {str(interrupt) or 'before there was anything to keep'}",
            128 + getattr(interrupt, "signal_number", stopped_by()),
        )
    except Exception as error:
        library = _library_of_a_model(error)
        if debug or _crashed_in_reward(error) or library is None:
            raise
        said = f"{type(error).__name__}: {error}"
        _fail(f"error: {library} could not run the model: {said}; {PROGRAM} --debug COMMAND shows where", 2)


def parse(words: list[str]) -> Any:
    """The command that the words ask for, with its options; exits after --help and for options that do not exist."""
    import tyro

    style = (tyro.conf.DisallowNone,)
    for name, path in COMMANDS.items():
        own = name.split()
        if words[: len(own)] == own:
            command: Any = pkgutil.resolve_name(path)
            rest = words[len(own) :]
            configured = command.configured(rest) if hasattr(command, "configured") else None
            given = {} if configured is None else {"default": configured}
            return tyro.cli(command, prog=f"{PROGRAM} {name}", args=rest, config=style, **given)
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
    prog, rest = f"{PROGRAM} {group}".strip(), words[1:] if group else words
    return tyro.cli(choice, prog=prog, description=_DESCRIPTION, args=rest, config=style)


def _summary(command: type[Any]) -> str:
    """The first paragraph of a command's docstring."""
    return (command.__doc__ or "").partition("\n\n")[0]


def _crashed_in_reward(error: Exception) -> bool:
    rewards = sys.modules.get("rsm_guidance.rewards")  # nothing was scored where it has not been loaded
    return rewards is not None and rewards.crashed_in_reward(error)


def _library_of_a_model(error: BaseException) -> str | None:
    """The library in whose model or tokenizer an error arose, which may be damaged or of another kind than is said."""
    names = [frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((n for n in (name.partition(".")[0] for name in reversed(names)) if n in _LIBRARIES), None)


@contextlib.contextmanager
def terminated_as_interrupted() -> Iterator[Callable[[], int]]:
    """SIGTERM acts as Ctrl-C does: the best so far is kept.  Gives the number of the signal that came last."""
    came = [signal.SIGINT]

    def terminate(number: int, frame: object) -> None:
        came.append(signal.SIGTERM)
        interrupt = signal.getsignal(signal.SIGINT)
        if not callable(interrupt):  # a job in the background of a script is started with Ctrl-C ignored
            raise KeyboardInterrupt
        interrupt(signal.SIGINT, None)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: came[-1]
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield lambda: came[-1]
    finally:
        signal.signal(signal.SIGTERM, before)


def _fail(message: str, code: int) -> NoReturn:
    sentence = " ".join(message.split())
    if len(sentence) > _LONGEST:  # it quotes what was given
        sentence = f"{sentence[: _LONGEST // 2]} ... {sentence[-_LONGEST // 2 :]}"
    print(f"{PROGRAM}: {sentence}", file=sys.stderr)
    sys.exit(code)


if __name__ == "__main__":
    main()

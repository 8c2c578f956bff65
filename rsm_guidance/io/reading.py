"""Errors of reading as one sentence: what others' readers raise for damaged files, they choose themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rsm_guidance.core.errors import UsageError

_SHOWN = 240  # characters of somebody else's message
_SAY_ALL = (OSError, ValueError, RuntimeError, AssertionError)


@contextmanager
def refusing(claim: str, advice: str = "") -> Iterator[None]:
    """Raise what goes wrong inside as a UsageError, "CLAIM: reason; advice".  Interrupts and UsageErrors pass.

    It is for blocks that do nothing but read: whatever is raised there, the file is the cause.

    Args:
        claim: what cannot be done, and with which file or folder, as in "cannot load a pipeline from 'x'".
        advice: what to do about it.

    Raises:
        UsageError: for any other Exception.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(f"{claim}: {reason(error)}{'; ' if advice else ''}{advice}") from error


def reason(error: BaseException) -> str:
    """The first line of what an error says, cut to a readable length, with its type where that alone says little."""
    said = getattr(error, "strerror", None) or str(error)
    line = next((line.strip() for line in str(said).splitlines() if line.strip()), "")
    line = line if len(line) <= _SHOWN else line[: _SHOWN - 3] + "..."
    if isinstance(error, _SAY_ALL) or type(error).__name__ == "SafetensorError":
        return line or type(error).__name__
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def require_plain(folder: Path) -> Path:
    """The folder itself, if all in it are files and folders: to read a pipe might never end.

    Raises:
        UsageError: naming the first entry that is neither, such as a broken link.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_file() and not path.is_dir():
            raise UsageError(f"cannot read {folder}: {path.relative_to(folder)} is no regular file, or a broken link")
    return folder

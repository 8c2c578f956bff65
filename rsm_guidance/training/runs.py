"""What runs of trainers share besides their loop: settings, trackers, the journal, the upload."""

import json
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from rsm_guidance.core.errors import UsageError
from rsm_guidance.io.files import write_text
from rsm_guidance.training.checkpoint import checkpoints
from rsm_guidance.training.loop import Metrics


def flat(settings: dict[str, Any], place: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names, as JSON has them."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            found |= flat(value, f"{place}{name}.")
        else:
            found[place + name] = str(value) if isinstance(value, Path) else value
    return found


def require_trackers(names: Sequence[str]) -> None:
    """Raise a UsageError for trackers that accelerate does not know or that are not installed."""
    known = {str(kind) for kind in LoggerType} - {"all"}
    for name in names:
        if name not in known:
            raise UsageError(f"there is no tracker {name!r}; choose one of {', '.join(sorted(known))}")
        if name not in {str(kind) for kind in get_available_trackers()}:
            raise UsageError(f"the tracker {name!r} is not installed; pip install it, or leave it out of report_to")


def resumed(how: str, out: Path) -> Path | None:
    """The state that `resume` names; None for the last one of `out`, if any.

    Raises:
        UsageError: if nothing is to be resumed and `out` holds states.
    """
    found = checkpoints(out)
    if how == "never" and found:
        raise UsageError(f"{out} holds the run of {found[0].name}; name another folder, or delete its checkpoints")
    return None if how in ("auto", "never") else Path(how)


class Journal:
    """Numbers of each step as JSON lines; steps that are made again replace those of before."""

    def __init__(self, path: Path) -> None:
        self._path, self._begun = path, False

    def __call__(self, step: int, numbers: Metrics) -> None:
        if not self._begun:
            self._begun = True
            lines = self._path.read_text(encoding="utf-8").splitlines(True) if self._path.exists() else []
            write_text(self._path, "".join(line for line in lines if _step_of(line) < step))
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **numbers}) + "\n")


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # half a line, of a process that was killed
        return math.inf


def push(folder: Path, repository: str, private: bool, files: Sequence[str], message: str) -> None:
    """Upload files of a finished run; that it cannot be is said, and is no failure of the run."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        name = api.create_repo(repository, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(files), commit_message=message)
    except (HfHubHTTPError, OSError, ValueError) as error:
        told = str(error).strip().splitlines()[0]
        warnings.warn(f"the model is in {folder}, and could not be uploaded to {repository}: {told}", stacklevel=2)

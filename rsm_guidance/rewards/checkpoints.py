"""Reading published checkpoints strictly: safetensors, or .pt and .pth without running what a pickle holds."""

import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rsm_guidance.core.errors import UsageError


def checkpoint_file(location: str, names: Sequence[str]) -> Path:
    """A file by its path, or the first of `names` in a folder or hub repository.

    Raises:
        UsageError: if there is none.
    """
    path = Path(location).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise UsageError(f"the folder {location} holds none of {', '.join(names)}; name the file itself")
        return found
    if location.startswith((".", "/", "~")) or location.count("/") != 1:
        raise UsageError(f"there is no file or folder {location}, and it is no hub id (owner/name)")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(location, names[0]))
    except OSError as error:
        raise UsageError(f"cannot load {names[0]} of {location} from the hub: {_short(error)}") from error
    except ValueError as error:
        raise UsageError(f"cannot load {location}: {_short(error)}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, of a safetensors file or of a torch file that holds nothing else.

    A `state_dict` around them, and `module.` before all names, are taken off.

    Raises:
        UsageError: if the file is damaged, or would have to run code to be read.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        data: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(f"{path} holds more than tensors, and is not read: {_short(error)}") from error
    except Exception as error:  # damaged files raise errors of many kinds
        raise UsageError(f"cannot read the checkpoint {path}: {_short(error)}") from error
    data = data.get("state_dict", data) if isinstance(data, Mapping) else data
    if not isinstance(data, Mapping) or not all(isinstance(v, Tensor) for v in data.values()):
        raise UsageError(f"{path} is no mapping from names to tensors")
    wrapped = all(name.startswith("module.") for name in data)
    return {name.removeprefix("module.") if wrapped else name: tensor for name, tensor in data.items()}


def load_strictly(module: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Load tensors into a module that has exactly these.

    Raises:
        UsageError: naming tensors that are missing, unknown or of another shape.
    """
    own = module.state_dict()
    refuse_differences(own.keys() - tensors.keys(), tensors.keys() - own.keys(), source)
    for name, tensor in own.items():
        if tensor.shape != tensors[name].shape:
            raise UsageError(f"{source}: {name} has shape {list(tensors[name].shape)}, not {list(tensor.shape)}")
    module.load_state_dict(dict(tensors))


def refuse_differences(missing: Iterable[str], unknown: Iterable[str], source: object) -> None:
    """Raise a UsageError that names tensors which are missing or unknown, if there are any."""
    found = [
        f"{what} {_listed(sorted(names))}" for what, names in (("lacks", missing), ("has unknown", unknown)) if names
    ]
    if found:
        raise UsageError(f"the checkpoint {source} does not fit its model: it {' and '.join(found)}")


def renamed(tensors: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Tensors under the names that text replacements, in their order, make of theirs."""
    result = {}
    for old, tensor in tensors.items():
        new = old
        for before, after in rules:
            new = new.replace(before, after)
        result[new] = tensor
    return result


def layers_of(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered layers there are under `prefix`, as in `blocks.0.`, `blocks.1.`."""
    numbers = {name[len(prefix) :].partition(".")[0] for name in tensors if name.startswith(prefix)}
    return len({n for n in numbers if n.isdigit()})


def pretrained(load: Any, location: str, **options: Any) -> Any:
    """`load(location, **options)`, a `from_pretrained` of transformers.

    Raises:
        UsageError: if nothing is there, or it cannot be read.
    """
    try:
        return load(location, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise UsageError(
            f"cannot load {location!r}: {_short(error)}; give a folder, or a hub id that can be reached"
        ) from error


def pretrained_strictly(load: Any, location: str, dtype: torch.dtype) -> nn.Module:
    """A frozen model of transformers, all of whose tensors the checkpoint holds, and no others.

    Raises:
        UsageError: naming what is missing or unknown.
    """
    model, info = pretrained(load, location, dtype=dtype, output_loading_info=True)
    unknown = [name for name in info["unexpected_keys"] if not name.endswith("position_ids")]
    refuse_differences(info["missing_keys"], unknown, location)
    frozen: nn.Module = model.eval().requires_grad_(False)
    return frozen


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _short(error: BaseException) -> str:
    """The first line of an error."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

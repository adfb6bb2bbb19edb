"""State dicts of single checkpoint files, under the names of the plain module."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from cat_fast.errors import UserError, first_line
from cat_fast.weights.tensor_pickle import load_checkpoint

SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".safetensors")

_CONTAINERS = ("ema", "state_dict", "model")
"""Entries of training checkpoints with a state dict, the preferred one first."""
_WRAPPER = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Prefixes of names within DistributedDataParallel, torch.compile, FSDP and activation checkpointing."""


def is_state_file(name: str | os.PathLike[str]) -> bool:
    """Return True if `name` has the extension of a checkpoint file and is not a folder."""
    return Path(name).suffix.lower() in SUFFIXES and not Path(name).is_dir()


def read_state(
    source: Path | Mapping[str, Any], wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint, without the prefixes of wrapper modules in their names.

    Only tensors are read; code in a pickle is never run. Of a training checkpoint, the averaged weights are
    preferred.

    Args:
        source: a `.safetensors` file, a file of torch.save, or the content of one.
        wanted: predicate for the names to read.

    Raises:
        UserError: a missing or unreadable file, or two tensors of one name.
    """
    if isinstance(source, Path) and source.suffix.lower() == ".safetensors":
        return _read_safetensors(source, wanted)
    checkpoint = load_checkpoint(source) if isinstance(source, Path) else source
    state = _state_of(checkpoint)
    found = _plain_names(source, (key for key, value in state.items() if isinstance(value, Tensor)))
    return {name: state[key] for name, key in found.items() if wanted(name)}


def _read_safetensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            found = _plain_names(path, file.keys())
            return {name: file.get_tensor(key) for name, key in found.items() if wanted(name)}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a valid safetensors file ({first_line(error)})") from error


def _state_of(checkpoint: Any) -> Mapping[Any, Any]:
    if not isinstance(checkpoint, Mapping):
        return {}
    for name in _CONTAINERS:
        inner = checkpoint.get(name)
        if isinstance(inner, Mapping) and any(isinstance(value, Tensor) for value in inner.values()):
            return inner
    return checkpoint


def _plain_names(source: Path | Mapping[str, Any], keys: Iterable[Any]) -> dict[str, str]:
    """Return the key of each name without wrapper prefixes."""
    found: dict[str, str] = {}
    for key in keys:
        if not isinstance(key, str):
            continue
        name = _WRAPPER.sub("", key)
        if name in found:
            label = source if isinstance(source, Path) else "state dict"
            raise UserError(
                f"{label}: {found[name]} and {key} are both the weight {name}; expected one of them"
            )
        found[name] = key
    return found

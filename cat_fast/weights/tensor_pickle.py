"""Published checkpoints that are pickles, read for their tensors without running any code in them.

A pickle names functions that its reader calls. Here only those that rebuild tensors and plain containers are
known; every other name becomes a `Husk`, which takes whatever it is given and does nothing.
"""

import collections
import io
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from cat_fast.errors import UserError, first_line


class Husk:
    """Stands for an object of an unknown class; keeps its state, which may hold tensors, and nothing else."""

    def __new__(cls, *_: Any, **__: Any) -> "Husk":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        self.state: Any = {}

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def __setitem__(self, _: Any, __: Any) -> None: ...


def _storage_from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


KNOWN = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch", "Size"): torch.Size,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): _storage_from_bytes,
    # StyleGAN's networks: their classes are saved as source code, beside their state
    ("dnnlib.util", "EasyDict"): dict,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): lambda meta: meta,
}


class TensorUnpickler(pickle.Unpickler):
    """Knows the names of `KNOWN`, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name)
        return KNOWN.get((module, name), Husk)


def load_checkpoint(path: Path) -> Any:
    """What a file of torch.save holds, with a `Husk` for every object that is neither tensor nor container.

    Raises:
        UserError: no such file, or one that torch did not write.
    """
    reader = SimpleNamespace(Unpickler=TensorUnpickler, load=_load, __name__="pickle")
    try:
        return torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a checkpoint that torch wrote ({first_line(error)})") from error


def load_pickle(path: Path) -> Any:
    """What a plain pickle holds, likewise.

    Raises:
        UserError: no such file, or no pickle.
    """
    try:
        with path.open("rb") as file:
            return TensorUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file") from None
    except Exception as error:  # a damaged pickle raises whatever it stumbles over
        raise UserError(f"{path}: not a pickle ({first_line(error)})") from error


def module_state(module: Any, prefix: str = "") -> dict[str, Tensor]:
    """The parameters and buffers of a pickled module, by the names that its state_dict would give them."""
    state = module.state if isinstance(module, Husk) else module.get("state", {})
    found: dict[str, Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        found |= {prefix + name: value for name, value in state.get(kind, {}).items() if value is not None}
    for name, child in state.get("_modules", {}).items():
        if child is not None:
            found |= module_state(child, f"{prefix}{name}.")
    return found


def _load(file: Any, **options: Any) -> Any:
    return TensorUnpickler(file, **options).load()

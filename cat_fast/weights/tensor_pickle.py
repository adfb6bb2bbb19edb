"""Safe reading of published pickle checkpoints: tensors only, no code in them is run.

A pickle names functions for its reader to call. This reader knows only those that rebuild tensors and plain
containers. Every other name becomes an `OpaqueObject`, which accepts any arguments and does nothing.
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


class OpaqueObject:
    """Placeholder for an object of an unknown class; keeps its state, which may hold tensors."""

    def __new__(cls, *_: Any, **__: Any) -> "OpaqueObject":
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
    # StyleGAN's networks: their classes are saved as source code, next to their state
    ("dnnlib.util", "EasyDict"): dict,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): lambda meta: meta,
}


class TensorUnpickler(pickle.Unpickler):
    """Unpickler that resolves only the names in `KNOWN`."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name.endswith("Storage"):
            return getattr(torch, name)
        return KNOWN.get((module, name), OpaqueObject)


def load_checkpoint(path: Path) -> Any:
    """Load a file of torch.save, with an `OpaqueObject` for everything that is not a tensor or container.

    Raises:
        UserError: the file is missing or was not written by torch.save.
    """
    reader = SimpleNamespace(Unpickler=TensorUnpickler, load=_load, __name__="pickle")
    try:
        return torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a PyTorch checkpoint ({first_line(error)})") from error


def load_pickle(path: Path) -> Any:
    """Load a plain pickle, with an `OpaqueObject` for everything that is not a tensor or container.

    Raises:
        UserError: the file is missing or is not a pickle.
    """
    try:
        with path.open("rb") as file:
            return TensorUnpickler(file).load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except Exception as error:  # a damaged pickle can raise any exception
        raise UserError(f"{path}: not a valid pickle ({first_line(error)})") from error


def module_state(module: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the parameters and buffers of a pickled module under their state_dict names."""
    state = module.state if isinstance(module, OpaqueObject) else module.get("state", {})
    found: dict[str, Tensor] = {}
    for kind in ("_parameters", "_buffers"):
        found |= {prefix + name: value for name, value in state.get(kind, {}).items() if value is not None}
    for name, child in state.get("_modules", {}).items():
        if child is not None:
            found |= module_state(child, f"{prefix}{name}.")
    return found


def _load(file: Any, **options: Any) -> Any:
    return TensorUnpickler(file, **options).load()

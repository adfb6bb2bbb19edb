"""Files of the distilled scorers: plain arrays (npz, no pickle), atomically written, with clear errors."""

import hashlib
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError

Parsed = TypeVar("Parsed")


def read_arrays(path: Path, kind: str, parse: Callable[[dict[str, np.ndarray]], Parsed]) -> Parsed:
    """Return what `parse` makes of the arrays in a file.

    Args:
        kind: name of the scorer, for errors: "fast scorer".

    Raises:
        UserError: the file is missing, cannot be read, or `parse` raises KeyError, ValueError or TypeError.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            return parse({name: stored[name] for name in stored.files})
    except FileNotFoundError:
        raise UserError(f"{path}: the file is missing; create it with cat-fast score distill") from None
    except (OSError, EOFError, KeyError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(
            f"{path}: not a file of the {kind} ({error}); create one with cat-fast score distill"
        ) from error


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> None:
    """Save named arrays."""
    with atomic_write(path) as part, part.open("wb") as file:
        np.savez_compressed(file, **arrays)


def version_of(arrays: Mapping[str, np.ndarray], start: str = "") -> str:
    """Return a hash of named arrays, and of `start` before them."""
    digest = hashlib.sha256(start.encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()[:12]

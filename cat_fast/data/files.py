"""Whole files or none: what is written here appears under its name only once it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cat_fast.errors import UserError


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, keep: bool = False, flush: bool = True) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed to `path`.

    A process killed half way leaves at most a hidden `.NAME.*.part` file, an exception not even that, and
    whatever stood under `path` before is untouched. Missing parent folders are made. With `keep`, what stands
    under `path` in the end, perhaps another's by then, stays; read it to know. Without `flush`, which takes
    long on some disks, it is whole unless the machine itself goes down.

    Raises:
        UserError: the file cannot be written there (no permission, disk full, a folder of that name).
    """
    path = Path(path)
    part = _create_part(path)
    try:
        yield part
        if flush:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        if not (keep and _added(part, path)):
            part.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def require_writable(path: str | os.PathLike[str]) -> None:
    """Finds out before the work, not after it, that `path` cannot be written.

    Raises:
        UserError: as `atomic_write`.
    """
    _create_part(Path(path)).unlink()


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any], *, keep: bool = False) -> None:
    """Write a JSON object atomically; `keep` as for `atomic_write`.

    Raises:
        UserError: as `atomic_write`.
    """
    with atomic_write(path, keep=keep) as part:
        part.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _added(part: Path, path: Path) -> bool:
    """Whether `path` is there now: `part` under a second name, or what stood there; False without hard
    links."""
    try:
        os.link(part, path)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


def _create_part(path: Path) -> Path:
    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected the name of a file to write")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: its files are readable by their owner alone, and so would the result be.
        part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
        part.touch(exist_ok=False)
    except OSError as error:
        raise _unwritable(path, error) from error
    return part


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error.strerror or error})")

"""Atomic file writing: a file appears under its name only when it is complete."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cat_fast.errors import UserError


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, keep: bool = False, flush: bool = True) -> Iterator[Path]:
    """Yield a temporary path next to `path`; on success it is flushed to disk and renamed to `path`.

    An exception leaves an existing file at `path` unchanged, and so does killing the process, which leaves at
    most a hidden `.NAME.*.part` file. Missing parent folders are created. The file has the mode of any new
    file, also if a library replaces the temporary one.

    Args:
        keep: keep a file that exists at `path` by the end, perhaps written by another process; read it
            afterwards.
        flush: flush to disk, which is slow on some disks; without it, a machine crash may truncate the file.

    Raises:
        UserError: the file cannot be written (no permission, disk full, `path` is a folder or device).
    """
    path = Path(path)
    part = _create_part(path)
    try:
        mode = _mode(part)
        yield part
        _set_mode(part, mode)
        if flush:
            with part.open("rb+") as file:
                os.fsync(file.fileno())
        if not (keep and _link(part, path)):
            part.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        part.unlink(missing_ok=True)


def set_default_mode(path: Path) -> None:
    """Give a file the mode of any new file in its folder, following the umask.

    safetensors makes its files readable by their owner only, which locks out everybody else in a group.
    """
    probe = _create_part(path)
    try:
        _set_mode(path, _mode(probe))
    finally:
        probe.unlink()


def require_writable(path: str | os.PathLike[str]) -> None:
    """Check that `path` can be written, before the work whose result it will hold.

    Raises:
        UserError: see `atomic_write`.
    """
    _create_part(Path(path)).unlink()


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any], *, keep: bool = False) -> None:
    """Write a JSON object atomically; `keep` as for `atomic_write`.

    Raises:
        UserError: see `atomic_write`.
    """
    with atomic_write(path, keep=keep) as part:
        # A lone surrogate, as in names with invalid Unicode, becomes its JSON escape.
        text = json.dumps(content, ensure_ascii=False, indent=1)
        part.write_text(text, encoding="utf-8", errors="backslashreplace")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def _set_mode(path: Path, mode: int) -> None:
    if _mode(path) != mode:
        with suppress(PermissionError):  # some mounted file systems have one mode for all files
            path.chmod(mode)


def _link(part: Path, path: Path) -> bool:
    """Link `part` to `path` unless it exists; return False on file systems without hard links."""
    try:
        os.link(part, path)
    except FileExistsError:
        return True
    except OSError:
        return False
    return True


def _create_part(path: Path) -> Path:
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; expected a file name")
        if path.exists() and not path.is_file():  # such as /dev/null, which renaming would replace
            raise UserError(f"{path}: is a device or pipe; expected a file name")
        path.parent.mkdir(parents=True, exist_ok=True)
        # Not tempfile: its files, and so the result, would be readable by their owner only.
        part = path.with_name(f".{path.name[:40]}.{secrets.token_hex(4)}.part")
        part.touch(exist_ok=False)
    except OSError as error:
        raise _unwritable(path, error) from error
    return part


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path}: cannot be written ({error.strerror or error})")

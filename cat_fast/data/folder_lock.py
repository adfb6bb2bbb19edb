"""Lock of a folder for one process at a time, with the process that holds it."""

import errno
import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from cat_fast.errors import UserError

LOCK = ".lock"
_TIMEOUT_SECONDS = 1.0
"""`is_locked` of another process holds the lock for a moment."""
_UNSUPPORTED = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of file systems without locks, such as Lustre mounted without `flock` and some NFS."""
_LOG = logging.getLogger("cat_fast.data")


@contextmanager
def locked(folder: Path, work: str) -> Iterator[None]:
    """Lock a folder, which is created if missing.

    The lock is released when the process ends, for whatever reason. On a file system without locks, a warning
    is logged instead.

    Args:
        work: activity of this process in the folder, for the error message of others, such as "training".

    Raises:
        UserError: another process holds the lock, or the folder is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"output_dir: {folder}: not writable ({error.strerror or error}); "
            "fix its permissions or choose another folder"
        ) from error
    with file:
        try:
            _wait_for(file, fcntl.LOCK_EX, folder, work)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            _LOG.warning(
                "%s: its file system does not support locks (%s); make sure that no other process is %s here",
                *(folder, error.strerror, work),
            )
        file.truncate(0)
        file.write(f"{os.getpid()} {socket.gethostname()}\n")
        file.flush()
        yield


def require_unlocked(folder: Path, work: str) -> None:
    """Check that no process holds the lock of a folder.

    Raises:
        UserError: a process holds it; the message has its id.
    """
    try:
        with (folder / LOCK).open(encoding="utf-8") as file:
            _wait_for(file, fcntl.LOCK_SH, folder, work)
    except OSError:
        return


def is_locked(folder: Path) -> bool:
    """Return True if a process holds the lock of a folder."""
    try:
        with (folder / LOCK).open(encoding="utf-8") as file:
            return not _try_lock(file, fcntl.LOCK_SH)
    except OSError:
        return False


def supports_locks(folder: Path) -> bool:
    """Return False if the file system of a folder that was locked does not support locks."""
    try:
        with (folder / LOCK).open(encoding="utf-8") as file:
            _try_lock(file, fcntl.LOCK_SH)
    except OSError as error:
        return error.errno not in _UNSUPPORTED
    return True


def _wait_for(file: IO[str], kind: int, folder: Path, work: str) -> None:
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    while not _try_lock(file, kind):
        if time.monotonic() > deadline:
            file.seek(0)
            process, _, host = file.read().strip().partition(" ")
            who = f"process {process} on {host}" if host else "another process"
            end = f" with: kill {process}" if host else ""
            raise UserError(f"{folder}: {who} is {work} here; wait until it has finished, or end it{end}")
        time.sleep(0.05)


def _try_lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True

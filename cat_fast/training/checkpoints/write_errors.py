"""Write errors: turn a failed write on any rank into one clear error on all ranks.

DeepSpeed's `save_checkpoint` is collective. A rank that raised within it would leave the others waiting in
its barriers. So engines write through `DeferredErrorWriter`, which raises a write error at the next point
that all ranks reach.
"""

import errno
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from cat_fast.errors import UserError, first_line
from cat_fast.training.runtime.collective_errors import SharedError, raise_together
from cat_fast.training.runtime.ranks import Ranks

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch's zip writer and safetensors raise other exceptions than OSError for a failed write.
_WRITE_ERRORS = ("PytorchStreamWriter", "file write failed", "unexpected pos", "IoError", "I/O error")


def write_together(write: Callable[[], None], path: Path, what: str, ranks: Ranks) -> None:
    """Call `write` on every rank; raise on all ranks if it failed on any.

    Collective: every rank must call it.

    Args:
        path: file or folder that is written, for the message.
        what: name of the written object for the message, such as "a checkpoint".

    Raises:
        SharedError: on every rank, with the cause of the first failure.
    """
    error: UserError | None = None
    try:
        write()
    except SharedError:
        raise
    except Exception as caught:
        error = as_write_error(caught, path, what)
        if error is None:
            raise
    raise_together(error, ranks)


def write_on_main(write: Callable[[], None], path: Path, what: str, ranks: Ranks) -> None:
    """Call `write` on rank 0 only; otherwise as `write_together`."""
    write_together(write if ranks.is_main else lambda: None, path, what, ranks)


def as_write_error(error: Exception, path: Path, what: str = "a checkpoint") -> UserError | None:
    """Return a one-line error for a failed write of `what`, or None if `error` is not a write error."""
    if isinstance(error, UserError):
        return error
    text = str(error)
    if isinstance(error, OSError):
        why = "the disk is full" if error.errno in _DISK_FULL else error.strerror or text
    elif any(fragment in text for fragment in _WRITE_ERRORS):
        full = "No space left" in text or _is_full(path)
        why = "the disk is full" if full else first_line(error)
    else:
        return None
    return UserError(
        f"{_visible_folder(path)}: {what} cannot be written ({why}); saved checkpoints are unchanged: free "
        "disk space or choose another output_dir, and restart the run"
    )


class DeferredErrorWriter:
    """Wrapper of an engine's checkpoint writer; all ranks raise a write error at the checkpoint's commit."""

    def __init__(self, inner: Any, ranks: Ranks) -> None:
        self.inner, self.ranks = inner, ranks
        self.error: UserError | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            self.inner.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self._record(error, path)

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self.inner.save(state_dict, path)
        except Exception as error:
            self._record(error, path)
            # A partial file would take up the space of the small files that follow.
            with suppress(OSError):
                Path(path).unlink(missing_ok=True)

    def commit(self, info: Any) -> Any:
        error, self.error = self.error, None
        raise_together(error, self.ranks)
        return self.inner.commit(info)

    def _record(self, error: Exception, path: str) -> None:
        """Record the first write error; re-raise anything else."""
        write_error = as_write_error(error, Path(path))
        if write_error is None:
            raise error
        self.error = self.error or write_error

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def defer_write_errors(engine: Any, ranks: Ranks) -> None:
    """Make a DeepSpeed engine write its checkpoints through a `DeferredErrorWriter`."""
    engine.checkpoint_engine = DeferredErrorWriter(engine.checkpoint_engine, ranks)


def _visible_folder(path: Path) -> Path:
    """Return the folder for a message: not the hidden one in which a checkpoint is written."""
    return next((p.parent for p in (path, *path.parents) if p.name.endswith(".part")), path)


def _is_full(path: Path) -> bool:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free < 2**20

"""What cannot be written: one clear error on all ranks, whichever of them met it.

DeepSpeed's `save_checkpoint` is collective. A rank that raised within it would leave the others waiting in
its barriers, so the engines write through `AgreeingWriter`, which keeps an error until all can be told.
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

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch's zip writer and safetensors report the system's error in words of their own.
_WORDS = ("PytorchStreamWriter", "file write failed", "unexpected pos", "IoError", "I/O error")


def write_together(write: Callable[[], None], path: Path, what: str, ranks: Ranks) -> None:
    """Collective: every rank calls its `write` of `what` at `path`, and none goes on where one could not.

    Raises:
        SharedError: on every rank, with the first failure's cause.
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
    """Collective: `write_together`, where rank 0 alone has something to write."""
    write_together(write if ranks.is_main else lambda: None, path, what, ranks)


def as_write_error(error: Exception, path: Path, what: str = "a checkpoint") -> UserError | None:
    """The one line that a failed write of `what` deserves, or None if `error` is no failed write."""
    if isinstance(error, UserError):
        return error
    text = str(error)
    if isinstance(error, OSError):
        why = "the disk is full" if error.errno in _FULL else error.strerror or text
    elif any(word in text for word in _WORDS):
        full = "No space left" in text or _is_full(path)
        why = "the disk is full" if full else first_line(error)
    else:
        return None
    return UserError(
        f"{_place(path)}: {what} cannot be written ({why}); what was saved before is untouched: make "
        "room, or give the run another output_dir, and start it again"
    )


class AgreeingWriter:
    """Around an engine's own writer: a failed write is raised by all ranks, at the end of the checkpoint."""

    def __init__(self, inner: Any, ranks: Ranks) -> None:
        self.inner, self.ranks = inner, ranks
        self.error: UserError | None = None

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        try:
            self.inner.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self._keep(error, path)

    def save(self, state_dict: Any, path: str) -> None:
        try:
            self.inner.save(state_dict, path)
        except Exception as error:
            self._keep(error, path)
            # What was written of it would fill the disk for the small files that still follow.
            with suppress(OSError):
                Path(path).unlink(missing_ok=True)

    def commit(self, info: Any) -> Any:
        error, self.error = self.error, None
        raise_together(error, self.ranks)
        return self.inner.commit(info)

    def _keep(self, error: Exception, path: str) -> None:
        """The first one; one that is no failed write goes its way."""
        told = as_write_error(error, Path(path))
        if told is None:
            raise error
        self.error = self.error or told

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def agree_on_writes(engine: Any, ranks: Ranks) -> None:
    """Have a DeepSpeed engine write its checkpoints through an `AgreeingWriter`."""
    engine.checkpoint_engine = AgreeingWriter(engine.checkpoint_engine, ranks)


def _place(path: Path) -> Path:
    """The folder that a user knows: not the hidden one in which a checkpoint grows."""
    return next((p.parent for p in (path, *path.parents) if p.name.endswith(".part")), path)


def _is_full(path: Path) -> bool:
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free < 2**20

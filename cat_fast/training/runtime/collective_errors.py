"""Propagate one rank's error to all ranks.

A rank that raised alone would leave the others waiting in their next collective, until the launcher kills
them or the process group times out.
"""

import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar, cast

import torch

from cat_fast.errors import UserError
from cat_fast.training.runtime.ranks import Ranks

Result = TypeVar("Result")


class SharedError(UserError):
    """An error that every rank raises with the same message, so that only rank 0 needs to print it."""

    shared = True


def raise_together(error: Exception | None, ranks: Ranks) -> None:
    """Raise a `SharedError` on every rank if any rank passes an error; it names the error and the ranks.

    Collective: every rank must call it.
    """
    if ranks.sum(torch.tensor(float(error is not None), device=ranks.device)):
        raise_shared(error, ranks)


def raise_shared(error: Exception | None, ranks: Ranks) -> NoReturn:
    """Raise a `SharedError` on every rank, given that at least one of them passes an error.

    Collective: every rank must call it.
    """
    messages = ranks.gather(None if error is None else str(error))
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    first = messages[failed[0]]
    where = "" if ranks.world_size == 1 or failed == [0] else f" (on rank {', '.join(map(str, failed))})"
    raise SharedError(f"{first}{where}") from error


def require_shared_folder(folder: Path, ranks: Ranks) -> None:
    """Check that an existing folder is the same one on every rank.

    Collective: every rank must call it.

    Raises:
        SharedError: a rank sees another folder, or none; the message names its host.
    """
    token = folder / f".shared_{ranks.broadcast(secrets.token_hex(8))}"
    on_main(lambda: _touch(token), ranks)
    seen = token.exists()
    error = UserError(
        f"output_dir: {folder} on {socket.gethostname()} is not the folder that rank 0 writes to: every "
        "rank needs storage that all machines share"
    )
    try:
        raise_together(None if seen else error, ranks)
    finally:
        if ranks.is_main:
            token.unlink(missing_ok=True)


def _touch(path: Path) -> None:
    try:
        path.touch()
    except OSError as error:
        raise UserError(f"{path.parent}: not writable ({error.strerror or error})") from error


def on_each(action: Callable[[], Result], ranks: Ranks) -> Result:
    """Run `action` on every rank and return this rank's result.

    Collective: every rank must call it. A `UserError` on any rank is raised by all, as a `SharedError`.
    """
    result: Result | None = None
    error: UserError | None = None
    try:
        result = action()
    except UserError as caught:
        error = caught
    raise_together(error, ranks)
    return cast(Result, result)


def on_main(action: Callable[[], Result], ranks: Ranks) -> Result:
    """Run `action` on rank 0 and return its result on every rank.

    Collective: every rank must call it. A `UserError` on rank 0 is raised by all, as a `SharedError`.
    """
    return cast(Result, ranks.broadcast(on_each(lambda: action() if ranks.is_main else None, ranks)))

"""What one rank cannot do ends all ranks together, with one message.

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
    """Raised by every rank with the same message, so that it is enough if rank 0 tells it."""

    shared = True


def raise_together(error: Exception | None, ranks: Ranks) -> None:
    """Collective: if any rank brings an error, every rank raises a `SharedError` that says what and where."""
    if ranks.sum(torch.tensor(float(error is not None), device=ranks.device)):
        raise_shared(error, ranks)


def raise_shared(error: Exception | None, ranks: Ranks) -> NoReturn:
    """Collective: raise a `SharedError` on every rank; they have agreed that at least one brings an error."""
    messages = ranks.gather(None if error is None else str(error))
    failed = [rank for rank, message in enumerate(messages) if message is not None]
    first = messages[failed[0]]
    where = "" if ranks.world_size == 1 or failed == [0] else f" (on rank {', '.join(map(str, failed))})"
    raise SharedError(f"{first}{where}") from error


def require_shared(folder: Path, ranks: Ranks) -> None:
    """Collective: that every rank sees one and the same folder, which has to exist.

    Raises:
        SharedError: a rank sees another, or none; named with its host.
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
        raise UserError(f"{path.parent}: nothing can be written there ({error.strerror or error})") from error


def on_each(action: Callable[[], Result], ranks: Ranks) -> Result:
    """Collective: every rank acts and gets its own result, or all raise any one's `UserError` together."""
    result: Result | None = None
    error: UserError | None = None
    try:
        result = action()
    except UserError as caught:
        error = caught
    raise_together(error, ranks)
    return cast(Result, result)


def on_main(action: Callable[[], Result], ranks: Ranks) -> Result:
    """Collective: rank 0 acts, and all get its result, or raise its `UserError` as a `SharedError`."""
    return cast(Result, ranks.broadcast(on_each(lambda: action() if ranks.is_main else None, ranks)))

"""Worker processes of a multiprocessing pool: their parent alone decides when they end."""

import os
import pickle
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import parent_process
from typing import Any

from cat_fast.processes.ending import GRACE_SECONDS, STOP

_stopping = threading.Event()
_saving = threading.Lock()


def follow_parent(before_exit: Callable[[], object] = lambda: None) -> None:
    """Ignore signals of the terminal, which reach the parent too, and end with it: see `exit_with_parent`."""
    for kind in (signal.SIGINT, signal.SIGHUP):
        signal.signal(kind, signal.SIG_IGN)
    exit_with_parent(before_exit)


def exit_with_parent(before_exit: Callable[[], object] = lambda: None) -> None:
    """Exit this process when its parent dies.

    Otherwise it would outlive a killed parent: it waits on a pipe whose other end it holds itself.

    Args:
        before_exit: called on another thread once the parent has died.
    """
    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            before_exit()
            os._exit(1)

        threading.Thread(target=watch, name="end with parent", daemon=True).start()


def initialize(call: bytes, *shared: Any) -> None:
    """Initialize a spawned worker that finishes the work in `saving` before it ends.

    Follows the parent first, as unpickling imports the function's module, possibly with torch: that takes
    longer than a dead parent may go unnoticed. Until the function returns, the worker can be killed.

    Args:
        call: pickled function and tuple of arguments.
        shared: further arguments that only multiprocessing can pickle, such as queues.
    """
    follow_parent(before_exit=_finish)
    function, arguments = pickle.loads(call)
    function(*arguments, *shared)
    signal.signal(STOP, lambda number, frame: _stopping.set())


@contextmanager
def saving() -> Iterator[None]:
    """Finish the work in this context before the process ends; it should check `is_stopping`."""
    with _saving:
        yield


def is_stopping() -> bool:
    """Return True once this worker should end."""
    return _stopping.is_set()


def _finish() -> None:
    _stopping.set()
    _saving.acquire(timeout=GRACE_SECONDS)

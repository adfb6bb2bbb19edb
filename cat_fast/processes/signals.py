"""Signals that end a command, as an exception of its main thread.

    sys.exit(run_command(main))

SIGTERM, SIGHUP and Ctrl-C raise `Interrupted` in `main`, whose cleanup ends the processes it has started; a
second signal raises again, which cuts the cleanup short. Signals that follow within half a second belong to
the same request: a closed terminal, make and timeout each send theirs twice.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from cat_fast.processes.ending import descendants, end_processes, signals_in

SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_SAME_REQUEST_SECONDS = 0.5
_REPEAT_AFTER_SECONDS = 0.05
_POLL_SECONDS = 0.5
_NEVER = float("-inf")


class Interrupted(KeyboardInterrupt):
    """A signal that ends this command. Notes (`add_note`) describe what was saved."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells report it."""
        return 128 + self.number


class _Requests:
    """Signals received by this process."""

    def __init__(self) -> None:
        self.last = _NEVER
        self.earlier_children: set[int] = set()
        """Processes that existed when the command started."""
        self.deferrals = 0
        self.deferred = 0

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Raise `Interrupted`, unless the signal belongs to an earlier request."""
        now = time.monotonic()
        if now - self.last < _SAME_REQUEST_SECONDS:
            return
        self.last = now
        if self.deferrals:
            self.deferred = number
        else:
            raise Interrupted(number)

    def repeat(self, number: int) -> None:
        """Handle a signal again whose exception was lost in a callback, such as `__del__`."""
        self.last = _NEVER
        timer = threading.Timer(_REPEAT_AFTER_SECONDS, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()


_requests = _Requests()


@contextmanager
def interruptible(signals: Sequence[signal.Signals] = SIGNALS) -> Iterator[None]:
    """Raise `Interrupted` in the main thread on a signal, and when a parent `make` is signalled or dies.

    After one, all processes started in the context are ended at its exit, as `end_processes` does. SIGHUP
    stays ignored under nohup. Without effect in other threads than the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in signals if not _is_nohup(number)}
    outer = _requests.last, _requests.earlier_children
    _requests.last, _requests.earlier_children = _NEVER, set(descendants())
    closed = threading.Event()
    report_unraisable = sys.unraisablehook

    def unraisable(lost: Any) -> None:
        if isinstance(lost.exc_value, Interrupted):
            _requests.repeat(lost.exc_value.number)
        else:
            report_unraisable(lost)

    try:
        sys.unraisablehook = unraisable
        for number in before:
            signal.signal(number, _requests.handle)
        _follow_make(closed)
        yield
    finally:
        closed.set()
        if _requests.last != _NEVER:
            end_processes(lambda: descendants(_requests.earlier_children))
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = report_unraisable
        _requests.last, _requests.earlier_children = outer


@contextmanager
def deferred() -> Iterator[None]:
    """Delay `Interrupted` to the end of the context, so that a process started in it is never lost."""
    _requests.deferrals += 1
    try:
        yield
    finally:
        _requests.deferrals -= 1
    number, _requests.deferred = _requests.deferred, 0
    if number:
        raise Interrupted(number)


def run_command(main: Callable[[], int]) -> int:
    """Run the main function of a command line; return its exit code, or 128 + the number of a signal."""
    with interruptible():
        try:
            return main()
        except KeyboardInterrupt as interrupt:
            return report(interrupt)


def report(interrupt: KeyboardInterrupt) -> int:
    """Print an interruption with its notes on one line of standard error; return the exit code."""
    name = f" ({interrupt.args[0]})" if isinstance(interrupt, Interrupted) else ""
    notes = "; ".join(getattr(interrupt, "__notes__", ())) or "no partially written files remain"
    with suppress(OSError, ValueError):  # the terminal may be closed
        print(f"interrupted{name}: {notes}", file=sys.stderr, flush=True)
    return interrupt.exit_code if isinstance(interrupt, Interrupted) else 128 + signal.SIGINT


def _is_nohup(number: signal.Signals) -> bool:
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def _follow_make(closed: threading.Event) -> None:
    """Signal this process when the `make` that started it is signalled or dies.

    make passes on SIGTERM only: after SIGHUP and SIGINT it waits for its recipe, with that signal blocked.
    """
    make = os.getppid()
    try:
        if (Path("/proc") / str(make) / "comm").read_text().strip() not in ("make", "gmake"):
            return
    except OSError:
        return

    def watch() -> None:
        while not closed.wait(_POLL_SECONDS):
            number = _signal_of(make)
            if number is not None:
                if _requests.last == _NEVER:
                    os.kill(os.getpid(), number)
                return

    threading.Thread(target=watch, name="follow make", daemon=True).start()


def _signal_of(make: int) -> signal.Signals | None:
    """Return the signal that a parent process is handling, SIGTERM if it has died, else None."""
    if os.getppid() != make:
        return signal.SIGTERM
    blocked = signals_in(make, "SigBlk")
    return next((number for number in SIGNALS if number in blocked), None)

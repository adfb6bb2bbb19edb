"""Ending processes: those with something to save get time for it, the others are killed.

A process that has something to save handles `STOP`: it then saves and exits. All others, such as launchers
and processes that are still starting, can be killed at any time.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from pathlib import Path

import psutil

STOP = signal.SIGUSR1
GRACE_SECONDS = 60.0
_EXIT_SECONDS = 10.0
"""Time for the other processes to exit by themselves, with their exit codes, once those that save have."""
_POLL_SECONDS = 0.05

Find = Callable[[], Collection[int]]
"""Return the ids of the processes to end that are still running."""


def end_processes(find: Find) -> None:
    """Send `STOP` to all processes that handle it, wait until they have exited, and kill the others.

    The wait takes `GRACE_SECONDS` at most; KeyboardInterrupt, such as from a second signal, cuts it short.
    Returns once no process is left.
    """
    with suppress(KeyboardInterrupt):
        _stop(find)
    while remaining := find():
        for process in remaining:
            _send(process, signal.SIGKILL)
        time.sleep(_POLL_SECONDS)


def end_group(group: int) -> None:
    """End all processes of a process group except this one, as `end_processes` does."""
    end_processes(lambda: _members(group))


def descendants(excluded: Collection[int] = ()) -> list[int]:
    """Return the running descendants of this process, except `excluded` children and their descendants.

    multiprocessing's resource tracker is left out: it exits with this process.
    """
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.Error, OSError):
            if child.pid not in excluded and "resource_tracker" not in " ".join(child.cmdline()):
                found += [child.pid, *(process.pid for process in child.children(recursive=True))]
    return still_running(found)


def still_running(processes: Iterable[int]) -> list[int]:
    """Return those of the processes that are running; zombies do not count."""
    return [process for process in processes if not _is_zombie(process)]


def signals_in(process: int, mask: str) -> set[int]:
    """Return the numbers of the signals in a mask of a process: SigBlk (blocked) or SigCgt (handled)."""
    bits = int(_status(process).get(mask, "0"), 16)
    return {number for number in range(1, bits.bit_length() + 1) if bits >> (number - 1) & 1}


def _stop(find: Find) -> None:
    """Send `STOP` to each process as soon as it handles it, and wait; return when the rest may be killed."""
    deadline = time.monotonic() + GRACE_SECONDS
    stopped: set[int] = set()
    while (remaining := find()) and time.monotonic() < deadline:
        saving = {process for process in remaining if STOP in signals_in(process, "SigCgt")}
        if saving and not stopped:
            _print(f"waiting at most {GRACE_SECONDS:.0f} s until all is saved; signal again to end at once")
        for process in saving - stopped:
            _send(process, STOP)
        stopped |= saving
        if not stopped:
            return
        if stopped.isdisjoint(remaining):  # Python drops its handlers before it has exited
            deadline = min(deadline, time.monotonic() + _EXIT_SECONDS)
        time.sleep(_POLL_SECONDS)


def _members(group: int) -> list[int]:
    """Return the running processes of a group, without this one; zombies do not count."""
    members = []
    for process in psutil.pids():
        with suppress(OSError):
            if process != os.getpid() and os.getpgid(process) == group:
                members.append(process)
    return still_running(members)


def _send(process: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def _is_zombie(process: int) -> bool:
    """Return True if a process has exited."""
    return _status(process).get("State", "Z")[0] in "ZX"


def _status(process: int) -> dict[str, str]:
    """Return the fields of /proc/PROCESS/status; empty if it has exited."""
    try:
        text = (Path("/proc") / str(process) / "status").read_text(errors="replace")
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def _print(line: str) -> None:
    with suppress(OSError, ValueError):  # the terminal may be closed
        print(line, file=sys.stderr, flush=True)

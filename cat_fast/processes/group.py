"""Commands in a process group of their own, which ends with them, with this process, and on signals.

    python -m cat_fast.processes.group COMMAND …

runs a command and exits with its exit code. On SIGTERM, SIGHUP, SIGUSR1 and Ctrl-C, its processes save and
exit; the exit code is then 130 after Ctrl-C, 0 if the command exited with 0, else 128 + the signal's number.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from cat_fast.processes.ending import STOP, end_group
from cat_fast.processes.signals import SIGNALS, Interrupted, deferred, interruptible


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """Start a command in a process group of its own, and end the group at exit, as `end_processes` does.

    The group also ends if this process is killed: see `cat_fast.processes.guard`. The yielded process is the
    guard, which exits with the command and its exit code, or 128 + the number of the signal that ended it.

    Args:
        options: keyword arguments of `subprocess.Popen`.
    """
    guard = [sys.executable, "-m", "cat_fast.processes.guard", str(os.getpid())]
    with ExitStack() as stack:
        with deferred():
            process = subprocess.Popen(
                [*guard, *command], stdin=subprocess.DEVNULL, start_new_session=True, **options
            )
            stack.callback(_end, process)
        yield process


def _end(process: subprocess.Popen) -> None:
    end_group(process.pid)
    process.wait()


def main(command: Sequence[str]) -> int:
    """Run a command until it exits or a signal ends it; return the exit code."""
    process: subprocess.Popen | None = None
    try:
        with interruptible((*SIGNALS, STOP)), running(command) as process:
            return process.wait()
    except Interrupted as interrupt:
        saved = process is not None and process.returncode == 0
        return 0 if saved and interrupt.number != signal.SIGINT else interrupt.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

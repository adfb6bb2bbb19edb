"""Preemption: save and exit on SIGTERM, SIGUSR1, Ctrl-C, or when the launcher has died.

A scheduler may signal every process or only the launcher. DeepSpeed's launcher (deepspeed.launcher.launch)
passes SIGTERM to its ranks one after another, waits 30 seconds for each and then kills it. The command
`deepspeed` above it dies of a signal and leaves the others running. So one signalled rank is enough: the
ranks agree in each step, and all of them save and exit.

    signal reaches              effect
    any rank                    all ranks save and exit 0, and so does the launcher
    deepspeed.launcher.launch   the same, but it exits 1, and kills ranks that take longer than 30 s
    the command deepspeed       it dies; the ranks notice, save and exit 0
    SIGUSR1 to all of them      kills the launchers unless they ignore it (`trap '' USR1` before `deepspeed`);
                                the ranks save and exit 0 in any case
"""

import os
import shlex
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import psutil

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_LAUNCHERS = ("deepspeed.launcher.launch", "deepspeed.launcher.runner", "deepspeed")


class Preemption:
    """Request to end this process; `reason` names the signal or event, and is empty without a request."""

    def __init__(self) -> None:
        self.reason = ""
        self._launchers = launchers()

    @property
    def requested(self) -> bool:
        if not self.reason and not all(map(_is_alive, self._launchers)):
            self.reason = "the launcher died"
        return bool(self.reason)

    @contextmanager
    def listening(self) -> Iterator["Preemption"]:
        """Record signals while the context is open; a second Ctrl-C interrupts at once."""
        before = {kind: signal.signal(kind, self._record) for kind in SIGNALS}
        try:
            yield self
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)

    def _record(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.reason == "SIGINT":
            raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name


def launchers() -> list[psutil.Process]:
    """Return DeepSpeed's launcher processes among this one's ancestors, nearest first."""
    found = []
    for process in psutil.Process().parents():
        try:
            arguments = process.cmdline()
        except psutil.Error:
            break
        if not any(_is_launcher(argument) for argument in arguments[:5]):
            break
        found.append(process)
    return found


def resume_command(arguments: list[str]) -> str:
    """Return the command that resumes this run.

    This is the launcher's command line if it can be read. Otherwise it is rebuilt from the environment, with
    HOSTFILE as a placeholder for the host file of several nodes, which ranks do not know.

    Args:
        arguments: those of `cat_fast.train`.
    """
    for process in reversed(launchers()):
        command = process.cmdline()
        if not any("deepspeed.launcher.launch" in argument for argument in command[:5]):
            return shlex.join(_readable(command))
    own = ["--module", "cat_fast.train", *arguments]
    world, local = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_SIZE", "0"))
    if not local and "SLURM_JOB_ID" in os.environ:
        return shlex.join(["sbatch", "scripts/launch/slurm.sbatch", *arguments])
    if not local:
        return shlex.join([os.path.basename(sys.executable), "-m", *own[1:]])
    nodes = ["--hostfile", "HOSTFILE", "--num_nodes", str(world // local)] if world > local else []
    return shlex.join(["deepspeed", *nodes, "--num_gpus", str(local), *own])


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _is_launcher(argument: str) -> bool:
    return argument in _LAUNCHERS or os.path.basename(argument) == "deepspeed"


def _readable(command: list[str]) -> list[str]:
    """Return `deepspeed ARGS` for `python …/bin/deepspeed ARGS`, other commands unchanged."""
    script = command[1] if len(command) > 1 else ""
    return ["deepspeed", *command[2:]] if os.path.basename(script) == "deepspeed" else command

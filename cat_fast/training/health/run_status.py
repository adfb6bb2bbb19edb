"""The state of a run, told by the run in a small file, and checked against what can be seen from outside."""

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError
from cat_fast.training.health.heartbeat import HEARTBEATS, last_sign

STATUS = "status.json"
FAILURE = "failure.json"
LOCK = ".lock"
_WRITE_EVERY = 5.0
_SILENT_AFTER = 60.0
_LOCK_PATIENCE = 1.0


@dataclass(kw_only=True)
class RunStatus:
    """What a run says of itself. Times in seconds since 1970.

    `state` is running, finished, preempted or failed; who reads it (`summarize`) finds out killed.
    """

    task: str
    state: str = "running"
    reason: str = ""
    step: int = 0
    total_steps: int = 0
    loss: float | None = None
    skipped: int = 0
    ranks: int = 1
    host: str = ""
    pid: int = 0
    command: str = ""
    """What starts the run again, and in which folder."""
    directory: str = ""
    started: float = 0.0
    updated: float = 0.0


class StatusFile:
    """Keeps `folder/status.json` up to date; written by rank 0 only, whole each time."""

    def __init__(self, folder: Path, status: RunStatus) -> None:
        self.path, self.status = folder / STATUS, status
        status.host, status.pid = socket.gethostname(), os.getpid()
        status.directory, status.started = os.getcwd(), time.time()
        self._written = 0.0
        self.write()

    def step(self, done: int, loss: float | None, skipped: bool) -> None:
        """A step is over; the file follows within seconds."""
        self.status.step, self.status.loss = done, loss if loss is not None else self.status.loss
        self.status.skipped += skipped
        if time.monotonic() - self._written > _WRITE_EVERY:
            self.write()

    def end(self, state: str, reason: str = "") -> None:
        self.status.state, self.status.reason = state, reason
        self.write()

    def write(self) -> None:
        """A full disk must not end a run that could go on, nor hide why it ends."""
        self.status.updated = time.time()
        self._written = time.monotonic()
        with suppress(UserError), atomic_write(self.path, flush=False) as part:
            part.write_text(json.dumps(asdict(self.status), indent=1))


def record_failure(folder: Path, rank: int, reason: str) -> None:
    """Keep why a run failed. The first rank's word counts: what the others meet follows from it."""
    try:
        with (folder / FAILURE).open("x") as file:
            json.dump({"rank": rank, "reason": reason}, file)
    except OSError:
        pass


def read_failure(folder: Path) -> str:
    """The reason, with its rank unless that is the first; empty if none was recorded."""
    try:
        failure = json.loads((folder / FAILURE).read_text())
        return failure["reason"] + (f" (rank {failure['rank']})" if failure["rank"] else "")
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Hold the run's folder, and clear what the ranks of an earlier run said of themselves. The lock goes
    with the process, however it ends.

    Raises:
        UserError: another process holds it, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(
            f"output_dir: {folder}: nothing can be written there ({error.strerror or error}); "
            "free the folder or choose another"
        ) from error
    with file:
        deadline = time.monotonic() + _LOCK_PATIENCE  # a reader of `is_held` lets go at once
        while not _locked(file, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                raise UserError(f"{folder}: another process is training here; wait for it or end it")
            time.sleep(0.05)
        for old in (folder / FAILURE, *(folder / HEARTBEATS).glob("rank_*.json")):
            old.unlink(missing_ok=True)
        yield


def is_held(folder: Path) -> bool:
    """Whether a process trains in this folder now."""
    try:
        with (folder / LOCK).open() as file:
            return not _locked(file, fcntl.LOCK_SH)
    except OSError:
        return False


def _locked(file: Any, kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run as seen from outside. `age` is the seconds since its last sign of life."""

    folder: str
    task: str
    state: str
    reason: str
    step: int
    total_steps: int
    loss: float | None
    skipped: int
    age: float
    checkpoint: str
    """The newest, or empty; its contents are not verified here."""
    resume: str
    """The command that goes on; empty while it runs and after its end."""


def find_runs(folder: Path) -> list[RunSummary]:
    """Every run below `folder`, or `folder` itself, the most recent first."""
    found = []
    for path, folders, files in os.walk(folder):
        if STATUS in files and (summary := summarize(Path(path))):
            found.append(summary)
            folders.clear()  # what a run holds is no run
    return sorted(found, key=lambda run: run.age)


def summarize(folder: Path) -> RunSummary | None:
    """A run's state, or None if its status cannot be read."""
    try:
        values = json.loads((folder / STATUS).read_text())
        known = {field.name for field in fields(RunStatus)}
        status = RunStatus(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    age = max(0.0, time.time() - max(status.updated, last_sign(folder)))
    state, reason = status.state, status.reason
    if state == "running":
        state, reason = _judge(folder, status, age)
    elif state == "failed":
        reason = read_failure(folder) or reason
    checkpoints = sorted(p.parent for p in folder.glob("checkpoints/step_*/manifest.json"))
    goes_on = state in ("preempted", "failed", "killed") and status.command
    return RunSummary(
        folder=str(folder),
        task=status.task,
        state=state,
        reason=reason,
        step=status.step,
        total_steps=status.total_steps,
        loss=status.loss,
        skipped=status.skipped,
        age=round(age, 1),
        checkpoint=str(checkpoints[-1]) if checkpoints else "",
        resume=f"cd {status.directory} && {status.command}" if goes_on else "",
    )


def _judge(folder: Path, status: RunStatus, age: float) -> tuple[str, str]:
    """State and reason of a run whose last word was that it runs."""
    elsewhere = status.host != socket.gethostname()
    # Some network file systems do not carry locks from host to host.
    if is_held(folder) or (elsewhere and age < _SILENT_AFTER):
        return "running", f"no sign of life for {age:.0f} s" if age > _SILENT_AFTER else ""
    failure = read_failure(folder)
    return ("failed", failure) if failure else ("killed", "it ended without a word")

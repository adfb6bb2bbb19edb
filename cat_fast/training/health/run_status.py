"""Status file of a run, and its state as seen from outside: status, lock, heartbeats, recorded failure."""

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from cat_fast.data.files import atomic_write
from cat_fast.data.folder_lock import is_locked, locked, supports_locks
from cat_fast.errors import UserError
from cat_fast.training.health.heartbeat import HEARTBEATS, last_heartbeat

STATUS = "status.json"
FAILURE = "failure.json"
TRAINING = "training"
"""Work of a run in its folder, for `locked`."""
_WRITE_EVERY_SECONDS = 5.0
_SILENT_AFTER_SECONDS = 60.0


@dataclass(kw_only=True)
class RunStatus:
    """Contents of a run's status file. Times in seconds since 1970.

    `state` is running, finished, preempted or failed; `summarize` adds killed.
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
    """Command that resumes the run, to be started in `directory`."""
    directory: str = ""
    started: float = 0.0
    updated: float = 0.0


class StatusFile:
    """Writer of `folder/status.json`, on rank 0 only; the file is replaced atomically."""

    def __init__(self, folder: Path, status: RunStatus) -> None:
        self.path, self.status = folder / STATUS, status
        status.host, status.pid = socket.gethostname(), os.getpid()
        status.directory, status.started = os.getcwd(), time.time()
        self._written = 0.0
        self.write()

    def step(self, done: int, loss: float | None, skipped: bool) -> None:
        """Record a completed step; the file is updated every few seconds."""
        self.status.step, self.status.loss = done, loss if loss is not None else self.status.loss
        self.status.skipped += skipped
        if time.monotonic() - self._written > _WRITE_EVERY_SECONDS:
            self.write()

    def end(self, state: str, reason: str = "") -> None:
        self.status.state, self.status.reason = state, reason
        self.write()

    def write(self) -> None:
        """Write the file; errors are ignored, as a full disk must neither end the run nor hide its error."""
        self.status.updated = time.time()
        self._written = time.monotonic()
        with suppress(UserError), atomic_write(self.path, flush=False) as part:
            part.write_text(json.dumps(asdict(self.status), indent=1))


def record_failure(folder: Path, rank: int, reason: str) -> None:
    """Record why a run failed, unless a reason is recorded: later errors are consequences of the first."""
    try:
        with (folder / FAILURE).open("x") as file:
            json.dump({"rank": rank, "reason": reason}, file)
    except OSError:
        pass


def read_failure(folder: Path) -> str:
    """Return the recorded reason, with its rank unless that is 0; empty if there is none."""
    try:
        failure = json.loads((folder / FAILURE).read_text())
        return failure["reason"] + (f" (rank {failure['rank']})" if failure["rank"] else "")
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Lock the run's folder, and delete failure and heartbeats of an earlier run.

    Raises:
        UserError: another process holds the lock, or the folder is not writable.
    """
    with locked(folder, TRAINING):
        for old in (folder / FAILURE, *(folder / HEARTBEATS).glob("rank_*.json")):
            old.unlink(missing_ok=True)
        yield


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run as seen from outside. `age` is in seconds since its last status update or heartbeat."""

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
    """Newest checkpoint, or empty; its contents are not verified here."""
    resume: str
    """Command that resumes the run; empty while it is running and once it is finished."""


def find_runs(folder: Path) -> list[RunSummary]:
    """Return every run at or below `folder`, most recent first."""
    found = []
    for path, folders, files in os.walk(folder):
        if STATUS in files and (summary := summarize(Path(path))):
            found.append(summary)
            folders.clear()  # subfolders of a run are not runs
    return sorted(found, key=lambda run: run.age)


def summarize(folder: Path) -> RunSummary | None:
    """Return the summary of the run in `folder`, or None if its status file cannot be read."""
    try:
        values = json.loads((folder / STATUS).read_text())
        known = {field.name for field in fields(RunStatus)}
        status = RunStatus(**{name: value for name, value in values.items() if name in known})
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    age = max(0.0, time.time() - max(status.updated, last_heartbeat(folder)))
    state, reason = status.state, status.reason
    if state == "running":
        state, reason = _classify(folder, status, age)
    elif state == "failed":
        reason = read_failure(folder) or reason
    checkpoints = sorted(p.parent for p in folder.glob("checkpoints/step_*/manifest.json"))
    can_resume = state in ("preempted", "failed", "killed") and status.command
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
        resume=f"cd {status.directory} && {status.command}" if can_resume else "",
    )


def _classify(folder: Path, status: RunStatus, age: float) -> tuple[str, str]:
    """Return state and reason of a run whose status file has the state running."""
    # Some network file systems do not share locks between hosts, or have none.
    is_unlockable = status.host != socket.gethostname() or not supports_locks(folder)
    if is_locked(folder) or (is_unlockable and age < _SILENT_AFTER_SECONDS):
        return "running", f"no heartbeat for {age:.0f} s" if age > _SILENT_AFTER_SECONDS else ""
    failure = read_failure(folder)
    return ("failed", failure) if failure else ("killed", "it exited without recording a reason")

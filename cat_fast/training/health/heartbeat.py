"""Heartbeats of every rank, as small files in the run's folder, from which silent ranks can be identified."""

import json
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from cat_fast.data.files import atomic_write
from cat_fast.errors import UserError

HEARTBEATS = "heartbeats"


@dataclass(frozen=True, kw_only=True)
class Heartbeat:
    """The state of a rank at `time`, in seconds since 1970."""

    rank: int
    host: str
    pid: int
    time: float
    step: int
    step_description: str
    is_waiting: bool
    """The rank has finished its own part of the step and may wait for others."""
    reported: bool = False
    """The rank's watchdog has printed its stacks and is about to exit."""

    @property
    def place(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


def this_process() -> tuple[str, int]:
    """Return the host name and process id."""
    return socket.gethostname(), os.getpid()


def write_heartbeat(folder: Path, beat: Heartbeat) -> None:
    """Replace this rank's file atomically; errors are ignored, as a full disk must not end the run."""
    path = folder / HEARTBEATS / f"rank_{beat.rank:05d}.json"
    with suppress(UserError), atomic_write(path, flush=False) as part:
        part.write_text(json.dumps(asdict(beat)))


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """Return the last heartbeat of every rank, in rank order; unreadable files are skipped."""
    beats = []
    for path in sorted((folder / HEARTBEATS).glob("rank_*.json")):
        try:
            beats.append(Heartbeat(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return beats


def last_heartbeat(folder: Path) -> float:
    """Return the time of the most recent heartbeat of any rank, in seconds since 1970; 0 without any."""
    return max((beat.time for beat in read_heartbeats(folder)), default=0.0)


def now() -> float:
    return time.time()

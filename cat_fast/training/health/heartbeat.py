"""Signs of life of every rank, as small files in the run's folder: whoever looks can name who is missing."""

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
    """What a rank was at when it last gave a sign, at `time` (seconds since 1970)."""

    rank: int
    host: str
    pid: int
    time: float
    step: int
    work: str
    waiting: bool
    """Its own part of the step is done: what is missing is another rank's."""
    reported: bool = False
    """It has printed its stack and is about to end."""

    @property
    def place(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"


def this_process() -> tuple[str, int]:
    return socket.gethostname(), os.getpid()


def write_heartbeat(folder: Path, beat: Heartbeat) -> None:
    """Replaces this rank's file whole; a full disk must not end a run that could go on."""
    path = folder / HEARTBEATS / f"rank_{beat.rank:05d}.json"
    with suppress(UserError), atomic_write(path, flush=False) as part:
        part.write_text(json.dumps(asdict(beat)))


def read_heartbeats(folder: Path) -> list[Heartbeat]:
    """The last sign of every rank that ever gave one, in order of rank."""
    beats = []
    for path in sorted((folder / HEARTBEATS).glob("rank_*.json")):
        try:
            beats.append(Heartbeat(**json.loads(path.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return beats


def last_sign(folder: Path) -> float:
    """When any rank was last heard of, in seconds since 1970; 0 if never."""
    return max((beat.time for beat in read_heartbeats(folder)), default=0.0)


def now() -> float:
    return time.time()

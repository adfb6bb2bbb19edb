"""A run that hangs says where and for whom, and ends.

A rank that is stopped, swapped out or dead to the network leaves the others waiting in a collective, where
Python cannot interrupt them. So each rank has a thread that gives signs of life and, if nothing gets done for
too long, prints its rank's stacks and what the others' last signs say, and ends the process.
"""

import os
import sys
import threading
import time
import traceback
from datetime import timedelta
from pathlib import Path
from types import TracebackType

from cat_fast.training.config.settings import WatchdogConfig
from cat_fast.training.health.heartbeat import (
    Heartbeat,
    now,
    read_heartbeats,
    this_process,
    write_heartbeat,
)
from cat_fast.training.health.run_status import record_failure
from cat_fast.training.runtime.ranks import Ranks

EXIT_HUNG = 3
_LONGEST_INTERVAL = 10.0
_SILENT_INTERVALS = 4


def patience_of(config: WatchdogConfig) -> timedelta:
    """How long a collective may wait: longer than the watchdog, which ends a run with more to say."""
    return timedelta(seconds=config.timeout_seconds + 300) if config.timeout_seconds else timedelta(days=30)


class Watchdog:
    """Watches one rank while it is open. `timeout` in seconds; 0 gives signs of life and never ends the run.

    Time counts only while the thread itself runs: a job that was stopped as a whole and continued did not
    hang.
    """

    def __init__(self, folder: Path, ranks: Ranks, timeout: float) -> None:
        self.folder, self.ranks, self.timeout = folder, ranks, timeout
        self.interval = min(_LONGEST_INTERVAL, timeout / 10) if timeout else _LONGEST_INTERVAL
        self._idle = 0.0  # the thread's own, as `_progress` is the main thread's
        self._progress = 0
        self._doing = "starting"
        self._main = threading.main_thread().ident
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._beat()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closed.set()
        self._thread.join()

    def progress(self, doing: str) -> None:
        """Something got done, and this is next."""
        self._doing = doing
        self._progress += 1

    def _watch(self) -> None:
        last, seen = time.monotonic(), self._progress
        while not self._closed.wait(self.interval):
            before, last = last, time.monotonic()
            self._idle += min(last - before, 2 * self.interval)
            if seen != self._progress:
                self._idle, seen = 0.0, self._progress
            self._beat()
            if self.timeout and self._idle >= self.timeout:
                self._end()

    def _end(self) -> None:
        culprits = self._culprits()
        stacks = "\n".join(_stacks(self._main))
        told = f"{self._here()} hangs: {self._doing}, nothing done for {self._idle:.0f} s; {self.ranks.work}"
        reason = f"hung for {self._idle:.0f} s in step {self.ranks.work.step}: {culprits}"
        text = f"watchdog: {told}\nwatchdog: {culprits}\n{stacks}\n"
        sys.stderr.write(text)
        sys.stderr.flush()
        record_failure(self.folder, self.ranks.rank, reason)
        self._beat(reported=True)
        self._let_others_report()
        os._exit(EXIT_HUNG)

    def _culprits(self) -> str:
        """Who is missing: the silent, else those at work while others wait, else nobody in particular."""
        beats = [beat for beat in read_heartbeats(self.folder) if beat.rank < self.ranks.world_size]
        known = {beat.rank for beat in beats}
        missing = [
            f"rank {rank} never gave a sign" for rank in range(self.ranks.world_size) if rank not in known
        ]
        missing += [
            f"{beat.place} is missing: silent for {now() - beat.time:.0f} s, last in {beat.work}"
            for beat in beats
            if self._is_silent(beat)
        ]
        if missing:
            return "; ".join(missing)
        front = max(beat.step for beat in beats)
        busy = [b for b in beats if b.step < front or not b.waiting]
        if busy and len(busy) < len(beats):
            return "; ".join(f"the others wait for {beat.place}, at work in {beat.work}" for beat in busy)
        return "every rank gives signs of life and is at the same point: see the stacks"

    def _let_others_report(self) -> None:
        """The first rank to end takes the others with it, through the launcher: let them speak first."""
        deadline = time.monotonic() + 2 * _SILENT_INTERVALS * self.interval
        while time.monotonic() < deadline:
            others = [b for b in read_heartbeats(self.folder) if b.rank < self.ranks.world_size]
            if all(beat.reported or self._is_silent(beat) for beat in others):
                return
            time.sleep(self.interval / 2)

    def _is_silent(self, beat: Heartbeat) -> bool:
        return now() - beat.time > _SILENT_INTERVALS * self.interval

    def _beat(self, reported: bool = False) -> None:
        work = self.ranks.work
        host, pid = this_process()
        write_heartbeat(
            self.folder,
            Heartbeat(
                rank=self.ranks.rank,
                host=host,
                pid=pid,
                time=now(),
                step=work.step,
                work=str(work),
                waiting=work.waiting,
                reported=reported,
            ),
        )

    def _here(self) -> str:
        host, pid = this_process()
        return f"rank {self.ranks.rank} ({host}, process {pid})"


def _stacks(main: int | None) -> list[str]:
    """The stack of every thread, the main one first, as tracebacks."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return [
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in frames
        if ident != threading.get_ident()
    ]

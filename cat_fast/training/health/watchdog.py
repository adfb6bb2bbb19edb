"""Hang detection: dump every rank's stacks, name the suspect, exit.

A rank that is stopped, swapped out or cut off from the network leaves the others waiting in a collective,
where Python cannot interrupt them. So each rank has a thread that writes heartbeats. After too long without
progress it prints the rank's stacks and the suspects, by the others' heartbeats, and exits the process.
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
_MAX_INTERVAL_SECONDS = 10.0
_SILENT_INTERVALS = 4


def collective_timeout(config: WatchdogConfig) -> timedelta:
    """Return the timeout of collectives: longer than the watchdog's, whose diagnosis is more precise."""
    return timedelta(seconds=config.timeout_seconds + 300) if config.timeout_seconds else timedelta(days=30)


class Watchdog:
    """Heartbeats and hang detection of one rank, as a context manager.

    Time counts only while the watchdog's own thread runs, so a job that was suspended and continued is not
    taken for hung.

    Args:
        timeout: seconds without progress after which the process exits; 0 writes heartbeats only.
    """

    def __init__(self, folder: Path, ranks: Ranks, timeout: float) -> None:
        self.folder, self.ranks, self.timeout = folder, ranks, timeout
        self.interval = min(_MAX_INTERVAL_SECONDS, timeout / 10) if timeout else _MAX_INTERVAL_SECONDS
        self._idle = 0.0  # written by the watchdog's thread only, `_progress` by the main thread only
        self._progress = 0
        self._phase = "starting"
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

    def progress(self, phase: str) -> None:
        """Record progress, and the phase that starts now, for the message."""
        self._phase = phase
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
                self._report_and_exit()

    def _report_and_exit(self) -> None:
        suspects = self._suspects()
        context = self.ranks.step_context
        stacks = "\n".join(_stacks(self._main))
        summary = f"{self._here()} hangs: {self._phase}, no progress for {self._idle:.0f} s; {context}"
        reason = f"hung for {self._idle:.0f} s in step {context.step}: {suspects}"
        sys.stderr.write(f"watchdog: {summary}\nwatchdog: {suspects}\n{stacks}\n")
        sys.stderr.flush()
        record_failure(self.folder, self.ranks.rank, reason)
        self._beat(reported=True)
        self._wait_for_other_reports()
        os._exit(EXIT_HUNG)

    def _suspects(self) -> str:
        """Describe the suspects: silent ranks, else ranks still computing while others wait, else none."""
        beats = [beat for beat in read_heartbeats(self.folder) if beat.rank < self.ranks.world_size]
        known = {beat.rank for beat in beats}
        silent = [
            f"rank {rank} wrote no heartbeat" for rank in range(self.ranks.world_size) if rank not in known
        ]
        silent += [
            f"{b.place} is silent: last heartbeat {now() - b.time:.0f} s ago, in {b.step_description}"
            for b in beats
            if self._is_silent(b)
        ]
        if silent:
            return "; ".join(silent)
        last_step = max(beat.step for beat in beats)
        busy = [b for b in beats if b.step < last_step or not b.is_waiting]
        if busy and len(busy) < len(beats):
            return "; ".join(f"the others wait for {b.place}, busy in {b.step_description}" for b in busy)
        return "every rank writes heartbeats and is at the same point: see the stacks"

    def _wait_for_other_reports(self) -> None:
        """Wait until other ranks have printed their stacks: the launcher kills them once this rank exits."""
        deadline = time.monotonic() + 2 * _SILENT_INTERVALS * self.interval
        while time.monotonic() < deadline:
            others = [b for b in read_heartbeats(self.folder) if b.rank < self.ranks.world_size]
            if all(beat.reported or self._is_silent(beat) for beat in others):
                return
            time.sleep(self.interval / 2)

    def _is_silent(self, beat: Heartbeat) -> bool:
        return now() - beat.time > _SILENT_INTERVALS * self.interval

    def _beat(self, reported: bool = False) -> None:
        context = self.ranks.step_context
        host, pid = this_process()
        write_heartbeat(
            self.folder,
            Heartbeat(
                rank=self.ranks.rank,
                host=host,
                pid=pid,
                time=now(),
                step=context.step,
                step_description=str(context),
                is_waiting=context.is_waiting,
                reported=reported,
            ),
        )

    def _here(self) -> str:
        host, pid = this_process()
        return f"rank {self.ranks.rank} ({host}, process {pid})"


def _stacks(main: int | None) -> list[str]:
    """Return the stack of every other thread as text, the main thread's first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    frames = sorted(sys._current_frames().items(), key=lambda item: item[0] != main)
    return [
        f"thread {names.get(ident, ident)}:\n" + "".join(traceback.format_stack(frame))
        for ident, frame in frames
        if ident != threading.get_ident()
    ]

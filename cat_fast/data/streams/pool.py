"""Processes that decode, and outlive what crashes them.

An image can bring down its decoder (a fault in a library, or too little memory). Then the processes are
started anew, and what they had in hand is done again one by one, in a process apart: so the one that brings
its process down is known, and only that is broken. Signals for the run reach its workers, too: they leave
SIGINT and SIGUSR1 to their rank; SIGTERM, by which executors end them, is survived like a crash.
"""

import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from typing import Any

from cat_fast.errors import UserError


@dataclass(frozen=True)
class Broken:
    """What came of work that could not be done."""

    reason: str


class WorkerPool:
    """Runs functions in `workers` processes, or here and at once where there are none.

    The processes are started when they are first needed, by `spawn`: a fork would copy the locks of threads,
    NCCL's and CUDA's among them, in whatever state they are.
    """

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._lock, self._alone_lock = threading.Lock(), threading.Lock()
        self._generation = 0
        self._closed = False
        self._executor: ProcessPoolExecutor | None = None
        self._alone: ProcessPoolExecutor | None = None

    def submit(self, function: Callable[..., Any], *arguments: Any) -> "Task":
        """Both must be picklable; an exception of the function is a result, `Broken`."""
        return Task(self, function, arguments)

    def close(self) -> None:
        self._closed = True
        for executor in (self._executor, self._alone):
            if executor is not None:
                executor.shutdown(wait=True, cancel_futures=True)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> "tuple[Future[Any], int]":
        """A future of the work, and the generation of processes that does it."""
        while True:
            with self._lock:
                if self.workers and self._executor is None:
                    if self._closed:
                        raise RuntimeError("the pool is closed")
                    self._executor = _start(self.workers)
                generation, executor = self._generation, self._executor
            if executor is None:
                future: Future[Any] = Future()
                future.set_result(_guarded(function, arguments))
                return future, 0
            try:
                return executor.submit(_guarded, function, arguments), generation
            except RuntimeError:  # they are broken, or have just been replaced
                if self._closed:
                    raise
                self.restart(generation)

    def run_alone(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
        """The result of the work in a process that does nothing else meanwhile; `Broken` if two die of it."""
        with self._alone_lock:
            for _ in range(2):  # the first may have been ended by somebody else
                self._alone = self._alone or _start(1)
                try:
                    return self._alone.submit(_guarded, function, arguments).result()
                except BrokenProcessPool:
                    self._alone = None
            return Broken("the process that decoded it died")

    def restart(self, generation: int) -> None:
        """New processes, unless somebody has replaced those of `generation` already."""
        with self._lock:
            if generation == self._generation and self._executor is not None:
                self._executor.shutdown(wait=False, cancel_futures=True)
                self._executor = _start(self.workers)
                self._generation += 1


class Task:
    """Work under way."""

    def __init__(self, pool: WorkerPool, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.pool, self.function, self.arguments = pool, function, arguments
        self.future, self.generation = pool.run(function, arguments)

    def result(self) -> Any:
        """What the function returned, or `Broken`; waits for it."""
        try:
            return self.future.result()
        except (BrokenProcessPool, CancelledError):
            self.pool.restart(self.generation)
            return self.pool.run_alone(self.function, self.arguments)


def _start(workers: int) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin)


def _guarded(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return function(*arguments)
    except UserError as error:
        return Broken(str(error))
    except Exception as error:  # of whatever the image led into
        return Broken(f"{type(error).__name__}: {error}")


def _begin() -> None:
    for kind in (signal.SIGINT, signal.SIGUSR1):
        signal.signal(kind, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """A worker waits on a pipe whose other end it holds itself: it would outlive a parent that is killed."""
    parent = parent_process()
    if parent is not None:

        def watch() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
